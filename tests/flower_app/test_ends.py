"""Ends that never leave their client: personalised federated learning, against plain PyTorch."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from conf.load import load_config
from conf.schema import Config
from flower_app.client.node import own_config
from flower_app.export import export_model
from models import build_scratch
from simulations.equality.reference import train_whole
from strategies.aggregate.means import weighted_mean
from tests.flower_app import test_app
from tests.flower_app.grid import InProcessGrid
from tests.flower_app.runs import test_resume
from tests.flower_app.test_app import site_steps
from tests.strategies.helpers import largest_difference

UNTIED = "model.scratch.tie_word_embeddings=false"
EXACT = "train.lr=0.01 train.eps=1e-3 train.warmup=0 train.local_steps=0 data.max_examples=0"
"""With a small eps, AdamW would make whole steps of gradients that are nothing but rounding."""


@pytest.fixture(autouse=True)
def _flower_task(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr("flower_app.runs.recorder.plot_loss", lambda folder: None)


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where clients keep their own ends."""
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "sites"


class Watched(InProcessGrid):
    """Keeps what clients answer, too."""

    def _deliver(self, message: Message) -> Message | None:
        reply = super()._deliver(message)
        if reply is not None:
            self.seen.append(reply)
        return reply


def grid_of(tmp_path: Path, clients: int = 3, kind: type[InProcessGrid] = Watched) -> Any:
    """Clients with a file of unlike size each."""
    lines = (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    grid = kind(clients)
    for number in range(clients):
        own = tmp_path / f"{number}.jsonl"
        own.write_text("\n".join(lines[3 * number : 4 * number + 1]), encoding="utf-8")
        grid.node_configs[number] = {"data-path": str(own), "name": f"site-{number}"}
    return grid


def is_common(name: str, ends: str) -> bool:
    """Whether a weight of the four blocks, cut at 1 and 1, is averaged."""
    block = name.split(".")[2] if name.startswith("model.layers.") else ""
    if ends == "local":
        return block in ("1", "2")
    return block in ("0", "1", "2") or "embed_tokens" in name


def fed_per(
    config: Config, grid: InProcessGrid, cohorts: Mapping[int, set[str]] | None = None
) -> list[PreTrainedModel]:
    """FedPer (Arivazhagan et al. 2019, arXiv:1912.00818) on unsplit models: all rounds.

    `cohorts` are those who take part in each round; by default all.
    """
    models = [build_scratch(config.model.scratch, config.seed) for _ in range(grid.clients)]
    parameters = [dict(model.named_parameters()) for model in models]
    common = [n for n in parameters[0] if is_common(n, config.aggregation.ends)]
    rounds = config.train.rounds
    for round in range(1, rounds + 1):
        states, tokens = [], []
        for number, model in enumerate(models):
            name = f"site-{number}"
            if cohorts is None or name in cohorts[round]:
                steps = site_steps(config, str(grid.node_configs[number]["data-path"]), name, round)
                tokens.append(train_whole(model, steps, config.train, round, rounds)[1])
                states.append({n: parameters[number][n].detach() for n in common})
        mean = weighted_mean(states, tokens)
        with torch.no_grad():
            for own, name in itertools.product(parameters, common):
                own[name].copy_(mean[name])
    return models


def in_turn(config: Config, grid: InProcessGrid) -> list[PreTrainedModel]:
    """One trunk that each client takes over from the one before, between ends of its own."""
    models = [build_scratch(config.model.scratch, config.seed) for _ in range(grid.clients)]
    trunk = {n: p for n, p in models[0].named_parameters() if is_common(n, "local")}
    for round, number in itertools.product(range(1, config.train.rounds + 1), range(len(models))):
        own = dict(models[number].named_parameters())
        with torch.no_grad():
            for name, tensor in trunk.items():
                own[name].copy_(tensor)
        path = str(grid.node_configs[number]["data-path"])
        steps = site_steps(config, path, f"site-{number}", round)
        train_whole(models[number], steps, config.train, round, config.train.rounds)
        trunk = {name: own[name].detach().clone() for name in trunk}
    for model in models:
        with torch.no_grad():
            for name, tensor in trunk.items():
                dict(model.named_parameters())[name].copy_(tensor)
    return models


def assert_saved(sites: Path, expected: list[PreTrainedModel]) -> None:
    """Every site's own model is the expected one."""
    (run,) = sites.iterdir()
    for number, model in enumerate(expected):
        saved = AutoModelForCausalLM.from_pretrained(run / f"site-{number}" / "model")
        assert largest_difference(saved, model) < 1e-5


def arrays_in(messages: list[Message]) -> set[str]:
    """Names of all tensors that travelled in Flower's messages, either way."""
    records = [r for m in messages if m.has_content() for r in m.content.array_records.values()]
    return {name for record in records for name in record}


def names_on_disk(folder: Path) -> set[str]:
    """Names of all tensors in files under a folder."""
    found: set[str] = set()
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


@pytest.mark.parametrize(
    ("ends", "transport"),
    [
        ("local", "stream"),
        ("local", "messages"),
        ("local-top", "stream"),
        pytest.param("local-top", "messages", marks=pytest.mark.slow),
    ],
)
def test_each_site_has_the_model_that_fedper_of_unsplit_models_gives_it(
    ends: str, transport: str, tmp_path: Path, sites: Path
) -> None:
    """Clients of unequal size; the server is never told what stays, nor writes it down."""
    config = test_app.tiny_config(
        tmp_path,
        f"{EXACT} {UNTIED} aggregation.ends={ends} output.share_trunk=true "
        f"train.rounds={3 if transport == 'stream' else 2} link.transport={transport}",
    )
    grid = grid_of(tmp_path, 3 if transport == "stream" else 2)

    folder, _, _ = test_app.run(config, grid)

    expected = fed_per(config, grid)
    assert_saved(sites, expected)
    apart = [dict(model.named_parameters())["lm_head.weight"] for model in expected]
    assert (apart[0] - apart[1]).abs().max() > 1e-2
    every = {name for name, _ in expected[0].named_parameters()}
    stays = {name for name in every if not is_common(name, ends)}
    assert stays
    assert not arrays_in(grid.seen) & stays
    assert not {name.split("/")[-1] for name in names_on_disk(folder)} & stays
    assert not (folder / "model").exists()
    assert load_file(folder / "common.safetensors").keys() == every - stays


def test_a_trunk_in_turns_between_ends_of_each_clients_own(tmp_path: Path, sites: Path) -> None:
    """splitfed-v2, SGD: the trunk goes from client to client, no end does."""
    config = test_app.tiny_config(
        tmp_path,
        f"{EXACT} train.optimizer=sgd train.lr=0.3 train.strategy=splitfed-v2 "
        "aggregation.ends=local output.share_trunk=true",
    )
    grid = grid_of(tmp_path, 2)

    test_app.run(config, grid)

    assert_saved(sites, in_turn(config, grid))


class Forgetful(Watched):
    """An answer of site-1 in round 2 is lost, after its work."""

    def _deliver(self, message: Message) -> Message | None:
        reply = super()._deliver(message)
        place = self._number(message), message.content.config_records["ticket"]["round"]
        return None if message.metadata.message_type == "train" and place == (1, 2) else reply


def test_what_did_not_count_is_not_gone_on_from_and_who_was_not_asked_keeps_its_own(
    tmp_path: Path, sites: Path
) -> None:
    """Half of the clients in each round; one answer of round 2 is lost after its training."""
    config = test_app.tiny_config(
        tmp_path,
        f"{EXACT} {UNTIED} aggregation.ends=local output.share_trunk=true train.rounds=4 "
        "federation.fraction_train=0.67 federation.min_clients=1 federation.round_timeout=1",
    )
    grid = grid_of(tmp_path, kind=Forgetful)

    _, metrics, _ = test_app.run(config, grid)

    cohorts = {m["round"]: {*m["clients"]} for m in metrics if m["kind"] == "round"}
    (missing,) = (m["missing"] for m in metrics if (m["kind"], m["round"]) == ("round", 2))
    assert missing.keys() == {"site-1"}
    assert "site-1" in cohorts[3]
    assert len({frozenset(cohort) for cohort in cohorts.values()}) > 2
    assert_saved(sites, fed_per(config, grid, cohorts))


def own_ends(sites: Path, run: str) -> dict[str, dict[str, torch.Tensor]]:
    """What each site saved of its own, without the trunk."""
    found = (sites / run).glob("*/ends.safetensors")
    return {path.parent.name: load_file(path) for path in found}


def assert_alike(one: Any, other: Any) -> None:
    """To the bit, at every site."""
    assert one.keys() == other.keys()
    assert one
    for client, state in one.items():
        assert all(torch.equal(other[client][name], tensor) for name, tensor in state.items())


LOCAL = "aggregation.ends=local model.scratch.attention_dropout=0.2"


@pytest.mark.parametrize("transport", ["stream", pytest.param("messages", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_with_each_sites_own_ends(
    transport: str, tmp_path: Path, sites: Path
) -> None:
    """Everything is new after the kill but the sites' folders: SuperLink, nodes, Flower's state."""
    config = test_resume.configured(tmp_path, f"{LOCAL} link.transport={transport}")
    smooth = test_resume.run(config, InProcessGrid(2))
    (first,) = (path.name for path in sites.iterdir())

    broken = test_resume.run(config, test_resume.killing(InProcessGrid(2), 3))
    test_resume.resume(broken, InProcessGrid(2, first_id=5000))

    (second,) = {path.name for path in sites.iterdir()} - {first}
    assert_alike(own_ends(sites, second), own_ends(sites, first))
    assert test_resume.curve(broken) == test_resume.curve(smooth)
    one, other = (load_file(folder / "common.safetensors") for folder in (broken, smooth))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())

    # Whoever has both files puts a site's whole model together, as docs/federation.md says.
    site, number = sites / second / "client-1", 1
    own = load_config(str(site / "config.yaml"))
    whole = {**one, **load_file(site / "ends.safetensors")}
    model = AutoModelForCausalLM.from_pretrained(export_model(own, whole, None, site / "model"))
    told = test_resume.records(broken)[-1]["per_client"][site.name]["evaluate"]
    loss, tokens = test_app.held_out_of(model.eval(), config, number)
    assert loss / tokens == pytest.approx(told["loss"], abs=1e-5)

    # The round before can be gone back to as well: the sites have it, as the server has.
    test_resume.resume(broken / "checkpoints" / "round-0003", InProcessGrid(2))
    assert_alike(own_ends(sites, second), own_ends(sites, first))


def test_ends_that_are_gone_are_never_begun_anew(tmp_path: Path, sites: Path) -> None:
    """A SuperNode that was started anew goes on from its folder; without one it says what to do."""
    config = test_resume.configured(tmp_path, "aggregation.ends=local train.rounds=3")
    grid = InProcessGrid(3)

    def lose(message: Message) -> None:
        ticket = message.content.config_records["ticket"]
        if (ticket["round"], message.metadata.message_type) != (2, "train"):
            return
        for number in (0, 1):
            kept = grid.states[number]
            for name in [n for n in kept.array_records if n.startswith("graft-ends")]:
                del kept[name]
        (run,) = sites.iterdir()
        shutil.rmtree(run / "client-1", ignore_errors=True)

    grid.meanwhile = lose
    folder = test_resume.run(config, grid)

    rounds = {r["round"]: r for r in test_resume.records(folder) if r["kind"] == "round"}
    assert rounds[2]["clients"] == ["client-0", "client-2"]
    why = rounds[2]["missing"]["client-1"]
    assert "own ends after round 1 are gone" in why
    assert "begin the run anew" in why


@pytest.mark.parametrize("least", [1, 2])
def test_who_has_left_when_the_run_ends_is_named_and_the_run_is_complete(
    least: int, tmp_path: Path, sites: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where a round would have too few clients now: there is none to come."""
    config = test_resume.configured(
        tmp_path,
        f"aggregation.ends=local train.rounds=1 federation.min_clients={least} "
        "federation.round_timeout=1",
    )
    grid = InProcessGrid(2)

    def leave(message: Message) -> None:
        ticket = message.content.config_records["ticket"]
        if (ticket["round"], message.metadata.message_type) == (1, "evaluate"):
            grid.present = {0}

    grid.meanwhile = leave
    folder = test_resume.run(config, grid)

    (run,) = sites.iterdir()
    assert own_ends(sites, run.name).keys() == {"client-0"}
    assert "client-1 has not saved its own ends: it is not connected" in caplog.text
    assert (run / "client-1" / "round-0001.safetensors").is_file()
    assert '"status": "finished"' in (folder / "summary.json").read_text()


def test_another_runs_ends_are_not_taken_for_this_ones(tmp_path: Path, sites: Path) -> None:
    """The nodes stay up: what they have of one run, state and folder, means nothing to the next."""
    config = test_resume.configured(tmp_path, "aggregation.ends=local train.rounds=2")
    grid = InProcessGrid(2)

    one, other = (test_resume.run(config, grid) for _ in range(2))

    assert test_resume.curve(one) == test_resume.curve(other)
    first, second = (own_ends(sites, path.name) for path in sites.iterdir())
    assert_alike(first, second)
    names = {name.split("/")[1] for name in grid.states[0].array_records if "/" in name}
    assert len(names) == 1, "what was kept of the run before goes"


@pytest.mark.parametrize(
    "changes",
    [
        "train.strategy=merged link.transport=messages",
        "tuning.trunk=frozen",
        pytest.param("train.strategy=splitfed-v2 tuning.trunk=frozen", marks=pytest.mark.slow),
    ],
)
def test_nothing_to_average_is_no_trouble(changes: str, tmp_path: Path, sites: Path) -> None:
    config = test_resume.configured(tmp_path, f"aggregation.ends=local train.rounds=2 {changes}")

    folder = test_resume.run(config, InProcessGrid(2))

    losses = [r["evaluate"]["loss"] for r in test_resume.records(folder) if r["kind"] == "round"]
    assert losses[-1] < losses[0]
    (run,) = sites.iterdir()
    one, other = own_ends(sites, run.name).values()
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("how", ["factors", pytest.param("ffa", marks=pytest.mark.slow), "exact"])
def test_a_sites_adapter_is_its_own_ends_around_the_common_trunk(
    how: str, tmp_path: Path, sites: Path
) -> None:
    """PEFT, or transformers where the rank cannot hold the mean, loads what the site evaluated."""
    base = build_scratch(test_app.tiny_config(tmp_path).model.scratch, seed=3)
    base.save_pretrained(tmp_path / "base")
    config = test_app.tiny_config(
        tmp_path,
        f"model.path={tmp_path / 'base'} model.tokenizer=bytes train.lr=0.05 lora.rank=2 "
        f"aggregation.ends=local output.share_trunk=true aggregation.lora={how}",
        experiment="lora",
    )

    _, metrics, _ = test_app.run(config, InProcessGrid(2))

    (run,) = sites.iterdir()
    kind = AutoModelForCausalLM if how == "exact" else AutoPeftModelForCausalLM
    evaluated = metrics[-1].get("per_client", {})
    total = tokens = 0.0
    for number in range(2):
        model = kind.from_pretrained(run / f"client-{number}" / "model").eval()
        loss, count = test_app.held_out_of(model, config, number)
        total, tokens = total + loss, tokens + count
        if evaluated:
            told = evaluated[f"client-{number}"]["evaluate"]["loss"]
            assert loss / count == pytest.approx(told, abs=1e-5)
    assert total / tokens == pytest.approx(metrics[-1]["evaluate"]["loss"], abs=1e-5)


def test_a_head_that_is_the_averaged_embedding_cannot_stay(tmp_path: Path) -> None:
    config = test_app.tiny_config(tmp_path, "aggregation.ends=local-top")

    with pytest.raises(ValueError, match=r"head is its embedding .*aggregation.ends=local"):
        test_app.run(config, InProcessGrid(2))


def test_own_cuts_and_ranks_are_refused_in_words(tmp_path: Path) -> None:
    """Their blocks would stay at one client and be averaged at another."""
    config = test_app.tiny_config(tmp_path, "aggregation.ends=local federation.min_clients=1")
    grid = InProcessGrid(2)
    grid.node_configs[1] = {"partition-id": 1, "num-partitions": 2, "cut-bottom": 2}

    with pytest.raises(ValueError, match="cut-bottom=2 .*aggregation.ends=local; take cut-bottom"):
        own_config(config, grid.node_configs[1])
    lora = test_app.tiny_config(
        tmp_path,
        "tuning.bottom=lora tuning.top=lora aggregation.lora=svd aggregation.ends=local",
    )
    with pytest.raises(ValueError, match="lora-rank=3 .*aggregation.ends=local"):
        own_config(lora, {"lora-rank": 3})


def test_a_server_that_asks_for_what_stays_does_not_get_it(tmp_path: Path, sites: Path) -> None:
    """Nor does its question cost the site what it has kept."""
    config = test_resume.configured(tmp_path, f"{UNTIED} aggregation.ends=local-top train.rounds=1")
    grid = Watched(2)
    test_resume.run(config, grid)
    asked = [m for m in grid.seen if "ticket" in m.content.config_records]
    evaluate = next(m for m in reversed(asked) if m.metadata.message_type == "evaluate")
    before = {name: set(state.array_records) for name, state in grid.states.items()}
    curious = dict(evaluate.content.config_records["ticket"]) | {"send-tensors": True}
    content = RecordDict({**evaluate.content, "ticket": ConfigRecord(curious)})

    reply = grid._deliver(Message(content, 100, message_type="query"))

    assert reply is not None
    assert not reply.content.config_records["outcome"]["error"]
    sent = reply.content.array_records["arrays"]
    assert sent
    assert all(is_common(name, "local-top") for name in sent)
    assert {name: set(state.array_records) for name, state in grid.states.items()} == before
