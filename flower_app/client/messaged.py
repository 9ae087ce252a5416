"""A client's rounds by Flower's messages alone: a part of a step in each, the rest in the state.

The process may end after every message, so whatever the next one needs goes into `context.state`:
weights, the optimizer's moments, gradients between top and bottom, and how far the round is. The
bottom's forward is computed again before its backward, with the same random numbers.

See `strategies.transport.messages` for the server's side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, MetricRecord, RecordDict
from torch import Tensor

from flower_app.client.ends import Ends, on_device, token_loss
from flower_app.client.plan import Plan
from flower_app.client.site import Site
from flower_app.data.client import Batch
from models import Part, client_state, load_client_state
from strategies.errors import TrunkError
from strategies.optim import autocast
from strategies.records import ARRAYS, FRAMES, METRICS, from_arrays, to_arrays
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.tensors import (
    WIRE_DTYPES,
    decode,
    decode_named,
    encode,
    encode_mask,
    encode_named,
)
from strategies.transport.frames import client_frame, read_server_frame, refuse_failure

TENSORS, PROGRESS = "graft-tensors", "graft-progress"
"""Names of the records in `context.state`."""

EVALUATED_AT_ONCE = 8
"""Held-out batches in one message."""


class Round:
    """What outlives a message: this round's progress in `context.state`.

    Raises
    ------
    ValueError
        If frames come for a session whose state this node does not have (any more).
    """

    def __init__(self, site: Site, context: Context, frames: Sequence[bytes]) -> None:
        self.session, self._site, self._state = site.session, site, context.state
        self.begun = bool(frames)
        self._dtype = WIRE_DTYPES[site.config.link.dtype]
        self.frames = [refuse_failure(read_server_frame(raw)) for raw in frames]
        self.tensors: dict[str, Tensor] = {}
        self.numbers: dict[str, float] = dict.fromkeys(
            ("step", "tokens", "loss", "step-loss", "bytes-up", "bytes-down", "bottom", "top"), 0.0
        )
        self._out: list[bytes] = []
        if frames:
            self._recall()
            self.numbers["bytes-down"] += sum(map(len, frames))

    def _recall(self) -> None:
        kept = self._state.config_records.get(PROGRESS, ConfigRecord())
        if kept.get("session") != self.session:
            raise ValueError(
                f"this node has no state of session {self.session}: its SuperNode was started "
                "anew, or the round was given up"
            )
        self.numbers = {name: float(kept[name]) for name in self.numbers}  # type: ignore[arg-type]
        self.tensors = from_arrays(self._state.array_records[TENSORS])

    def parts(self) -> tuple[Part, Part]:
        """Bottom and top as the last message left them, or as the round begins with them."""
        site = self._site
        if self.begun:
            return site.parts(self.kept("weight/"), self.kept("residual/"))
        bottom, top = site.parts()
        self.keep_weights(bottom, top)
        self.tensors |= {f"residual/{name}": tensor for name, tensor in site.residuals.items()}
        return bottom, top

    def kept(self, prefix: str) -> dict[str, Tensor]:
        """The tensors kept under a prefix."""
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    def keep_weights(self, bottom: Part, top: Part) -> None:
        """Keep all that is trained."""
        self.tensors |= {f"weight/{n}": tensor for n, tensor in client_state(bottom, top).items()}

    def take(self, kind: str) -> list[Any]:
        """The frames of one kind that come next."""
        found = []
        while self.frames and self.frames[0].WhichOneof("body") == kind:
            found.append(getattr(self.frames.pop(0), kind))
        return found

    def send(self, **body: object) -> None:
        """Put a frame into this message."""
        self._out.append(client_frame(**body))

    @property
    def silent(self) -> bool:
        """Whether there is nothing to ask the trunk for."""
        return not self._out

    def compute(self, step: int, micro: int, h_BTD: Tensor, mask_BT: Tensor | None) -> None:
        """Ask for a forward."""
        frame = pb.Compute(step=step, micro=micro, activations=encode(h_BTD, self._dtype))
        if mask_BT is not None:
            frame.mask.CopyFrom(encode_mask(mask_BT))
        self.send(compute=frame)

    def backward(self, step: int, micro: int, grad_BTD: Tensor, *, last: bool, tokens: int) -> None:
        """Ask for a backward."""
        gradient = encode(grad_BTD, self._dtype)
        self.send(
            backward=pb.Backward(
                step=step, micro=micro, gradient=gradient, last=last, tokens=tokens
            )
        )

    def go_on(self, steps: int) -> RecordDict:
        """Keep the state, and reply with the frames."""
        self.numbers["bytes-up"] += sum(map(len, self._out))
        self._state[TENSORS] = to_arrays(self.tensors)
        self._state[PROGRESS] = ConfigRecord({"session": self.session, **self.numbers})
        return RecordDict({FRAMES: ConfigRecord({"frames": self._out, "steps": steps})})

    def finish(self, arrays: Mapping[str, Tensor] | None, steps: int) -> RecordDict:
        """Forget the state, and reply with the round's result."""
        for name in (TENSORS, PROGRESS):
            self._state.pop(name, None)
        tokens = int(self.numbers["tokens"])
        metrics = {
            "num-tokens": tokens,
            "loss": self.numbers["loss"] / max(1, tokens),
            "steps": steps,
            "bytes-up": int(self.numbers["bytes-up"]),
            "bytes-down": int(self.numbers["bytes-down"]),
        }
        content = RecordDict({METRICS: MetricRecord(metrics)})
        if arrays is not None:
            content[ARRAYS] = to_arrays(dict(arrays))
        return content


class Training:
    """A client's training round, one message at a time; the parameters are those of `train`."""

    def __init__(self, site: Site, round: Round, bottom: Part, top: Part, plan: Plan) -> None:
        self._round, self._bottom, self._top, self._plan = round, bottom, top, plan
        self._config = site.config.train
        first = round.kept("first/")
        if first:  # FedProx's anchor is what the ends hold when they are made
            load_client_state(bottom, top, first)
        self._ends = Ends(bottom, top, plan.count, self._config, site.place)
        if first:
            load_client_state(bottom, top, round.kept("weight/"))
        elif self._config.prox:
            weights = client_state(bottom, top)
            round.tensors |= {f"first/{name}": tensor.clone() for name, tensor in weights.items()}
        gradients = round.kept("gradient/")
        self._ends.set_gradients({int(index): tensor for index, tensor in gradients.items()})
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in round.kept("moment/").items():
            index, _, key = name.partition("/")
            moments.setdefault(int(index), {})[key] = tensor
        self._ends.load_optimizer_state(moments)

    def answer(self) -> RecordDict:
        """Do what the message's frames make possible."""
        round, count = self._round, self._plan.count
        if not round.frames:
            self._begin()
        while round.frames:
            for applied in round.take("applied"):
                self._applied(applied)
            if activations := round.take("activations"):
                self._across(activations)
            elif gradients := round.take("gradients"):
                self._down(gradients)
            elif round.frames:
                kind = round.frames[0].WhichOneof("body")
                raise TrunkError(f"'{kind}' from the trunk in the middle of a round", kind="order")
        if round.silent:
            return round.finish(client_state(self._bottom, self._top), count)
        self._keep()
        return round.go_on(count)

    @property
    def _step(self) -> int:
        return int(self._round.numbers["step"])

    def _begin(self) -> None:
        """Send the next step's activations; a step without examples is only applied."""
        step = self._step
        if step == self._plan.count:
            return
        batches = self._plan[step]
        if not batches:
            self._round.send(apply=pb.Apply(step=step))
        for micro, batch in enumerate(batches):
            h1_BTD = self._ends.up(step, micro, batch)
            self._round.compute(step, micro, h1_BTD, self._ends.mask(batch))

    def _across(self, replies: Sequence[pb.Activations]) -> None:
        step, numbers = self._step, self._round.numbers
        batches = self._batches(len(replies))
        tokens = self._ends.count_tokens(step, batches)
        for reply, batch in zip(replies, batches, strict=True):
            h2_BTD = decode(reply.activations, "activations")
            loss, grad_BTD = self._ends.across(step, reply.micro, batch, h2_BTD, tokens)
            numbers["step-loss"] += loss
            last = reply.micro == len(batches) - 1
            self._round.backward(step, reply.micro, grad_BTD, last=last, tokens=tokens)

    def _down(self, replies: Sequence[pb.Gradients]) -> None:
        step, numbers = self._step, self._round.numbers
        batches = self._batches(len(replies))
        for reply, batch in zip(replies, batches, strict=True):
            h1_BTD = self._ends.up(step, reply.micro, batch)
            self._ends.down(h1_BTD, decode(reply.gradient, "gradient"))
        square = self._ends.square_norm()
        tokens = sum(batch.tokens for batch in batches)
        self._count_seconds()
        frame = pb.Apply(
            step=step,
            client_square_norm=square,
            tokens=tokens,
            loss=numbers["step-loss"] / tokens,
            seconds_bottom=numbers["bottom"],
            seconds_top=numbers["top"],
        )
        numbers["loss"] += numbers["step-loss"]
        numbers["tokens"] += tokens
        numbers["step-loss"] = numbers["bottom"] = numbers["top"] = 0.0
        if self._config.sync == "step":
            frame.gradients.extend(encode_named(self._ends.gradients()))
            self._round.send(apply=frame)
            return
        self._round.send(apply=frame)
        self._ends.take_step(step, replies[-1].square_norm + square)
        self._next()

    def _applied(self, reply: pb.Applied) -> None:
        if self._config.sync == "step":
            self._ends.load(decode_named(reply.state))
            self._next()
        elif reply.step == self._step:  # one without examples: the others were counted when sent
            self._next()

    def _next(self) -> None:
        self._round.numbers["step"] += 1
        self._begin()

    def _batches(self, replies: int) -> list[Batch]:
        batches = self._plan[self._step]
        if len(batches) != replies:
            raise TrunkError(
                f"step {self._step} has {len(batches)} micro-batches, the trunk answered {replies}",
                kind="order",
            )
        return batches

    def _count_seconds(self) -> None:
        for name in ("bottom", "top"):
            self._round.numbers[name] += self._ends.clock.seconds[name]
        self._ends.clock.reset()

    def _keep(self) -> None:
        self._count_seconds()
        lasting = ("first/", "residual/")
        kept = {n: t for n, t in self._round.tensors.items() if n.startswith(lasting)}
        kept |= {f"gradient/{i}": tensor for i, tensor in self._ends.kept_gradients().items()}
        for index, moments in self._ends.optimizer_state().items():
            for key, value in moments.items():
                if isinstance(value, Tensor):
                    kept[f"moment/{index}/{key}"] = value
        self._round.tensors = kept
        self._round.keep_weights(self._bottom, self._top)


@torch.no_grad()
def evaluate(
    site: Site, round: Round, bottom: Part, top: Part, held_out: Sequence[Batch]
) -> RecordDict:
    """Answer a message of an evaluation: some batches go through the trunk in each.

    Raises
    ------
    ValueError
        If there is nothing to evaluate on, or a loss is not finite.
    """
    bottom.eval()
    top.eval()
    device = next(bottom.parameters()).device
    for reply in round.take("activations"):
        _, mask, labels = on_device(device, held_out[reply.step])
        with autocast(device, site.config.train.precision):
            h2_BTD = decode(reply.activations, "activations").to(device)
            loss, tokens = token_loss(top(h2_BTD, mask), labels)
        if not torch.isfinite(loss):
            raise ValueError(f"held-out batch {reply.step} has a loss of {float(loss)}")
        round.numbers["loss"] += float(loss)
        round.numbers["tokens"] += tokens
    done = int(round.numbers["step"])
    for position in range(done, min(len(held_out), done + EVALUATED_AT_ONCE)):
        ids, mask, _ = on_device(device, held_out[position])
        with autocast(device, site.config.train.precision):
            round.compute(position, 0, bottom(ids, mask), mask)
        round.numbers["step"] += 1
    if not round.silent:
        return round.go_on(0)
    if not round.numbers["tokens"]:
        raise ValueError(
            "no held-out token to evaluate on; raise data.heldout or data.max_examples"
        )
    return round.finish(None, 0)
