"""The audit finds what leaks, and refuses an attack that it cannot believe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from conf.rules import ConfigError
from conf.schema import Config
from flower_app.data.client import IGNORED
from flower_app.data.tokenizer import load_tokenizer
from flower_app.runs.recorder import Recorder
from flower_app.server_app import run_experiment
from models import Part
from simulations.audit import sentence
from simulations.audit.adaptive import seen_ends
from simulations.audit.attack import TokenAttack, attacks, find_attacks
from simulations.audit.audit import audit
from simulations.audit.begin import find_subject, keep
from simulations.audit.calibrate import attack_all, calibrate_all
from simulations.audit.observation import CLIENT, EXACT, Knowledge, Observation
from simulations.audit.recording import Recording
from simulations.audit.texts import Rarity, classes_of, rouge_l
from simulations.cli.app import app as graft
from simulations.equality.inprocess import InProcessGrid, as_flower_runs_it, read_tensors
from tests.simulations.audit.conftest import SCOPE, record, small


def test_an_undefended_h1_is_read_in_full() -> None:
    told = audit(small(), ["search"], [0], scope=SCOPE)
    found = {(row["knowledge"], row["metric"]): row for row in told["rows"]}
    assert found["exact", "tokens"]["mean"] > 0.99
    assert found["exact", "tokens"]["chance"] < 0.4
    assert found["exact", "tokens"]["count"] > 80
    assert found["pretrained", "tokens"]["mean"] < found["exact", "tokens"]["mean"]
    assert told["calibration"]["search"]["shuffled"] < 0.4
    assert not told["refused"]


class Blind(TokenAttack):
    """Says one token everywhere."""

    reads = ("h1",)
    name = "blind"

    def guess(
        self, observation: Observation, knowledge: Knowledge, rng: np.random.Generator
    ) -> Sequence[Tensor]:
        return [torch.full(each.h1_BTD.shape[:2], 35) for each in observation.crossed]  # type: ignore[union-attr]


class Peeking(TokenAttack):
    """Says what it is to be scored by."""

    reads = ("h1",)
    name = "peeking"

    def run(self, observation, knowledge, truth, rng):  # type: ignore[no-untyped-def]
        self.known = [batch.input_ids for batch in truth.batches]
        return super().run(observation, knowledge, truth, rng)

    def guess(
        self, observation: Observation, knowledge: Knowledge, rng: np.random.Generator
    ) -> Sequence[Tensor]:
        return self.known


@pytest.mark.parametrize(
    ("attack", "why"), [(Blind(), "of a planted leak"), (Peeking(), "on shuffled data")]
)
def test_no_verdict_without_calibration(attack: TokenAttack, why: str) -> None:
    _, refused = calibrate_all([attack], small(), lambda line: None)
    assert "no verdict" in refused[attack.name]
    assert why in refused[attack.name]


def test_an_attack_is_found_by_its_name() -> None:
    assert "search" in attacks()
    with pytest.raises(ConfigError, match="search"):
        find_attacks(["serch"])


def test_kinds_of_tokens_are_told_apart(recording: Recording) -> None:
    knowledge = recording.knowledge(recording.clients[0], EXACT)
    text = "Call Mary on 555 now \u00e9"
    ids_T = torch.tensor(knowledge.tokenizer(text, add_special_tokens=False)["input_ids"])
    kinds = classes_of(ids_T, knowledge.tokenizer, Rarity(knowledge.public, knowledge.vocabulary))
    told = {name: "".join(text[i] for i in range(20) if kept[i]) for name, kept in kinds.items()}
    assert told["numbers"] == "555"
    assert told["names"] == "Mary"
    assert not set("aeo ") & set(told["rare tokens"])
    assert kinds["rare tokens"][-1]


class Halfway(Peeking):
    """Reads the prompt, and nothing of the answer."""

    def run(self, observation, knowledge, truth, rng):  # type: ignore[no-untyped-def]
        self.known = [b.input_ids.masked_fill(b.labels != IGNORED, 0) for b in truth.batches]
        return TokenAttack.run(self, observation, knowledge, truth, rng)


def test_prompt_and_answer_are_counted_apart(chats: Config) -> None:
    recording = record(chats)
    scores = attack_all(Halfway(), recording, EXACT, 0)
    batches = [batch for each in recording.clients for batch in each.truth.batches]
    answers = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    assert (scores["prompt"].value, scores["prompt"].count) == (1.0, tokens - answers)
    assert (scores["answer"].value, scores["answer"].count) == (0.0, answers)
    assert scores["prompt"].chance is not None
    assert 0 < scores["prompt"].chance < 1


def test_h1_tells_prompt_and_answer_and_the_gradient_the_answer(
    chats: Config, recording: Recording
) -> None:
    search, labels = find_attacks(["search", "labels"])
    prompted = record(chats)
    found = attack_all(search, prompted, EXACT, 0)
    assert found["prompt"].value > 0.99
    assert found["answer"].value > 0.99
    found = attack_all(labels, prompted, EXACT, 0)
    assert found["answer"].value > 0.99
    assert "prompt" not in found
    assert not {"prompt", "answer"} & attack_all(labels, recording, EXACT, 0).keys()


def test_rouge_is_the_longest_common_subsequence() -> None:
    assert rouge_l([1, 2, 3, 4], [1, 2, 3, 4]) == 1.0
    assert rouge_l([1, 9, 3], [1, 2, 3, 4]) == pytest.approx(2 * 2 / 7)
    assert rouge_l([7], [1, 2]) == 0.0


def test_an_experiment_and_its_changes_are_found(tmp_path: Path) -> None:
    asked = find_subject("demo", ["cut.bottom=2"])
    assert asked.config.cut.bottom == 2
    assert not asked.trained
    assert asked.folder is None
    path = keep({"rows": []}, None, tmp_path / "new" / "told.json")
    assert path is not None
    assert json.loads(path.read_text()) == {"rows": []}
    assert keep({}, None, None) is None


def test_seeds_that_are_none_are_refused_in_words() -> None:
    result = CliRunner().invoke(graft, ["audit", "demo", "--seeds", "0,x"])
    assert result.exit_code == 2
    assert "--seeds='0,x' is no list of whole numbers" in result.output


def finished(config: Config, parent: Path) -> Path:
    recorder = Recorder(config, say=lambda line: None)
    with as_flower_runs_it():
        recorder.finish(run_experiment(config, InProcessGrid(2, at_once=True), recorder))
    (run,) = parent.iterdir()
    return run


def test_a_run_is_audited_where_it_ended_and_keeps_what_came_of_it(tmp_path: Path) -> None:
    config = small(f"output.folder={tmp_path}", "train.rounds=1", "train.local_steps=2")
    run = finished(config, tmp_path)
    asked = find_subject(str(run), [])
    told = audit(asked.config, ["search"], [0], trained=asked.trained, scope=SCOPE)
    keep(told, asked.folder, None)

    found = {row["knowledge"]: row["mean"] for row in told["rows"] if row["main"]}
    assert found["exact"] > 0.99
    assert told["scope"]["warm"] == 0
    assert json.loads((run / "leakage.json").read_text())["rows"] == told["rows"]
    (head, *_) = json.loads((run / "summary.json").read_text())["leakage"]["found"]
    assert (head["attack"], head["knowledge"], head["metric"]) == ("search", "exact", "tokens")


def test_the_model_of_a_run_is_what_is_audited(tmp_path: Path) -> None:
    config = small(f"output.folder={tmp_path}", "train.rounds=1", "train.local_steps=2")
    run = finished(config, tmp_path)
    saved = read_tensors(run / "model")
    asked = find_subject(str(run), [])
    recording = record(asked.config, replace(SCOPE, warm=0), asked.trained)
    name = next(name for name in recording.round_start if "embed_tokens" in name)
    torch.testing.assert_close(recording.round_start[name], saved[name])
    assert not torch.equal(recording.first[name], saved[name])


def test_one_text_is_sent_as_the_run_sends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the model that the run has left, and with the secret vectors, which the server lacks."""
    seen: list[tuple[Tensor, float]] = []

    def spy(bottom: Part, h1_BTD: Tensor, knowledge: Knowledge) -> Tensor:
        ids_BT = torch.tensor([load_tokenizer(config.model)("abc")["input_ids"][:3]])
        off = float((bottom(ids_BT) - h1_BTD).norm() / h1_BTD.norm())
        seen.append((bottom.model.get_input_embeddings().weight, off))
        return ids_BT

    monkeypatch.setattr(sentence, "search", spy)
    config = small(f"output.folder={tmp_path}", "train.rounds=1", "train.local_steps=2")
    run = finished(config, tmp_path)
    asked = find_subject(str(run), [])
    assert sentence.read_sentence(asked.config, "abc", trained=asked.trained)["found"] == 3
    perturbed = small("privacy.ends=masked", "privacy.perturb=10")
    sentence.read_sentence(perturbed, "abc")
    with pytest.raises(ValueError, match="--text='a' is one token; give a text of two or more"):
        sentence.read_sentence(perturbed, "a")

    torch.testing.assert_close(seen[0][0], read_tensors(run / "model")["model.embed_tokens.weight"])
    assert seen[0][1] < 1e-4
    assert seen[1][1] > 0.5


@pytest.mark.parametrize(
    ("changes", "seen", "by_clients"),
    [
        ((), {"bottom", "top"}, {"bottom", "top"}),
        (("aggregation.ends=local",), set(), set()),
        (("privacy.ends=masked",), set(), {"bottom", "top"}),
    ],
)
def test_what_is_not_seen_is_marked(
    changes: tuple[str, ...], seen: set[str], by_clients: set[str]
) -> None:
    assert seen_ends(small(*changes)) == seen
    assert seen_ends(small(*changes), CLIENT) == by_clients
    told = audit(small(*changes), ["search", "rows"], [0], scope=SCOPE)
    held = {(r["attack"], r["who"], r["knowledge"]): r["held"] for r in told["rows"]}
    assert held["search", "server", "exact"] == held["rows", "server", "public"] == bool(seen)
    assert held["search", "server", "pretrained"]
    assert held["rows", "client", "public"] == bool(by_clients)
    assert {who for name, who, _ in held if name == "search"} == {"server"}
