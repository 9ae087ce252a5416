"""A client's session by Flower's messages alone: a part of a step in each, the rest in the state.

The process may end after every message, so whatever the next one needs goes into `context.state`:
weights, the optimizer's moments, gradients between top and bottom, and how far the round is. The
bottom's forward is computed again before its backward, with the same random numbers.

See `strategies.transport.messages` for the server's side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flwr.app import ConfigRecord, Context, MetricRecord, RecordDict
from torch import Tensor

from flower_app.client.ends import Ends
from flower_app.client.plan import Plan
from flower_app.client.site import Site
from flower_app.client.step import Evaluation, Outcome, Step
from flower_app.data.client import Batch
from models import Part, client_state, load_client_state
from strategies.errors import TrunkError
from strategies.records import FRAMES, METRICS, from_arrays, to_arrays
from strategies.transport import trunk_pb2 as pb
from strategies.transport.frames import Frame, read_server_frame, refuse_failure
from strategies.transport.link import Framed, Request

TENSORS, PROGRESS = "graft-tensors", "graft-progress"
"""Names of the records in `context.state`."""

EVALUATED_AT_ONCE = 8
"""Held-out batches in one message."""

NUMBERS = (
    "step", "tokens", "loss", "step-loss", "bytes-up", "bytes-down", "sent",
    "bottom", "top", "all-bottom", "all-top", "all-trunk",
)  # fmt: skip
"""A round's progress, the number of the last frame with it; seconds of its step in each end, and of
all steps before it."""


class Parked:
    """What outlives a message: a round's progress in `context.state`.

    Raises
    ------
    ValueError
        If frames come for a session whose state this node does not have (any more).
    """

    def __init__(self, site: Site, context: Context) -> None:
        self._site, self._state = site, context.state
        self.begun = bool(site.asked.frames)
        self.tensors: dict[str, Tensor] = {}
        self.numbers: dict[str, float] = dict.fromkeys(NUMBERS, 0.0)
        if self.begun:
            self._recall()

    def _recall(self) -> None:
        kept = self._state.config_records.get(PROGRESS, ConfigRecord())
        if kept.get("session") != self._site.session:
            raise ValueError(
                f"this node has no state of session {self._site.session}: its SuperNode was "
                "started anew, or the round was given up"
            )
        self.numbers = {name: float(kept[name]) for name in self.numbers}  # type: ignore[arg-type]
        self.tensors = from_arrays(self._state.array_records[TENSORS])

    def parts(self) -> tuple[Part, Part]:
        """Bottom and top as the last message left them, or as the round begins with them."""
        site = self._site
        if self.begun:
            site.start = self.kept("start")
            return site.parts(self.kept("weight"), self.kept("residual"))
        bottom, top = site.parts()
        self.keep("weight", client_state(bottom, top))
        self.keep("residual", site.residuals)
        self.keep("start", site.start)
        return bottom, top

    def kept(self, kind: str) -> dict[str, Tensor]:
        """The tensors kept under a kind."""
        start = f"{kind}/"
        return {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}

    def keep(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep these tensors under a kind, and no others."""
        others = {n: t for n, t in self.tensors.items() if not n.startswith(f"{kind}/")}
        self.tensors = others | {f"{kind}/{name}": tensor for name, tensor in tensors.items()}

    def put_away(self) -> None:
        """Keep all until the next message."""
        self._state[TENSORS] = to_arrays(self.tensors)
        self._state[PROGRESS] = ConfigRecord({"session": self._site.session, **self.numbers})

    def forget(self) -> None:
        """The round is over."""
        for name in (TENSORS, PROGRESS):
            self._state.pop(name, None)


class Mail(Framed):
    """The frames of one message, and those of its reply.

    Raises
    ------
    TrunkError
        If the trunk has refused something.
    """

    def __init__(self, site: Site, parked: Parked) -> None:
        super().__init__(site.config.link, site.asked.codec_seed)
        self.codecs.load_state_dict(parked.kept("codec"))
        self._numbers = parked.numbers
        self._numbers["bytes-down"] += sum(map(len, site.asked.frames))
        self.frames = [refuse_failure(read_server_frame(raw)) for raw in site.asked.frames]
        # A message answers all that the last one asked.
        self.number = self.taken = int(self._numbers["sent"])
        came = [frame.head.number for frame in self.frames]
        due = list(range(self.number + 1 - len(came), self.number + 1))
        if came != due:
            raise TrunkError(f"answers {came} came, {due} are due", kind="order")
        self.out: list[bytes] = []

    def send(self, request: Request) -> None:
        """Put a frame into the reply."""
        self._numbers["sent"] = request.number
        self._numbers["bytes-up"] += len(request.raw)
        self.out.append(request.raw)

    def take(self, kind: str) -> list[Frame[pb.ServerFrame]]:
        """The frames of one kind that come next."""
        found = []
        while self.frames and self.frames[0].kind == kind:
            found.append(self.frames.pop(0))
            self._numbers["all-trunk"] += getattr(found[-1].head, kind).seconds
        return found


class Training:
    """A client's training round, one message at a time."""

    def __init__(self, site: Site, parked: Parked, bottom: Part, top: Part, plan: Plan) -> None:
        self._parked, self._numbers, self._mail = parked, parked.numbers, Mail(site, parked)
        self._site, self._bottom, self._top, self._plan = site, bottom, top, plan
        self._common = site.config.train.sync == "step"
        self._ends = self._taken_up(site)
        self._step = self._current()

    def answer(self) -> RecordDict:
        """Do what the message's frames make possible."""
        mail, count = self._mail, self._plan.count
        if not mail.frames:
            self._begin()
        while mail.frames:
            for applied in mail.take("applied"):
                self._applied(applied)
            if activations := mail.take("activations"):
                self._across(activations)
            elif gradients := mail.take("gradients"):
                self._down(gradients)
            elif mail.frames:
                kind = mail.frames[0].kind
                raise TrunkError(f"'{kind}' from the trunk in the middle of a round", kind="order")
        if mail.out:
            self._keep()
            return _go_on(self._parked, mail, count)
        tokens = int(self._numbers["tokens"])
        outcome = Outcome(loss=self._numbers["loss"] / max(1, tokens), tokens=tokens, steps=count)
        content = _finish(self._parked, outcome)
        return RecordDict({**content, **self._site.trained(self._bottom, self._top, tokens)})

    def _taken_up(self, site: Site) -> Ends:
        """The ends as they were when the last message was answered."""
        parked, bottom, top = self._parked, self._bottom, self._top
        first = parked.kept("first")
        if first:  # FedProx's anchor is what the ends hold when they are made
            load_client_state(bottom, top, first)
        ends = Ends(bottom, top, self._plan.count, site.config.train, site.place, site.bridge)
        if ends.bridge and (learned := parked.kept("bridge")):
            ends.bridge.load_state_dict(learned)
        if first:
            load_client_state(bottom, top, parked.kept("weight"))
        elif site.config.train.prox:
            parked.keep("first", {n: t.clone() for n, t in client_state(bottom, top).items()})
        ends.set_gradients({int(index): grad for index, grad in parked.kept("gradient").items()})
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parked.kept("moment").items():
            index, _, key = name.partition("/")
            moments.setdefault(int(index), {})[key] = tensor
        ends.load_optimizer_state(moments)
        ends.clock.seconds |= {name: self._numbers[name] for name in ("bottom", "top")}
        return ends

    def _keep(self) -> None:
        """Whatever `_taken_up` and `_current` need."""
        parked, ends = self._parked, self._ends
        if self._step:
            self._numbers["step-loss"] = self._step.total
        self._numbers |= {name: ends.clock.seconds[name] for name in ("bottom", "top")}
        parked.keep("weight", client_state(self._bottom, self._top))
        parked.keep("gradient", {f"{i}": grad for i, grad in ends.kept_gradients().items()})
        moments = {
            f"{index}/{key}": value
            for index, state in ends.optimizer_state().items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
        parked.keep("moment", moments)
        if ends.bridge:
            parked.keep("bridge", ends.bridge.state_dict())

    def _current(self) -> Step | None:
        """The step that is under way; None after the last."""
        number, total = int(self._numbers["step"]), self._numbers["step-loss"]
        if number == self._plan.count:
            return None
        return Step(self._ends, self._mail, number, self._plan[number], total=total)

    def _begin(self) -> None:
        """Send the step's activations; a step without examples is only applied."""
        if not (step := self._step):
            return
        for micro in range(len(step.batches)):
            step.compute(micro)
            step.forget()
        if not step.batches:
            step.apply(0.0)

    def _across(self, replies: Sequence[Frame[pb.ServerFrame]]) -> None:
        step = self._due(replies)
        for micro, reply in enumerate(replies):
            answered = _answered(reply, step.batches[micro], self._bottom)
            step.computed(micro, self._mail.read_activations(answered))

    def _down(self, replies: Sequence[Frame[pb.ServerFrame]]) -> None:
        step, square = self._due(replies), 0.0
        for micro, reply in enumerate(replies):
            answered = _answered(reply, step.batches[micro], self._bottom)
            grad_BTD, square = self._mail.read_gradients(answered)
            step.gradients(micro, grad_BTD)
        step.apply(square)
        if not self._common:
            self._next(step)

    def _applied(self, reply: Frame[pb.ServerFrame]) -> None:
        result, step = self._mail.read_applied(_answered(reply)), self._step
        if step and result.step == step.number:
            step.applied(result)
            self._next(step)
        elif self._common or result.step != self._numbers["step"] - 1:
            raise TrunkError(f"step {result.step} is applied out of turn", kind="order")
        # Else one that the ends took when they asked for it.

    def _next(self, step: Step) -> None:
        numbers = self._numbers
        numbers["loss"] += step.total
        numbers["tokens"] += step.tokens
        numbers["step"] += 1
        numbers["step-loss"] = 0.0
        for name, seconds in self._ends.clock.seconds.items():
            numbers[f"all-{name}"] += seconds
        self._ends.clock.reset()
        self._step = self._current()
        self._begin()

    def _due(self, replies: Sequence[Frame[pb.ServerFrame]]) -> Step:
        """The step under way, to whose micro-batches these must be the answers."""
        bodies = [getattr(reply.head, reply.kind) for reply in replies]
        step, came = self._step, [(body.step, body.micro) for body in bodies]
        due = [(step.number, micro) for micro in range(len(step.batches))] if step else []
        if step is None or came != due:
            raise TrunkError(
                f"the trunk answered (step, micro-batch) {came}, due is {due}", kind="order"
            )
        return step


def evaluate(
    site: Site, parked: Parked, bottom: Part, top: Part, held_out: Sequence[Batch]
) -> RecordDict:
    """Answer a message of an evaluation: some batches go through the trunk in each.

    Raises
    ------
    ValueError
        If there is nothing to evaluate on, or a loss is not finite.
    """
    numbers, mail = parked.numbers, Mail(site, parked)
    total, tokens, done = numbers["loss"], int(numbers["tokens"]), int(numbers["step"])
    evaluation = Evaluation(bottom, top, mail, site.config.train, total=total, tokens=tokens)
    replies = mail.take("activations")
    asked = range(done - len(replies), done)
    if [reply.head.activations.step for reply in replies] != list(asked) or mail.frames:
        raise TrunkError("the trunk answered other held-out batches than it was sent", kind="order")
    for reply, position in zip(replies, asked, strict=True):
        batch = held_out[position]
        answered = _answered(reply, batch, bottom)
        evaluation.computed(position, batch, mail.read_activations(answered))
    following = range(done, min(len(held_out), done + EVALUATED_AT_ONCE))
    for position in following:
        evaluation.compute(position, held_out[position])
    for name, seconds in evaluation.clock.seconds.items():
        numbers[f"all-{name}"] += seconds
    if not following:
        return _finish(parked, evaluation.outcome())
    numbers |= {"loss": evaluation.total, "tokens": evaluation.tokens, "step": following.stop}
    return _go_on(parked, mail, 0)


def _answered(
    reply: Frame[pb.ServerFrame], batch: Batch | None = None, bottom: Part | None = None
) -> Request:
    """A reply beside what is known of its question, which an earlier process has asked."""
    request = Request(b"", reply.kind)
    if batch is not None and bottom is not None:
        request.shape = (*batch.input_ids.shape, bottom.hidden_size)
        request.mask_BT = batch.attention_mask
    request.take(reply)
    return request


def _go_on(parked: Parked, mail: Mail, steps: int) -> RecordDict:
    """Keep the state, and reply with the frames."""
    parked.keep("codec", mail.codecs.state_dict())
    parked.put_away()
    return RecordDict({FRAMES: ConfigRecord({"frames": mail.out, "steps": steps})})


def _finish(parked: Parked, outcome: Outcome) -> RecordDict:
    """Forget the state, and reply with what it amounted to."""
    parked.forget()
    up, down = int(parked.numbers["bytes-up"]), int(parked.numbers["bytes-down"])
    outcome.seconds = {name: parked.numbers[f"all-{name}"] for name in ("bottom", "trunk", "top")}
    return RecordDict({METRICS: MetricRecord(outcome.counters(up, down))})
