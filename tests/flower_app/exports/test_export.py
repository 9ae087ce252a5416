"""Every form of an export computes what the split model computes, and starts another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    GenerationConfig,
)

from conf.load import load_config, to_yaml
from conf.schema import Config
from flower_app.build import build_client, build_trunk, resolve_model
from flower_app.export import export_model
from flower_app.exports.export import export
from flower_app.runs.folders import folders, runs_folder
from flower_app.serving.source import find_served, load_ends, load_trunk, load_whole_model
from models import Cut, client_state, trainable_state
from models.state import copy_into, named_trainable
from tests.flower_app.grid import InProcessGrid
from tests.flower_app.runs import test_resume
from tests.models.helpers import ids, run, saved

pytestmark = pytest.mark.usefixtures("one_thread")
FULL = "tuning.bottom=full tuning.trunk=full tuning.top=full"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(autouse=True)
def _flower_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr("flower_app.runs.recorder.plot_loss", lambda folder: None)


def trained_run(folder: Path, family: str, changes: str = "") -> tuple[Path, Tensor]:
    """A run folder as a run of this family leaves it, and the split model's logits."""
    saved(folder / "base", family, tie_word_embeddings=True)
    tokenizer = ByT5Tokenizer(extra_ids=0, chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder / "base")
    GenerationConfig(eos_token_id=[1, 7], top_k=3, do_sample=True).save_pretrained(folder / "base")
    config = resolve_model(
        load_config(
            "lora", f"model.path={folder / 'base'} cut.bottom=1 cut.top=1 lora.rank=2 {changes}"
        )
    )
    bottom, top = build_client(config)
    parts = [bottom, build_trunk(config), top]
    state = {**client_state(bottom, top), **trainable_state(parts[1])}
    generator = torch.Generator().manual_seed(1)
    state = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in state.items()}
    copy_into(named_trainable(*parts), state, "model")
    return left_by(config, state, tokenizer), run(parts, ids()).detach()


def left_by(config: Config, state: dict[str, Tensor], tokenizer: Any) -> Path:
    place = runs_folder() / "20260101-120000-lora"
    export_model(config, state, tokenizer, place / "model")
    (place / "config.yaml").write_text(to_yaml(config))
    summary = {"status": "finished", "experiment": "lora", "model": "model", "rounds": 2}
    (place / "summary.json").write_text(json.dumps(summary))
    return place


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.detach(), want, rtol=0, atol=1e-5)


def check_beside(folder: Path) -> None:
    """Tokenizer, chat template and generation settings are there."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [1, 7]


SUBJECTS = [
    *((family, "") for family in ("gpt2", "llama", "qwen2", "gemma3_text")),
    ("llama", FULL),
    *(
        pytest.param(family, FULL, marks=pytest.mark.slow)
        for family in ("gpt2", "qwen2", "gemma3_text")
    ),
]


@pytest.mark.parametrize(("family", "tuning"), SUBJECTS)
def test_every_form_gives_the_split_models_logits(family: str, tuning: str, tmp_path: Path) -> None:
    place, want = trained_run(tmp_path, family, tuning)
    check_beside(place / "model")
    if not tuning:
        adapter = export(str(place), "adapter")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        close(PeftModel.from_pretrained(base, adapter).eval()(ids()).logits, want)
        check_beside(adapter)

    merged = export(place.name, "merged", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(merged)
    close(model.eval()(ids()).logits, want)
    assert model.generation_config.top_k == 3
    check_beside(merged)

    parts = export(place.name, "parts")
    shutil.move(parts / "trunk", tmp_path / "server")
    shutil.move(parts / "ends", tmp_path / "client")
    server, client = (find_served(str(tmp_path / name)) for name in ("server", "client"))
    bottom, top = load_ends(client)
    close(run([bottom, load_trunk(server), top], ids()), want)
    assert server.fingerprint == client.fingerprint == find_served(place.name).fingerprint
    assert bottom.model.generation_config.top_k == 3
    assert top.model.get_output_embeddings().weight is bottom.model.get_input_embeddings().weight
    check_beside(tmp_path / "client")
    assert {file.name for file in (tmp_path / "server").iterdir()} == {
        "trunk.safetensors", "config.json", "graft.json", "README.md",
    }  # fmt: skip
    own = load_file(tmp_path / "server" / "trunk.safetensors")
    assert len({name.split(".")[2] for name in own}) == 2


@pytest.mark.parametrize("form", ["adapter", "merged", "parts"])
def test_who_generates_with_an_export_has_the_runs_defence(form: str, tmp_path: Path) -> None:
    """An export leaves the run's folder behind, and with it the configuration."""
    noisy = "privacy.defence=gaussian privacy.clip=4 privacy.noise=0.5 privacy.unit=sequence"
    folder, _ = trained_run(tmp_path, "llama", noisy)
    taken = export(str(folder), form, tmp_path / "taken")
    again = taken if form == "parts" else export(str(taken), "parts", tmp_path / "2", cut=Cut(1, 1))

    for place in (taken, again / "ends"):
        privacy = find_served(str(place), Cut(1, 1)).privacy
        assert privacy == load_config("demo", noisy).privacy

    for file in tmp_path.rglob("privacy.json"):
        file.write_text(file.read_text().replace("clip", "clop"))
    with pytest.raises(ValueError, match="cannot be read: .*'clop'"):
        find_served(str(taken), Cut(1, 1))


def test_half_of_the_parts_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    place, _ = trained_run(tmp_path, "llama")
    parts = export(str(place), "parts")
    whole = find_served(str(parts))
    assert whole.trunk is not None
    assert whole.ends is not None
    with pytest.raises(ValueError, match=r"does not hold the trunk: `graft export"):
        load_trunk(find_served(str(parts / "ends")))
    with pytest.raises(ValueError, match="does not hold a client's ends"):
        load_ends(find_served(str(parts / "trunk")))
    with pytest.raises(ValueError, match="was cut at 1,1 and cannot be cut at 2,1"):
        find_served(str(parts), Cut(2, 1))

    other = export(str(place), "parts", tmp_path / "other", cut=Cut(2, 1))
    shutil.rmtree(parts / "ends")
    shutil.copytree(other / "ends", parts / "ends")
    with pytest.raises(ValueError, match="are parts of two models"):
        find_served(str(parts))


def test_an_export_starts_another_run(tmp_path: Path) -> None:
    place, want = trained_run(tmp_path, "llama")
    for form in ("adapter", "merged"):
        folder = export(str(place), form)
        config = resolve_model(
            load_config("lora", f"model.path={folder} cut.bottom=2 cut.top=1 lora.rank=2")
        )
        bottom, top = build_client(config)
        close(run([bottom, build_trunk(config), top], ids()), want)
        assert config.model.base == (str(tmp_path / "base") if form == "adapter" else "")


@pytest.mark.slow
def test_a_full_checkpoint_is_a_whole_model(tmp_path: Path) -> None:
    place = test_resume.run(
        test_resume.configured(tmp_path, "train.rounds=1"), InProcessGrid(clients=2)
    )
    again = export(str(place / "checkpoints" / "round-0001"), "merged", license="mit")
    state, left = (load_file(at / "model.safetensors") for at in (again, place / "model"))
    assert state.keys() == left.keys()
    assert all(torch.equal(state[name], left[name]) for name in left)
    assert ModelCard.load(again / "README.md").data.license == "mit"
    with pytest.raises(ValueError, match="is no adapter: weights themselves were trained"):
        export(str(place), "adapter")


def test_a_checkpoint_is_exported_as_the_model_of_its_round(tmp_path: Path) -> None:
    changes = f"{test_resume.LORA} output.keep_checkpoints=4 train.rounds=2 train.bridge=8"
    saved(tmp_path / "base", vocab_size=259)
    config = test_resume.configured(
        tmp_path, f"model.scratch={{}} model.path={tmp_path / 'base'} {changes}"
    )
    place = test_resume.run(config, InProcessGrid(2))

    first = export(str(place), "adapter", number=1)
    last = export(str(place / "checkpoints" / "round-0002"), "adapter", tmp_path / "last")

    left = load_file(place / "model" / "adapter_model.safetensors")
    again = load_file(last / "adapter_model.safetensors")
    assert all(torch.equal(again[name], left[name]) for name in left)
    assert first == place / "exports" / "adapter-round-0001"
    early = load_file(first / "adapter_model.safetensors")
    assert not any(torch.equal(early[name], left[name]) for name in left)
    with pytest.raises(ValueError, match="no checkpoint of round 7: it has 1, 2"):
        export(str(place), "adapter", number=7)

    parts = export(str(place), "parts", number=1)
    bridges = [load_file(at / "bridge.safetensors") for at in (first, parts / "ends", last)]
    assert all(torch.equal(bridges[0][name], bridges[1][name]) for name in bridges[0])
    assert not any(torch.equal(bridges[0][name], bridges[2][name]) for name in bridges[0])
    moved = export(str(place), "parts", tmp_path / "moved", cut=Cut(2, 1))
    assert not (moved / "ends" / "bridge.safetensors").exists()

    card = ModelCard.load(first / "README.md")
    assert card.data.license == "unknown"
    assert card.data.library_name == "peft"
    told = card.data.graft
    assert (told["cut_bottom"], told["rounds"], told["clients"]) == (1, 1, 2)
    summary = json.loads((place / "summary.json").read_text())
    assert 0 < told["tokens"] < summary["tokens"]
    assert str(tmp_path) not in card.text

    (place / "summary.json").unlink()  # as a run leaves it that was killed
    shutil.rmtree(place / "model")
    unfinished = export(str(place), "merged")
    served = find_served(str(last), Cut(1, 1))
    model = AutoModelForCausalLM.from_pretrained(unfinished).eval()
    close(model(ids()).logits, load_whole_model(served)(ids()).logits.detach())
    assert len(folders(place)) == 2


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    saved(tmp_path / "base")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "base")
    base, to, cut = str(tmp_path / "base"), tmp_path / "to", Cut(1, 1)
    with pytest.raises(ValueError, match="give the folder to export to"):
        export(base, "parts", cut=cut)
    to.mkdir()
    (to / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there and not empty: take another --to, or --force"):
        export(base, "parts", to, cut=cut)
    with pytest.raises(ValueError, match="is no export of Graft's, so --force does not remove"):
        export(base, "parts", to, cut=cut, force=True)
    assert (to / "mine.txt").read_text() == "mine"
    (to / "mine.txt").unlink()

    export(base, "parts", to, cut=cut)
    export(base, "merged", to, cut=cut, force=True)

    assert not (to / "trunk").exists()
    with pytest.raises(ValueError, match="is no adapter: .* is a whole model"):
        export(base, "adapter", to, cut=cut, force=True)
    assert (to / "config.json").is_file()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "to"]
    with pytest.raises(ValueError, match="--format is 'peft', must be one of adapter, merged"):
        export(base, "peft", to)


def test_force_removes_no_folder_that_merely_looks_like_a_model(tmp_path: Path) -> None:
    saved(tmp_path / "base")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "base")
    before = sorted(file.name for file in (tmp_path / "base").iterdir())

    with pytest.raises(ValueError, match="is no export of Graft's, so --force does not remove"):
        export(str(tmp_path / "base"), "merged", tmp_path / "base", cut=Cut(1, 1), force=True)

    assert sorted(file.name for file in (tmp_path / "base").iterdir()) == before


def test_a_full_disk_is_said_in_words_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "base")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "base")
    base, to, cut = str(tmp_path / "base"), tmp_path / "to", Cut(1, 1)
    export(base, "merged", to, cut=cut)
    weights = (to / "model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="x cannot be written: Not a directory. Take another --to"):
        export(base, "merged", to / "config.json" / "in" / "x", cut=cut)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="to cannot be written: .*No space left on device"):
        export(base, "merged", to, cut=cut, force=True)

    assert (to / "model.safetensors").read_bytes() == weights
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "to"]
