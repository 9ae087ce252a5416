"""Tokens from h1 by a learned inverter, refined by gradient, for who has not the clients' bottom.

After BiSR (Chen et al. 2024, arXiv:2409.00960): a network learns on public text to read h1 of the
bottom that the attacker has, with the noise that is known to be added. What it reads of the
clients' h1 is the beginning of a descent: a mixture of tokens for each position, moved until the
attacker's bottom gives out what crossed. Both are compared axis by axis, each with its own mean and
spread: by so much training has moved them apart.

Shapes: B sequences, T tokens, D hidden size, V vocabulary, K likely tokens, N positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from conf.schema import Config
from models import Part
from simulations.audit.attack import NotApplicable, TokenAttack
from simulations.audit.observation import PUBLIC, START, Crossed, Knowledge, Observation
from simulations.audit.recording import Scope

LEARNED, AT_ONCE, INNER = 400, 1024, 256
"""Steps of the inverter, positions in each, and its inner width."""
TEXTS = 200
"""Of public text, that it learns from."""
REFINED, LIKELY = 40, 64
"""Steps of the descent, over so many tokens of each position."""


class Inverter(TokenAttack):
    """A learned inverter."""

    name = "inverter"
    reads = ("h1",)
    levels: ClassVar[tuple[str, ...]] = (START, PUBLIC)
    finds = 0.6

    def guess(
        self, observation: Observation, knowledge: Knowledge, rng: np.random.Generator
    ) -> Sequence[Tensor]:
        """See `TokenAttack.guess`."""
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        found, readers = [], {}
        for crossed in observation.crossed:
            if crossed.h1_BTD is None:
                raise NotApplicable("no h1 crossed")
            bottom, _ = knowledge.ends(crossed)
            if id(bottom) not in readers:
                readers[id(bottom)] = _learn(bottom, knowledge, generator)
            logits_BTV = _read(readers[id(bottom)], crossed)
            found.append(_refine(bottom, logits_BTV, crossed, knowledge))
        return found

    def planted(self, config: Config, scope: Scope) -> tuple[Config, Scope]:
        """The run's first step: the ends are those that it began with."""
        return config, Scope(clients=1, warm=0, steps=1, sequences=4)


def _learn(bottom: Part, knowledge: Knowledge, generator: torch.Generator) -> nn.Module:
    """A reader of what the attacker's bottom gives out (N, 2 D) -> (N, V)."""
    ids_BT = torch.tensor([list(text) for text in knowledge.public[:TEXTS]])
    with torch.no_grad():
        h1 = [knowledge.sent(bottom(ids)) for ids in ids_BT.split(8)]
    h1_BTD = torch.cat(h1)
    random_BTD = torch.randn(h1_BTD.shape, generator=generator, device="cpu")
    h1_BTD = h1_BTD + knowledge.noise * random_BTD.to(h1_BTD)
    x_ND, y_N = _pairs(_even(h1_BTD, None)).flatten(0, 1), ids_BT.flatten()
    with torch.random.fork_rng([]), torch.device("cpu"):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        reader = nn.Sequential(
            nn.Linear(x_ND.shape[1], INNER), nn.GELU(), nn.Linear(INNER, knowledge.vocabulary)
        )
    reader = reader.to(x_ND.device)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3)
    for _ in range(LEARNED):
        chosen = torch.randint(len(y_N), (AT_ONCE,), generator=generator, device="cpu")
        loss = nn.functional.cross_entropy(reader(x_ND[chosen]), y_N[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return reader


@torch.no_grad()
def _read(reader: nn.Module, crossed: Crossed) -> Tensor:
    """How likely each token is, by position (B, T, V), as logits."""
    assert crossed.h1_BTD is not None
    logits_BTV: Tensor = reader(_pairs(_even(crossed.h1_BTD, crossed.mask_BT)))
    return logits_BTV


def _refine(bottom: Part, logits_BTV: Tensor, crossed: Crossed, knowledge: Knowledge) -> Tensor:
    """Tokens (B, T) whose mixture comes nearest to what crossed, beginning with what was read."""
    assert crossed.h1_BTD is not None
    likely = logits_BTV.topk(min(LIKELY, logits_BTV.shape[-1]))
    wanted_BTD = _even(crossed.h1_BTD, crossed.mask_BT)
    embedding = bottom.model.get_input_embeddings()
    tokens_BTKD = embedding(likely.indices).detach()
    weights_BTK = likely.values.clone().requires_grad_()
    first_BTK = likely.values.softmax(-1)
    optimizer = torch.optim.Adam([weights_BTK], lr=0.1)
    hook = embedding.register_forward_hook(
        lambda module, inputs, output: (weights_BTK.softmax(-1)[..., None] * tokens_BTKD).sum(2)
    )
    try:
        for _ in range(REFINED):
            h1_BTD = knowledge.sent(bottom(likely.indices[..., 0], crossed.mask_BT))
            off = (_even(h1_BTD, crossed.mask_BT) - wanted_BTD).square().mean()
            # What was read is believed unless h1 says otherwise.
            prior = (weights_BTK.log_softmax(-1) * first_BTK).sum(-1).mean()
            (grad_BTK,) = torch.autograd.grad(off - 0.01 * prior, weights_BTK)
            weights_BTK.grad = grad_BTK
            optimizer.step()
    finally:
        hook.remove()
    best_BT1 = weights_BTK.detach().argmax(-1, keepdim=True)
    return likely.indices.gather(-1, best_BT1)[..., 0]


def _even(h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Each axis without its mean, and as wide as any other."""
    real_ND = h_BTD.flatten(0, 1) if mask_BT is None else h_BTD[mask_BT.bool()]
    return (h_BTD - real_ND.mean(0)) / real_ND.std(0).clamp_min(1e-6)


def _pairs(h_BTD: Tensor) -> Tensor:
    """Each position beside the one before (B, T, 2 D)."""
    before_BTD = torch.cat([torch.zeros_like(h_BTD[:, :1]), h_BTD[:, :-1]], 1)
    return torch.cat([h_BTD, before_BTD], -1)
