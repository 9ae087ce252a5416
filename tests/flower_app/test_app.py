"""Both apps together, from configuration to exported model, with Flower's transport left out."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.load import load_config
from conf.schema import Config
from flower_app.build import resolve_model
from flower_app.client.ends import token_loss
from flower_app.data.client import Batch, batches, load_client_data, num_steps, steps
from flower_app.data.text import load_tokenizer
from flower_app.runs.recorder import Recorder
from flower_app.server_app import run_experiment
from models import build_scratch
from strategies.optim import derive_seed
from strategies.rounds.answers import COUNTERS
from tests.flower_app.grid import InProcessGrid
from tests.strategies.helpers import fed_avg_round, largest_difference

TINY = (
    "model.scratch='{model_type: llama, vocab_size: 259, hidden_size: 16, intermediate_size: 32, "
    "num_hidden_layers: 4, num_attention_heads: 2, num_key_value_heads: 2, pad_token_id: 0, "
    "eos_token_id: 1, bos_token_id: null, tie_word_embeddings: true, "
    "max_position_embeddings: 64}' data.context=32 data.max_examples=24 "
    "train.rounds=2 train.local_steps=3 train.batch_size=4 output.log_every=1"
)


@pytest.fixture(autouse=True)
def _flower_task(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity that Flower gives a ServerApp's process."""
    for name, value in (("_run_id", 1), ("_node_id", 1), ("_task_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)


def tiny_config(tmp_path: Path, changes: str = "", experiment: str = "demo") -> Config:
    tiny = TINY if experiment == "demo" else TINY[TINY.index("data.context") :]
    texts = tmp_path / "texts.jsonl"
    if not texts.exists():
        lines = [json.dumps({"text": text[:300]}) for text in list(topics.values())[:48]]
        texts.write_text("\n".join(lines), encoding="utf-8")
    data = f"data.source=files data.path={texts} data.partitioner=iid"
    return load_config(experiment, f"{tiny} {data} output.folder={tmp_path} {changes}")


def run(config: Config, grid: InProcessGrid) -> tuple[Path, list[dict[str, Any]], list[str]]:
    """Returns the run folder, its metrics, and what was printed."""
    lines: list[str] = []
    recorder = Recorder(resolve_model(config), say=lines.append)
    recorder.start()
    recorder.finish(run_experiment(resolve_model(config), grid, recorder))
    text = (recorder.folder / "metrics.jsonl").read_text(encoding="utf-8")
    return recorder.folder, [json.loads(line) for line in text.splitlines()], lines


def losses(metrics: list[dict[str, Any]]) -> list[tuple[str, float]]:
    return [
        (m["client"], m["loss"]) if m["kind"] == "step" else ("held-out", m["evaluate"]["loss"])
        for m in metrics
        if m["kind"] in ("step", "round")
    ]


@pytest.mark.parametrize("strategy", ["splitfed-v1", "splitfed-v2"])
def test_a_run_learns_and_leaves_what_it_promises(strategy: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, f"train.strategy={strategy} train.local_steps=12 train.lr=0.01")

    folder, metrics, lines = run(config, InProcessGrid(clients=2))

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rounds"] == summary["clients"] == 2
    assert summary["strategy"] == strategy
    assert summary["eval_loss_last"] < summary["eval_loss_first"] - 0.3
    steps = [m for m in metrics if m["kind"] == "step"]
    assert len(steps) == 2 * 2 * 12
    assert summary["tokens"] == sum(m["tokens"] for m in steps)
    assert summary["bytes_up"] > sum(m["bytes_up"] for m in steps) > 0
    assert all(set(m["seconds"]) == {"bottom", "network", "trunk", "top"} for m in steps)
    assert (folder / "loss.png").stat().st_size > 5000
    assert (folder / "config.yaml").exists()
    assert str(folder) in lines[0]
    assert str(folder) in lines[-1]
    assert any("client-0, client-1" in line for line in lines)


def test_a_run_repeats_exactly(tmp_path: Path) -> None:
    """Row 29, dropout and partial participation included, whatever ids Flower gives the nodes."""
    changes = (
        "data.context=24 model.scratch.attention_dropout=0.2 federation.fraction_train=0.25 "
        "federation.fraction_evaluate=0.5 train.rounds=3"
    )
    config = tiny_config(tmp_path, f"{changes} federation.min_clients=1")

    curves = [losses(run(config, InProcessGrid(4, first_id=first))[1]) for first in (7, 5000)]

    assert curves[0] == curves[1]
    assert len({name for name, _ in curves[0]}) > 2  # the held-out loss, and not always the same
    other = tiny_config(tmp_path, f"{changes} federation.min_clients=1 seed=1")
    assert losses(run(other, InProcessGrid(4))[1]) != curves[0]


@pytest.mark.parametrize(
    "modes",
    [
        "",
        "model.dtype=bf16",
        "tuning.bottom=frozen tuning.trunk=full tuning.top=lora",
        "tuning.bottom=lora tuning.trunk=frozen tuning.top=frozen",
        "tuning.bottom=frozen tuning.trunk=lora tuning.top=full",
    ],
)
def test_the_saved_model_is_the_one_that_was_evaluated(modes: str, tmp_path: Path) -> None:
    """Rows 12 and 24: whole, loaded by transformers alone, same held-out loss."""
    config = tiny_config(tmp_path, f"train.lr=0.01 {modes}")
    folder, metrics, _ = run(config, InProcessGrid(clients=2))

    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()

    evaluated = [m["evaluate"]["loss"] for m in metrics if m["kind"] == "round"]
    rounding = 0.03 if "bf16" in modes else 1e-5
    assert held_out_loss(model, config) == pytest.approx(evaluated[-1], abs=rounding)
    assert abs(evaluated[-1] - evaluated[0]) > 1e-3
    assert not lora_names(model)
    assert AutoTokenizer.from_pretrained(folder / "model")("é")["input_ids"]


def test_the_app_equals_fedavg_of_unsplit_models(tmp_path: Path) -> None:
    """Invariant 2 from configuration to saved model: three clients of unequal size, two rounds."""
    config = tiny_config(
        tmp_path, "train.lr=0.01 train.warmup=0 train.local_steps=0 data.max_examples=0"
    )
    grid = InProcessGrid(clients=3)
    for number in range(3):
        own = tmp_path / f"{number}.jsonl"
        lines = (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()
        own.write_text("\n".join(lines[6 * number : 7 * number + 2]), encoding="utf-8")
        grid.node_configs[number] = {"data-path": str(own), "name": f"site-{number}"}

    folder, _, _ = run(config, grid)

    whole = build_scratch(config.model.scratch, config.seed)
    for round in (1, 2):
        cohort = [
            site_steps(config, str(grid.node_configs[number]["data-path"]), f"site-{number}", round)
            for number in range(3)
        ]
        assert len({len(steps) for steps in cohort}) > 1, "clients must be of unequal size"
        fed_avg_round(whole, cohort, config.train, round, 2)
    saved = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert largest_difference(saved, whole) < 1e-4
    start = build_scratch(config.model.scratch, config.seed)
    assert largest_difference(saved, start) > 1e-2


def site_steps(config: Config, path: str, client: str, round: int) -> list[list[Batch]]:
    """The micro-batches that a client trains on in a round."""
    tokenizer = load_tokenizer(config.model)
    data = load_client_data(
        config.data, tokenizer, partition=0, partitions=1, data_path=path, seed=config.seed
    )
    order = torch.Generator().manual_seed(derive_seed(config.seed, round, client, "order"))
    train = config.train
    count = num_steps(len(data.train), train)
    return list(
        steps(
            data.train,
            batch_size=train.batch_size,
            accumulate=train.accumulate,
            steps=count,
            pad_id=0,
            generator=order,
        )
    )


def held_out_loss(model: torch.nn.Module, config: Config, partitions: int = 2) -> float:
    """Loss of an unsplit model over all clients' held-out examples."""
    found = [held_out_of(model, config, number, partitions) for number in range(partitions)]
    return sum(loss for loss, _ in found) / sum(tokens for _, tokens in found)


def held_out_of(
    model: torch.nn.Module, config: Config, partition: int, partitions: int = 2
) -> tuple[float, int]:
    """The same summed over the tokens of one client, and how many there are."""
    tokenizer = load_tokenizer(config.model)
    total, tokens = 0.0, 0
    data = load_client_data(
        config.data, tokenizer, partition=partition, partitions=partitions, seed=config.seed
    )
    for batch in batches(data.heldout, 4, pad_id=0, generator=None):
        with torch.no_grad():
            logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
        loss, count = token_loss(logits, batch.labels)
        total, tokens = total + float(loss), tokens + count
    return total, tokens


def test_lora_runs_on_the_demo_and_leaves_one_adapter(tmp_path: Path) -> None:
    """Row 6 and row 24: the newest demo is the base; PEFT loads what comes out."""
    base, _, _ = run(tiny_config(tmp_path), InProcessGrid(clients=2))
    before = (base / "model" / "model.safetensors").read_bytes()
    config = tiny_config(tmp_path, "train.lr=0.05 train.local_steps=8", experiment="lora")

    folder, metrics, _ = run(config, InProcessGrid(clients=2))

    plain = AutoModelForCausalLM.from_pretrained(base / "model").eval()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        before_logits = plain(ids).logits
        adapted = PeftModel.from_pretrained(plain, folder / "model").eval()
        after_logits = adapted(ids).logits
    assert (base / "model" / "model.safetensors").read_bytes() == before
    assert (after_logits - before_logits).abs().max() > 1e-3
    blocks = {name.split(".")[name.split(".").index("layers") + 1] for name in lora_names(adapted)}
    assert blocks == {"0", "1", "2", "3"}
    evaluated = [m["evaluate"]["loss"] for m in metrics if m["kind"] == "round"]
    assert evaluated[-1] < evaluated[0]


def lora_names(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if "lora_B" in name]


def test_a_round_ends_without_those_that_failed_and_says_who(tmp_path: Path) -> None:
    """Row 15: silence, a killed process and bad data each have a reason; the rest is averaged."""
    grid = InProcessGrid(clients=4)
    grid.node_configs[3] = {"data-path": str(tmp_path / "nowhere.jsonl"), "name": "hospital"}
    config = tiny_config(tmp_path, "federation.round_timeout=1")

    def fail_after_the_first_evaluation(message: Any) -> None:
        if message.metadata.message_type == "train":
            grid.absent, grid.broken = {1}, {2}

    grid.meanwhile = fail_after_the_first_evaluation
    _, metrics, lines = run(config, grid)

    last = metrics[-1]
    assert last["clients"] == ["client-0"]
    assert "no answer within" in last["missing"]["client-1"]
    assert "killed" in last["missing"]["client-2"]
    assert "nowhere.jsonl" in last["missing"]["hospital"]
    assert any("missing: " in line and "hospital" in line for line in lines)


def test_a_round_in_which_all_fail_ends_the_run_with_every_reason(tmp_path: Path) -> None:
    grid = InProcessGrid(clients=2)
    grid.node_configs = {n: {"data-path": f"/nowhere/{n}", "name": f"site-{n}"} for n in range(2)}

    with pytest.raises(RuntimeError, match=r"site-0: .*/nowhere/0.*site-1: .*/nowhere/1"):
        run(tiny_config(tmp_path), grid)


def test_a_failing_export_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("flower_app.export.save_full", full_disk)

    with pytest.raises(RuntimeError, match="no space left on device.*trained.safetensors"):
        run(tiny_config(tmp_path, "train.rounds=1"), InProcessGrid(clients=2))

    saved = load_file(next(tmp_path.glob("*/trained.safetensors")))
    names = dict(build_scratch(tiny_config(tmp_path).model.scratch, 0).named_parameters())
    assert saved.keys() == names.keys()


def test_a_node_without_data_is_told_how_to_name_them(tmp_path: Path) -> None:
    grid = InProcessGrid(clients=1, node_configs={0: {"name": "site"}})

    with pytest.raises(RuntimeError, match=r"site: this node has neither data-path nor"):
        run(tiny_config(tmp_path, "federation.min_clients=1"), grid)


def test_a_node_with_another_model_refuses_to_train(tmp_path: Path) -> None:
    """Of the same width, it would fit the trunk and learn nonsense without a word."""
    base, _, _ = run(tiny_config(tmp_path), InProcessGrid(clients=2))
    wrong = build_scratch({**tiny_config(tmp_path).model.scratch, "num_hidden_layers": 5}, seed=0)
    wrong.save_pretrained(tmp_path / "wrong")
    grid = InProcessGrid(clients=2)
    grid.node_configs[1] = {
        "model-path": str(tmp_path / "wrong"),
        "partition-id": 1,
        "num-partitions": 2,
    }

    config = tiny_config(tmp_path, "model.tokenizer=bytes", experiment="lora")
    _, metrics, _ = run(config, grid)

    assert base
    assert metrics[-1]["clients"] == ["client-0"]
    assert "of 5 blocks x 16" in metrics[-1]["missing"]["client-1"]
    assert "cut from llama of 4 blocks" in metrics[-1]["missing"]["client-1"]


@pytest.mark.parametrize(
    ("vocabulary", "positions", "word"),
    [(259, 16, "exceeds the 16 positions"), (100, 64, "the model embeds 100; set model.tokenizer")],
)
def test_a_model_that_cannot_embed_the_texts_says_so(
    vocabulary: int, positions: int, word: str, tmp_path: Path
) -> None:
    sizes = {"vocab_size": vocabulary, "n_positions": positions, "n_embd": 16, "n_head": 2}
    model = build_scratch({"model_type": "gpt2", "n_layer": 4, **sizes}, seed=0)
    model.save_pretrained(tmp_path / "base")
    changes = f"model.path={tmp_path / 'base'} model.tokenizer=bytes"

    with pytest.raises(RuntimeError, match=word):
        run(tiny_config(tmp_path, changes, experiment="lora"), InProcessGrid(clients=2))


def test_an_unforeseen_error_at_a_client_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise IndexError("index out of range in self")

    monkeypatch.setattr("flower_app.client.streamed.evaluate", broken)

    _, metrics, _ = run(tiny_config(tmp_path), InProcessGrid(clients=2))

    missing = metrics[-1]["evaluation"]["missing"]
    assert missing["client-0"].startswith("IndexError: index out of range")


def test_a_client_cannot_choose_its_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens weigh the average; those reported must be those whose steps the trunk applied."""
    grid = InProcessGrid(clients=2)
    deliver = grid._deliver

    def boastful(message: Any) -> Any:
        reply = deliver(message)
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 101:
            reply.content.metric_records["metrics"]["num-tokens"] *= 10
        return reply

    monkeypatch.setattr(grid, "_deliver", boastful)

    _, metrics, _ = run(tiny_config(tmp_path), grid)

    assert metrics[-1]["clients"] == ["client-0"]
    assert "of training, the trunk has applied" in metrics[-1]["missing"]["client-1"]


def test_nothing_of_a_client_but_parts_and_counters_is_in_its_reply(tmp_path: Path) -> None:
    """Row 32 on the control plane: no ids, no labels, no texts."""
    replies = []
    grid = InProcessGrid(clients=2)
    deliver = grid._deliver
    grid._deliver = lambda message: replies.append(deliver(message)) or replies[-1]  # type: ignore[method-assign]

    run(tiny_config(tmp_path), grid)

    for reply in replies:
        content = reply.content
        assert set(content.config_records["outcome"]) == {"client", "error"}
        if reply.metadata.message_type == "query":
            profile = {"cut-bottom", "cut-top", "lora-rank", "examples", "public-key"}
            assert set(content.config_records["profile"]) == profile
            assert content.config_records["profile"]["examples"] == 0, "nobody needs to know"
            assert set(content) == {"outcome", "profile"}
            continue
        assert set(content.metric_records["metrics"]) == {*COUNTERS}
        assert set(content) <= {"outcome", "metrics", "arrays"}
