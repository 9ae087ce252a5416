"""What an attack is, and the registry of those there are: a file each in `attacks/`.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from conf.registry import kinds
from conf.rules import check_known
from conf.schema import Config
from flower_app.data.client import IGNORED, Batch
from simulations.audit.observation import EXACT, SERVER, Knowledge, Observation, Truth
from simulations.audit.recording import Scope
from simulations.audit.shuffled import shuffle
from simulations.audit.texts import Rarity, classes_of, rouge_l


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one attack."""

    value: float
    chance: float | None
    """What who sees nothing would score; None: nobody knows."""
    count: int
    """Tokens, examples or pairs that it is of."""


Scores = Mapping[str, Score]
"""By metric."""


class NotApplicable(Exception):
    """An attack that has nothing to work on in this run, in words."""


class Attack:
    """One way to learn of the clients' data. A subclass gives the names and implements `run`."""

    name: ClassVar[str] = ""
    reads: ClassVar[tuple[str, ...]] = ()
    """What it works on: ``h1``, ``dL/dh2``, ``update``, ``loss``."""
    levels: ClassVar[tuple[str, ...]] = (EXACT,)
    """The knowledge it can use, from most to least."""
    ends: ClassVar[tuple[str, ...]] = ()
    """Which of the clients' trained ends it takes, where it knows more than the run's start."""
    metric: ClassVar[str] = ""
    """The one that speaks for it."""
    finds: ClassVar[float] = 0.95
    """What `metric` must reach on a wire with a planted leak. Fixed before anything is measured."""
    margin: ClassVar[float] = 0.05
    """How far above chance `metric` may be where the truth is shuffled. Fixed alike."""
    plants: ClassVar[tuple[int, ...]] = ()
    """How often each secret that it looks for is planted among what a client trains on."""

    def run(
        self, observation: Observation, knowledge: Knowledge, truth: Truth, rng: np.random.Generator
    ) -> Scores:
        """Attack, then score by the truth, which `guess`, if there is one, does not see.

        Raises
        ------
        NotApplicable
            If the run has nothing of what the attack reads.
        """
        raise NotImplementedError

    @classmethod
    def serves(cls, who: str) -> bool:
        """Whether the server, or another client, has what it reads: clients see no frames."""
        return who == SERVER or set(cls.reads) <= {"update", "loss"}

    def planted(self, config: Config, scope: Scope) -> tuple[Config, Scope]:
        """What is trained of an undefended wire so that the attack must find something."""
        return config, scope

    def shuffled(self, truth: Truth, rng: np.random.Generator) -> Truth:
        """Another truth, of the same kind, of which the observation tells nothing."""
        return shuffle(truth, rng)


class TokenAttack(Attack):
    """An attack whose guess is a token for each position."""

    metric = "tokens"

    def guess(
        self, observation: Observation, knowledge: Knowledge, rng: np.random.Generator
    ) -> Sequence[Tensor]:
        """Token ids (B, T) for each micro-batch; below 0: no guess, and not scored."""
        raise NotImplementedError

    def targets(self, batch: Batch) -> Tensor:
        """What is to be guessed of a batch (B, T); below 0: nothing."""
        return batch.input_ids.masked_fill(batch.attention_mask == 0, -1)

    def run(
        self, observation: Observation, knowledge: Knowledge, truth: Truth, rng: np.random.Generator
    ) -> Scores:
        """See `Attack.run`."""
        crossed = [each.to(knowledge.device) for each in observation.crossed]
        with knowledge.device:  # what an attack makes is there, too
            guesses = self.guess(replace(observation, crossed=crossed), knowledge, rng)
        guesses = [guess_BT.cpu() for guess_BT in guesses]
        targets = [self.targets(batch) for batch in truth.batches]
        scored = list(_scored(guesses, targets, [batch.labels for batch in truth.batches]))
        return score_tokens(scored, knowledge, prompted=any(map(_prompted, truth.batches)))


def _prompted(batch: Batch) -> bool:
    """Whether some of its tokens are read and not learned."""
    return bool(((batch.labels == IGNORED) & batch.attention_mask.bool()).any())


Scored = tuple[Tensor, Tensor, Tensor]
"""Guess and target (T,) of a sequence, and which of its tokens are learned."""


def _scored(
    guesses: Sequence[Tensor], targets: Sequence[Tensor], labels: Sequence[Tensor]
) -> Iterator[Scored]:
    """Each sequence, where there are both guess and target."""
    for batch in zip(guesses, targets, labels, strict=True):
        for guess_T, target_T, labels_T in zip(*batch, strict=True):
            both = (guess_T >= 0) & (target_T >= 0)
            if bool(both.any()):
                yield guess_T[both], target_T[both], labels_T[both] != IGNORED


def score_tokens(
    scored: Sequence[Scored], knowledge: Knowledge, *, prompted: bool = False
) -> Scores:
    """Top-1 recovery: of all tokens, of kinds apart (`classes_of`), and ROUGE-L.

    Parameters
    ----------
    scored : sequence of Scored
        Of each sequence.
    knowledge : Knowledge
        Tokenizer, and the public text that says what is rare and what is common.
    prompted : bool
        Whether prompt (what is not learned) and answer are counted apart, too.
    """
    if not scored:
        raise NotApplicable("no position was attacked")
    rarity = Rarity(knowledge.public, knowledge.vocabulary)
    found: dict[str, list[Tensor]] = {}
    aimed: dict[str, list[Tensor]] = {}
    for guess_T, target_T, learned_T in scored:
        hit_T = guess_T == target_T
        kinds = classes_of(target_T, knowledge.tokenizer, rarity)
        if prompted:
            kinds |= {"prompt": ~learned_T, "answer": learned_T}
        for name, kept_T in kinds.items():
            found.setdefault(name, []).append(hit_T[kept_T])
            aimed.setdefault(name, []).append(target_T[kept_T])
    scores = {}
    for name, hits in found.items():
        hit_N, target_N = torch.cat(hits), torch.cat(aimed[name])
        if len(hit_N):
            scores[name] = Score(
                value=float(hit_N.float().mean()), chance=rarity.chance(target_N), count=len(hit_N)
            )
    rouge = [rouge_l(guess.tolist(), target.tolist()) for guess, target, _ in scored]
    blind = [rouge_l([rarity.commonest] * len(t), t.tolist()) for _, t, _ in scored]
    scores["ROUGE-L"] = Score(
        value=float(np.mean(rouge)), chance=float(np.mean(blind)), count=len(scored)
    )
    return scores


def attacks() -> dict[str, type[Attack]]:
    """Every attack by its name."""
    return kinds("simulations.audit.attacks", Attack)


def find_attacks(names: Sequence[str]) -> list[Attack]:
    """The attacks of these names, all if none is given; `ConfigError` for an unknown one."""
    known = attacks()
    for name in names:
        check_known("--attacks", name, known)
    return [known[name]() for name in names or known]
