"""The one place where what clients say is checked, before any of it counts.

Each reader is given what the server knows of the client that was asked: its profile, the form of
what it trains, and what the trunk has seen of it. It returns what may be believed, or raises a
`ValueError` that says in words why nothing is: this costs the client that said it, and nobody else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from torch import Tensor

from conf.schema import Config
from models import Cut
from strategies.aggregate.aggregator import find_aggregator
from strategies.aggregate.masked import CHECK_BYTES, NONCE_BYTES, Masked
from strategies.aggregate.state import Contribution
from strategies.records import ARRAYS, KEY_LOST, MASK, METRICS, OUTCOME, PROFILE, Form, read_arrays
from strategies.transport.tickets import is_usable

COUNTERS = (
    "num-tokens", "loss", "steps", "bytes-up", "bytes-down", "peak-memory-mb",
    "seconds-bottom", "seconds-network", "seconds-trunk", "seconds-top",
)  # fmt: skip
"""What the metrics of an answer hold: finite numbers, none below 0."""

MOST = {"loss": 1e6, "peak-memory-mb": 1e8} | {
    name: 1e8 for name in COUNTERS if name.startswith("seconds-")
}
"""Largest counters that are believed; all others below 2**53, up to which floats count."""

MOST_EXAMPLES = 10_000_000
LONGEST_NAME, LONGEST_REASON = 100, 500
"""Characters: both end up in logs and records."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a client tells of itself: its name, its own cut and rank, and its training examples.

    `examples` is 0 where nobody needs to know: to count them means to load the data. `public_key`
    is what its tickets are made for.
    """

    node: int
    client: str
    bottom: int
    top: int
    rank: int
    examples: int = 0
    public_key: bytes = b""
    key_check: bytes = b""
    """Of its site key, with `privacy.ends=masked`."""

    @property
    def cut(self) -> Cut:
        """Where its ends begin and end."""
        return Cut(bottom=self.bottom, top=self.top)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a profile may say in this run."""

    blocks: int
    """Of the whole model."""
    width: int
    """Of the activations: adapters of a higher rank add nothing."""
    own_cut: bool
    """Whether a client may keep more blocks than the run's cut says."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the trunk knows of a session: tokens and optimizer steps it took part in."""

    tokens: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one client answered, and may be believed."""

    key: str
    client: str
    state: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    masked: Masked | None = None
    """Its ends, with `privacy.ends=masked`; `state` is empty then."""


def join(
    answers: Sequence[Answer], replicas: Mapping[str, Mapping[str, Tensor]]
) -> list[Contribution]:
    """Join each client's ends with its replica of the trunk, by session key, if it has one."""
    return [
        Contribution(
            answer.client,
            answer.metrics["num-tokens"],
            {**answer.state, **replicas.get(answer.key, {})},
            answer.masked,
        )
        for answer in answers
    ]


def is_keyless(reply: Message) -> bool:
    """Whether a node says that it has lost the key that its ticket was made for."""
    if reply.has_error():
        return False
    outcome: Mapping[str, Any] = reply.content.config_records.get(OUTCOME, {})
    return KEY_LOST in str(outcome.get("error", ""))


def read_outcome(reply: Message) -> str:
    """The name under which a client answers.

    Raises
    ------
    ValueError
        With the reason why it has no result, its own or Flower's.
    """
    if reply.has_error():
        raise ValueError(_line(reply.error.reason or f"Flower's error {reply.error.code}"))
    outcome: Mapping[str, Any] = _record(reply.content.config_records, OUTCOME)
    error, name = outcome.get("error"), outcome.get("client")
    if not isinstance(error, str):
        raise ValueError(f"its reply is not one of Graft's: error={error!r:.80}")
    if error:
        raise ValueError(_line(error))
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise ValueError(f"it says it is called {name!r:.100}")
    return name


def read_profile(node: int, reply: Message, config: Config, bounds: Bounds) -> Profile:
    """Read what a node says of itself; `bounds` are those of the run's model."""
    name = read_outcome(reply)
    told: Mapping[str, Any] = _record(reply.content.config_records, PROFILE)
    for key, (least, most) in _ranges(config, bounds).items():
        value = told.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{name} says {key}={value!r:.80}; {least} to {most} can be")
    bottom, top = told["cut-bottom"], told["cut-top"]
    if bottom + top >= bounds.blocks:
        raise ValueError(
            f"{name} says cut-bottom={bottom} and cut-top={top}; the model has {bounds.blocks} "
            "blocks, and one must be left to the trunk"
        )
    if not is_usable(told.get("public-key")):
        raise ValueError(
            f"{name} shows no key to make its tickets for; run the same release of Graft there"
        )
    return Profile(
        node=node,
        client=name,
        bottom=bottom,
        top=top,
        rank=told["lora-rank"],
        examples=told["examples"],
        public_key=told["public-key"],
        key_check=_key_check(name, told) if config.privacy.ends == "masked" else b"",
    )


def _key_check(name: str, told: Mapping[str, Any]) -> bytes:
    check = told.get("key-check")
    if not isinstance(check, bytes) or len(check) != CHECK_BYTES:
        raise ValueError(f"{name} shows key-check={check!r:.80}; {CHECK_BYTES} bytes are due")
    return check


def _ranges(config: Config, bounds: Bounds) -> dict[str, tuple[int, int]]:
    """Least and most of what a profile's numbers can be."""
    cut, rank = config.cut, config.lora.rank
    # Ends of their own are of one form, as masked ones.
    alike = config.aggregation.ends == "average" and config.privacy.ends == "plain"
    any_rank = alike and find_aggregator(config.aggregation.lora).by_product
    own_cut = alike and bounds.own_cut and not config.train.bridge
    most = bounds.blocks - 1
    return {
        "cut-bottom": (cut.bottom, most if own_cut else cut.bottom),
        "cut-top": (cut.top, most if own_cut else cut.top),
        "lora-rank": (1, max(rank, bounds.width)) if any_rank else (rank, rank),
        "examples": (0, config.data.max_examples or MOST_EXAMPLES),
    }


def read_first_tensors(reply: Message, profile: Profile, form: Form) -> dict[str, Tensor]:
    """Read the tensors that a client starts from."""
    _check_name(read_outcome(reply), profile)
    return read_arrays(_record(reply.content.array_records, ARRAYS), form)


def read_trained(reply: Message, profile: Profile, key: str, form: Form, seen: Seen) -> Answer:
    """Read the answer of a client that trained.

    Parameters
    ----------
    reply : Message
        As received.
    profile : Profile
        Of the client that was asked.
    key : str
        Of its session.
    form : mapping
        Names and shapes of what it trains.
    seen : Seen
        What the trunk did for it. Its tokens are its weight in the mean.
    """
    _check_name(read_outcome(reply), profile)
    metrics = _read_metrics(reply)
    for name, count in (("num-tokens", seen.tokens), ("steps", seen.steps)):
        if metrics[name] != count:
            raise ValueError(
                f"it reports {name}={metrics[name]:g} of training, the trunk has applied {count}"
            )
    arrays = _record(reply.content.array_records, ARRAYS)
    if not profile.key_check:
        state = read_arrays(arrays, form)
        return Answer(key=key, client=profile.client, state=state, metrics=metrics)
    masked = _read_masked(reply, profile, read_arrays(arrays, form, masked=True))
    return Answer(key=key, client=profile.client, metrics=metrics, masked=masked)


def _read_masked(reply: Message, profile: Profile, tensors: Mapping[str, Tensor]) -> Masked:
    record: Mapping[str, Any] = _record(reply.content.config_records, MASK)
    nonce, check = record.get("nonce"), record.get("check")
    if not isinstance(nonce, bytes) or len(nonce) != NONCE_BYTES:
        raise ValueError(f"its mask has nonce={nonce!r:.80}; {NONCE_BYTES} bytes are due")
    if check != profile.key_check:
        raise ValueError("its ends are masked with another site key than it had when it was asked")
    return Masked(nonce, profile.key_check, tensors)


def read_evaluated(reply: Message, profile: Profile, key: str, seen: Seen) -> Answer:
    """Read the answer of a client that evaluated; it may not weigh more than the trunk has seen."""
    _check_name(read_outcome(reply), profile)
    metrics = _read_metrics(reply)
    if metrics["num-tokens"] > seen.tokens:
        raise ValueError(
            f"it reports {metrics['num-tokens']:g} held-out tokens, the trunk has seen "
            f"{seen.tokens}"
        )
    return Answer(key=key, client=profile.client, metrics=metrics)


def _read_metrics(reply: Message) -> dict[str, float]:
    record: Mapping[str, Any] = _record(reply.content.metric_records, METRICS)
    metrics = {}
    for name in COUNTERS:
        value = record.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"it reports {name}={value!r:.80}")
        if not math.isfinite(value) or not 0 <= value < MOST.get(name, 2.0**53):
            raise ValueError(f"it reports {name}={value:g}")
        metrics[name] = float(value)
    if metrics["num-tokens"] < 1:
        raise ValueError("it reports no token")
    return metrics


def _check_name(name: str, profile: Profile) -> None:
    if name != profile.client:
        raise ValueError(
            f"it answers as '{name}' and was '{profile.client}' when it was asked who it is"
        )


def _record(records: Mapping[str, Any], name: str) -> Any:
    if name not in records:
        raise ValueError(f"its reply is not one of Graft's: it has no record '{name}'")
    return records[name]


def _line(reason: str) -> str:
    """A stranger's words as one line of bounded length."""
    text = "".join(each if each.isprintable() else " " for each in reason[: LONGEST_REASON + 1])
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."
