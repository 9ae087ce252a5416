"""What `graft parity --all` runs: Graft's own engine and clients, beside plain PyTorch.

A `Federation` is the app without Flower and without a wire: the real trunk engine, the real client
code, the real averaging. `simulations.equality.reference` is what it is compared with.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from conf.schema import Config, TrainConfig
from flower_app.build import take_residuals
from flower_app.client import streamed
from flower_app.client.place import Place
from flower_app.data.client import IGNORED, Batch
from models import (
    Cut,
    Part,
    client_state,
    fold_residuals,
    load_client_state,
    split,
    trainable_state,
    tune,
    tune_whole,
)
from models.cut import ROLES
from simulations.equality.local_link import LocalLink
from simulations.equality.reference import Steps, train_whole
from strategies.aggregate.joint import JointModel
from strategies.aggregate.lora import A_NAME, B_NAME
from strategies.engine.engine import TrunkEngine
from strategies.records import from_arrays
from strategies.rounds.answers import Answer, join

Cohort = Sequence[Steps]
Reference = Callable[[PreTrainedModel, Cohort, TrainConfig, int, int], object]
"""Trains the unsplit model in place for round n of so many."""


@dataclass(frozen=True)
class Gap:
    """What a comparison found."""

    difference: float
    """Largest absolute difference; infinite if names differ or a value is no number."""
    moved: float | None = None
    """Largest change of a weight by training: what the difference is to be measured against."""


@dataclass(frozen=True)
class Client:
    """How a client takes part."""

    cut: Cut
    rank: int


class Federation:
    """Clients around one trunk engine, all in this process.

    Parameters
    ----------
    model : PreTrainedModel
        The unsplit model, untuned; left as it is.
    config : Config
        Cut, tuning, training and aggregation.
    clients : sequence of Client
        All take part in every round.
    allow_untested : bool
        Split a family outside the tested table.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: Config,
        clients: Sequence[Client],
        *,
        allow_untested: bool = False,
    ) -> None:
        self._config, self._clients = config, clients
        self._ends: dict[int, tuple[Part, Part]] = {}
        self.replicas: dict[str, dict[str, Tensor]] = {}
        self._parts = {
            cut: split(model, cut, allow_untested=allow_untested)
            for cut in {cut_of(config), *(client.cut for client in clients)}
        }
        trunk = copy.deepcopy(self._parts[cut_of(config)].trunk)
        self.trunk = _tuned(trunk, config, config.lora.rank)
        self._engine = TrunkEngine(
            trunk, hidden_size=trunk.hidden_size, train=config.train, seed=config.seed
        )
        self.joint = JointModel(self._engine, config)
        if config.train.sync == "step":
            first = client_state(*self.ends(0))
            self.joint.start(first)

    def round(self, cohort: Cohort, number: int) -> None:
        """Train all clients for one round, and average what they trained."""
        self.update(number, self.learn(cohort, number)[1])

    def learn(self, cohort: Cohort, number: int) -> tuple[list[tuple[Part, Part]], list[Answer]]:
        """Train all clients for one round.

        Returns
        -------
        ends : list
            Each client's bottom and top.
        answers : list of Answer
            What each would send. What it trained of the trunk is in `replicas`, by its key.
        """
        config, engine = self._config, self._engine
        engine.open_round(number, config.train.rounds, training=True, cohort=len(cohort))
        names = [f"client-{client}" for client in range(len(cohort))]
        ends = [self.ends(client) for client in range(len(cohort))]
        links = [
            LocalLink(engine.open(name, client=name, steps=len(steps), cut=self._own_cut(client)))
            for client, (name, steps) in enumerate(zip(names, cohort, strict=True))
        ]

        def work(client: int) -> int:
            place = Place(
                seed=config.seed, client=names[client], round=number, rounds=config.train.rounds
            )
            steps, link = cohort[client], links[client]
            try:
                return streamed.train(
                    *ends[client],
                    link,
                    steps,
                    len(steps),
                    config.train,
                    place,
                    window=config.link.window,
                ).tokens
            finally:
                link.close()

        with ThreadPoolExecutor(len(cohort) if config.train.strategy == "merged" else 1) as pool:
            tokens = list(pool.map(work, range(len(cohort))))
        self.replicas, _ = engine.collect(names)
        answers = [
            Answer(key=name, client=name, state=client_state(*own), metrics={"num-tokens": count})
            for name, own, count in zip(names, ends, tokens, strict=True)
        ]
        return ends, answers

    def update(self, number: int, answers: Sequence[Answer]) -> None:
        """Average what the clients trained, as the strategy does it."""
        self.joint.update(number, join(answers, self.replicas))

    def ends(self, client: int) -> tuple[Part, Part]:
        """Bottom and top as a client begins the next round with them."""
        own = self._clients[client]
        arrays = self.joint.arrays_for(own.cut, own.rank)
        residuals, weights = take_residuals(from_arrays(arrays))
        # Residuals are for original weights; otherwise every trained tensor is replaced.
        if residuals or not weights or client not in self._ends:
            parts = self._parts[own.cut]
            # Together, so that a tied embedding stays one tensor.
            self._ends[client] = bottom, top = copy.deepcopy((parts.bottom, parts.top))
            for part in (bottom, top):
                _tuned(part, self._config, own.rank)
        bottom, top = self._ends[client]
        if weights:
            load_client_state(bottom, top, weights)
            fold_residuals((bottom, top), residuals)
        return bottom, top

    def tensors(self) -> dict[str, Tensor]:
        """All that is trained, by name in the whole model."""
        return self.joint.tensors()

    def _own_cut(self, client: int) -> Cut | None:
        cut = self._clients[client].cut
        return None if cut == cut_of(self._config) else cut


def unsplit(model: PreTrainedModel, config: Config) -> PreTrainedModel:
    """A copy of the whole model, tuned as the federation's parts are."""
    modes = {role: getattr(config.tuning, role) for role in ROLES}
    return tune_whole(
        copy.deepcopy(model), modes, cut=cut_of(config), lora=config.lora, seed=config.seed
    )


def side_by_side(
    federation: Federation,
    whole: PreTrainedModel,
    train: TrainConfig,
    cohorts: Sequence[Cohort],
    reference: Reference,
) -> Gap:
    """Train the federation and the unsplit model on the same batches, round by round."""
    first = {name: tensor.clone() for name, tensor in trainable_state(whole).items()}
    for number, cohort in enumerate(cohorts, start=1):
        federation.round(cohort, number)
        reference(whole, cohort, train, number, len(cohorts))
    want = trainable_state(whole)
    return Gap(largest_difference(federation.tensors(), want), largest_difference(first, want))


def fed_prox_round(
    whole: PreTrainedModel, cohort: Cohort, train: TrainConfig, number: int, rounds: int
) -> None:
    """One round of FedProx (Li et al. 2020, arXiv:1812.06127) of unsplit copies, in place.

    Every client's gradient gets mu * (w - w0) before it is clipped; w0 is the round's start.
    """
    plain = replace(train, prox=0.0)
    states, weights = [], []
    for steps in cohort:
        local = copy.deepcopy(whole)
        for parameter in local.parameters():
            if parameter.requires_grad:
                _pull_back(parameter, train.prox)
        weights.append(train_whole(local, steps, plain, number, rounds)[1])
        states.append(trainable_state(local))
    for name, tensor in trainable_state(whole).items():
        terms = [w / sum(weights) * s[name].double() for w, s in zip(weights, states, strict=True)]
        tensor.copy_(torch.stack(terms).sum(0))


def exact_lora(federation: Federation, cohorts: Sequence[Cohort], alpha: float) -> Gap:
    """Do all clients start from the mean of what the clients ended with? Effective weights."""
    worst, moved = 0.0, 0.0
    for number, cohort in enumerate(cohorts, start=1):
        ends, answers = federation.learn(cohort, number)
        tokens = [answer.metrics["num-tokens"] for answer in answers]
        means: dict[str, Tensor] = {}
        for own, answer, count in zip(ends, answers, tokens, strict=True):
            state = {**answer.state, **federation.replicas[answer.key]}
            for name, weight_OI in effective([*own, federation.trunk], state, alpha):
                share = (count / sum(tokens)) * weight_OI
                means[name] = means[name] + share if name in means else share
        federation.update(number, answers)
        for client in range(len(cohort)):
            bottom, top = federation.ends(client)
            # What lies in the client's ends as well as in the trunk is the client's own.
            state = {**trainable_state(federation.trunk), **client_state(bottom, top)}
            for name, weight_OI in effective([bottom, top, federation.trunk], state, alpha):
                worst = max(worst, gap_of(weight_OI, means[name]))
        before = effective(ends[0], {}, alpha)
        moved = max([moved, *(gap_of(weight_OI, means[name]) for name, weight_OI in before)])
    return Gap(worst, moved)


def effective(
    parts: Sequence[Part], state: Mapping[str, Tensor], alpha: float
) -> Iterator[tuple[str, Tensor]]:
    """Each adapted layer's weight with its adapter added, (O, I) in float64.

    Parameters
    ----------
    parts : sequence of Part
        Their base weights count; a layer that an earlier part has is not looked for in a later one.
    state : mapping
        The adapters; a layer without one here has its base weight alone.
    alpha : float
        Of the adapters.
    """
    seen: set[str] = set()
    for part in parts:
        for name, layer in part.model.named_modules():
            if not isinstance(layer, LoraLayer) or name in seen:
                continue
            seen.add(name)
            base = layer.get_base_layer()
            weight_OI = base.weight.detach().double()
            weight_OI = weight_OI.T if isinstance(base, Conv1D) else weight_OI
            if name + B_NAME in state:
                A_rI, B_Or = state[name + A_NAME].double(), state[name + B_NAME].double()
                weight_OI = weight_OI + (alpha / A_rI.shape[0]) * B_Or @ A_rI
            yield name, weight_OI


def random_steps(
    count: int, *, seed: int, vocabulary: int, accumulate: int = 1, padding: str = "right"
) -> list[list[Batch]]:
    """Micro-batches of unequal sizes for `count` steps; `padding` is left, right or none."""
    generator = torch.Generator().manual_seed(seed)

    def batch(sequences: int, tokens: int) -> Batch:
        ids = torch.randint(3, vocabulary, (sequences, tokens), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(sequences if padding != "none" else 0):
            mask[row, slice(tokens - row - 1, None) if padding == "right" else slice(row + 1)] = 0
        # Nothing is predicted from padding, which does not travel.
        learned = mask * F.pad(mask, (1, 0))[:, :-1]
        labels = ids.masked_fill(learned == 0, IGNORED)
        return Batch(input_ids=ids * mask, attention_mask=mask, labels=labels)

    return [
        [batch(2 + (step + micro) % 2, 8 + micro + seed % 3) for micro in range(accumulate)]
        for step in range(count)
    ]


def largest_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Over all tensors, by name; infinite if names differ or a value is no number."""
    if one.keys() != other.keys():
        return math.inf
    return max((gap_of(tensor, other[name]) for name, tensor in one.items()), default=0.0)


def gap_of(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference of two tensors; infinite if it is no number."""
    if one.shape != other.shape:
        return math.inf
    gap = float((one.detach().double() - other.detach().double()).abs().max())
    return math.inf if math.isnan(gap) else gap


def cut_of(config: Config) -> Cut:
    """The run's own cut."""
    return Cut(bottom=config.cut.bottom, top=config.cut.top)


def _tuned(part: Part, config: Config, rank: int) -> Part:
    lora = replace(config.lora, rank=rank)
    return tune(part, getattr(config.tuning, part.role), lora=lora, seed=config.seed)


def _pull_back(parameter: nn.Parameter, mu: float) -> None:
    first = parameter.detach().clone()

    def pull(own: Tensor) -> None:
        assert own.grad is not None
        own.grad.add_(own.detach() - first, alpha=mu)

    parameter.register_post_accumulate_grad_hook(pull)
