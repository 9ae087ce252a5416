"""Micro-batches of several members as one batch, which can be run again without some of them.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strategies.engine.bench import Bench
from strategies.engine.checks import has_dropout
from strategies.engine.lane import input_gradient
from strategies.engine.member import Member

MAX_PADDING = 0.25
"""Largest share of a merged batch that padding to its longest member may take."""


@dataclass(frozen=True, kw_only=True)
class Micro:
    """One member's micro-batch."""

    member: Member
    h_BTD: Tensor
    mask_BT: Tensor | None
    wanted: bool = True
    """Whether dL/dh1 will be."""

    @property
    def shape(self) -> tuple[int, int]:
        """B and T."""
        return self.h_BTD.shape[0], self.h_BTD.shape[1]


class Runner:
    """Runs batches through one trunk.

    Parameters
    ----------
    trunk : nn.Module
        What all members share.
    bench : Bench
        Where it runs.
    """

    def __init__(self, trunk: nn.Module, bench: Bench) -> None:
        self._trunk, self._bench = trunk, bench
        self._dropout = has_dropout(trunk)

    def __call__(
        self, h_BTD: Tensor, mask_BT: Tensor, micros: Sequence[Micro], step: int
    ) -> Tensor:
        """The trunk's output; equal micro-batches in equal steps meet equal dropout."""
        mask = None if bool(mask_BT.all()) else mask_BT
        if not self._dropout:
            return self._bench.forward(self._trunk, h_BTD, mask)
        place = (step, "merged", "+".join(micro.member.client for micro in micros))
        # They share the round, whose number any member knows.
        return self._bench.seeded_forward(self._trunk, h_BTD, mask, micros[0].member, *place)


class Batch:
    """One merged forward whose graph waits for its backward.

    Parameters
    ----------
    micros : sequence of Micro
        One of each member.
    step : int
        The group's.
    run : Runner
        What runs it.
    """

    def __init__(self, micros: Sequence[Micro], step: int, run: Runner) -> None:
        self._micros, self._step, self._run = micros, step, run
        longest = max(micro.shape[1] for micro in micros)
        self._rows: dict[Member, tuple[slice, int]] = {}
        self.padded = start = 0
        for micro in micros:
            sequences, tokens = micro.shape
            self._rows[micro.member] = slice(start, start + sequences), tokens
            start += sequences
            self.padded += sequences * (longest - tokens)
        self.positions = start * longest
        self._wanted = {micro.member for micro in micros if micro.wanted}
        h_in_BTD = torch.cat([_padded(micro, longest) for micro in micros])
        self._h_in_BTD = h_in_BTD.requires_grad_(bool(self._wanted))
        self._mask_BT = torch.cat([_padded_mask(micro, longest) for micro in micros])
        self._h_out_BTD: Tensor | None = run(self._h_in_BTD, self._mask_BT, micros, step)
        self._grad_out_BTD = torch.zeros_like(self._h_out_BTD)

    def output(self, member: Member) -> Tensor:
        """A member's rows (B, T, D), detached."""
        assert self._h_out_BTD is not None
        return self._h_out_BTD.detach()[self._place(member)]

    def odd(self) -> set[Member]:
        """Those whose rows are not finite; rows do not touch each other in any trunk we know."""
        assert self._h_out_BTD is not None
        if torch.isfinite(self._h_out_BTD).all():
            return set()
        return {m for m in self._rows if not torch.isfinite(self.output(m)).all()}

    def backward(self, gradients: dict[Member, Tensor], *, later: bool) -> dict[Member, Tensor]:
        """Go back for some of the members; `later` keeps the graph for the others.

        Returns
        -------
        dict
            Gradients with respect to their micro-batches (B, T, D), of those who want them.
        """
        assert self._h_out_BTD is not None
        grad_out_BTD = torch.zeros_like(self._h_out_BTD)
        for member, grad_BTD in gradients.items():
            grad_out_BTD[self._place(member)] = grad_BTD.to(grad_out_BTD)
        self._grad_out_BTD += grad_out_BTD
        answers: dict[Member, Tensor] = {}
        if self._h_out_BTD.requires_grad and gradients:
            torch.autograd.backward(self._h_out_BTD, grad_out_BTD, retain_graph=later)
            wanting = gradients.keys() & self._wanted
            grad_in_BTD = input_gradient(self._h_in_BTD) if wanting else self._h_in_BTD
            answers = {member: grad_in_BTD[self._place(member)] for member in wanting}
        if not later:
            self._h_in_BTD, self._h_out_BTD = self._h_in_BTD.detach(), None
        return answers

    def backward_again(self, members: Collection[Member]) -> None:
        """Add the trunk's gradients of these members alone, as if the others' rows were empty."""
        rows = torch.zeros(len(self._h_in_BTD), 1, 1, dtype=torch.bool, device=self._mask_BT.device)
        for member in members:
            if member in self._rows:
                rows[self._rows[member][0]] = True
        if not rows.any():
            return
        h_BTD = self._h_in_BTD.where(rows, 0.0)
        h_out_BTD = self._run(h_BTD, self._mask_BT, self._micros, self._step)
        if h_out_BTD.requires_grad:
            torch.autograd.backward(h_out_BTD, self._grad_out_BTD.where(rows, 0.0))

    def _place(self, member: Member) -> tuple[slice, slice]:
        rows, tokens = self._rows[member]
        return rows, slice(tokens)


def _padded(micro: Micro, longest: int) -> Tensor:
    return F.pad(micro.h_BTD.detach(), (0, 0, 0, longest - micro.shape[1]))


def _padded_mask(micro: Micro, longest: int) -> Tensor:
    mask_BT = micro.mask_BT
    if mask_BT is None:
        mask_BT = micro.h_BTD.new_ones(micro.shape, dtype=torch.long)
    return F.pad(mask_BT, (0, longest - micro.shape[1]))


def buckets(items: Sequence[Any], shape: Any, most: float = MAX_PADDING) -> list[list[Any]]:
    """Group micro-batches of like length, so that padding stays bounded.

    Parameters
    ----------
    items : sequence
        What is grouped.
    shape : callable
        Gives an item's (B, T).
    most : float
        Largest share of a group's B x longest T that is padding.

    Returns
    -------
    list of list
        Groups of falling length, each in the order given. Greedy: the longest starts a group, and
        ever shorter ones join while the bound holds.
    """
    found: list[list[Any]] = []
    for item in sorted(items, key=lambda item: -shape(item)[1]):
        if found:
            together = [shape(other) for other in (*found[-1], item)]
            room = sum(sequences for sequences, _ in together) * together[0][1]
            if 1 - sum(b * t for b, t in together) / room <= most:
                found[-1].append(item)
                continue
        found.append([item])
    return [sorted(group, key=items.index) for group in found]
