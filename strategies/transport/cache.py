"""Activations of examples that both sides keep, so that less crosses when they come again.

A bottom that learns nothing makes the same h1 of an example each time: it crosses once, and is
named afterwards. What the trunk makes of it changes little from epoch to epoch: h2 crosses as its
difference to the h2 that the client has had before.

Shapes: B sequences, T tokens, D hidden size; n tokens of one row that are no padding.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.codec import Codec
from strategies.transport.codec.registry import Crossings, find_codec
from strategies.transport.payload import Parcel, Payload
from strategies.transport.rows import (
    NAME,
    decode_rows,
    encode_rows,
    first_of_each,
    from_bits,
    names_of,
    split_names,
    to_bits,
    tokens_of,
)

logger = logging.getLogger(__name__)

MOST_CHANGED = 0.15
"""Of a row's energy: what has changed by more (the median over an example's rows) is written whole,
for the codec of differences would lose more of it than the other one does."""


@dataclass(frozen=True, eq=False)
class Kept:
    """An h2 as the client has it."""

    h2_nD: Tensor
    tag: int
    """Stands for all that it was made from."""


class Cache:
    """What one side has kept of one client's examples, by their names.

    What is kept stays: the examples of an epoch come in another order each time, and throwing out
    the oldest would throw out what comes next.

    Parameters
    ----------
    limit : int
        Most bytes of tensors.
    """

    def __init__(self, limit: int) -> None:
        self.h1: dict[bytes, Tensor] = {}
        self.h2: dict[bytes, Kept] = {}
        self.tensors = 1
        """That are kept of an example."""
        self._room, self._held = limit, dict[bytes, int]()
        self._lock = threading.Lock()

    def reserve(self, name: bytes, tensor_nD: Tensor) -> bool:
        """Whether there is room for all that is kept of an example, now and later, of which this is
        one tensor."""
        tokens, size = len(tensor_nD), self.tensors * 4 * tensor_nD.numel()
        with self._lock:  # a session that is being given up may still be at work
            # What takes no room would be kept without end.
            if name not in self._held and 0 < size <= self._room:
                self._room -= size
                self._held[name] = tokens
            return self._held.get(name) == tokens

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Every h2, and its tag, by the example's name in hex."""
        found = {name.hex(): kept for name, kept in self.h2.items()}
        return {n: k.h2_nD for n, k in found.items()}, {n: k.tag for n, k in found.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor], tags: Mapping[str, int]) -> None:
        """Go on from a `state_dict`."""
        for name, h2_nD in tensors.items():
            if self.reserve(bytes.fromhex(name), h2_nD):
                self.h2[bytes.fromhex(name)] = Kept(h2_nD, tags[name])


class TrunkCache:
    """The trunk's half of one session.

    Parameters
    ----------
    cache : Cache
        Of the session's client; it outlives the session.
    codecs : Crossings
        Of the session, and the cache's own: they decode.
    """

    def __init__(self, cache: Cache, codecs: Crossings) -> None:
        self._cache, self._codecs, self._changes = cache, codecs, _Changes(codecs.h2)
        cache.tensors = 2 if self._changes.name else 1

    def names(self) -> bytes:
        """Of the examples whose h1 is kept."""
        return b"".join(self._cache.h1)

    def read_h1(self, frame: pb.Compute, mask_BT: Tensor | None, payload: Payload) -> Tensor:
        """h1 (B, T, D) of a frame: rows that came, and rows that were kept.

        Raises
        ------
        TrunkError
            If the names, bits or tags are not one for each row, or a row that is not here, or has
            another length, is said to be known.
        """
        B, T, D = frame.activations.shape
        names, known_B = names_of(frame.names, B), from_bits(frame.known, B)
        if frame.tags and len(frame.tags) != B:
            raise TrunkError(f"{len(frame.tags)} tags came with {B} rows", kind="shape")
        whole_BT = tokens_of(mask_BT, B, T)
        rows = {}
        for row in known_B.nonzero()[:, 0].tolist():
            kept, length = self._cache.h1.get(names[row]), int(whole_BT[row].sum())
            if kept is None or tuple(kept.shape) != (length, D):
                there = "is not kept here" if kept is None else f"has {len(kept)} tokens here"
                raise TrunkError(
                    f"row {row} of {length} tokens names an example that {there}", kind="shape"
                )
            rows[row] = kept
        h1_BTD = decode_rows(
            self._codecs.h1, frame.activations, whole_BT & ~known_B[:, None], payload, "activations"
        )
        for row, kept in rows.items():
            h1_BTD[row, whole_BT[row]] = kept
        for row, name in enumerate(names):
            self._keep(name, h1_BTD[row, whole_BT[row]])
        return h1_BTD

    def write_h2(
        self,
        frame: pb.Compute,
        h2_BTD: Tensor,
        mask_BT: Tensor | None,
        codec: Codec,
        parcel: Parcel,
    ) -> dict[str, Any]:
        """h2 (B, T, D) for the answer's fields: rows as changes where the client can read them.

        `codec` is the session's, which encodes; what the client will read is kept here as well.
        """
        B, T, _ = h2_BTD.shape
        h2_BTD, whole_BT = h2_BTD.detach().float().cpu(), tokens_of(mask_BT, B, T)
        names, tags = names_of(frame.names, B), list(frame.tags) or [0] * B
        changed_B, before_BTD = torch.zeros(B, dtype=torch.bool), torch.zeros_like(h2_BTD)
        for row in first_of_each(names) if self._changes.name else ():
            kept, here_T = self._cache.h2.get(names[row]), whole_BT[row]
            if kept is None or kept.tag != tags[row] or len(kept.h2_nD) != int(here_T.sum()):
                continue
            h2_nD = h2_BTD[row, here_T]
            share_n = (h2_nD - kept.h2_nD).square().sum(1) / h2_nD.square().sum(1).clamp_min(1e-30)
            if float(share_n.median()) <= MOST_CHANGED:
                before_BTD[row, here_T], changed_B[row] = kept.h2_nD, True
        place = frame.step, frame.micro
        fields: dict[str, Any] = {
            "activations": encode_rows(
                codec, h2_BTD, whole_BT & ~changed_B[:, None], place, parcel
            ),
            "kept": to_bits([name in self._cache.h1 for name in names]),
        }
        if changed_B.any():
            fields["changed"] = to_bits(changed_B.tolist())
            fields["changes"] = encode_rows(
                self._changes.sender,
                h2_BTD - before_BTD,
                whole_BT & changed_B[:, None],
                place,
                parcel,
            )
        if self._changes.name:
            answer = pb.Activations(**fields)
            payload = Payload(b"".join(parcel.parts))
            self._changes.read(self._cache, answer, names, tags, whole_BT, payload)
        return fields

    def _keep(self, name: bytes, h1_nD: Tensor) -> None:
        """Keep an example's h1 if it and its h2 fit."""
        if name not in self._cache.h1 and self._cache.reserve(name, h1_nD):
            self._cache.h1[name] = h1_nD.float().clone()


class ClientCache:
    """The client's half of one session.

    Parameters
    ----------
    cache : Cache
        Of this client; h2 only.
    codecs : Crossings
        Of the session, and the cache's own: they decode.
    """

    def __init__(self, cache: Cache, codecs: Crossings) -> None:
        self.cache, self._changes = cache, _Changes(codecs.h2)
        self._known: set[bytes] = set()

    def begin(self, opened: pb.Opened) -> None:
        """Take note of what the trunk has kept; `TrunkError` if that cannot be read."""
        if len(opened.names) % NAME:
            raise TrunkError(f"{len(opened.names)} bytes of names came", kind="shape")
        self._known, own = set(split_names(opened.names)), self.cache.h2.keys()
        if own and not self._known & own:
            logger.info("the trunk has kept nothing of this client's examples: all cross once more")
        elif self._known and self._changes.name and not own:
            logger.info("this client has kept nothing of its examples: h2 crosses once more")

    def write_h1(
        self,
        h1_BTD: Tensor,
        mask_BT: Tensor | None,
        names: Sequence[bytes],
        codec: Codec,
        place: tuple[int, int],
        parcel: Parcel,
    ) -> dict[str, Any]:
        """h1 (B, T, D) for the frame's fields, without the rows that the trunk has kept."""
        B, T, _ = h1_BTD.shape
        known_B = torch.tensor([name in self._known for name in names])
        sent_BT = tokens_of(mask_BT, B, T) & ~known_B[:, None]
        kept = (self.cache.h2.get(name) for name in names)
        return {
            "activations": encode_rows(codec, h1_BTD, sent_BT, place, parcel),
            "names": b"".join(names),
            "known": to_bits(known_B.tolist()),
            "tags": [each.tag if each else 0 for each in kept],
        }

    def read_h2(
        self,
        answer: pb.Activations,
        names: Sequence[bytes],
        tags: Sequence[int],
        mask_BT: Tensor | None,
        payload: Payload,
    ) -> Tensor:
        """h2 (B, T, D) of an answer to a frame with these names and tags.

        Raises
        ------
        TrunkError
            If what came is not one for each row, or a change to what is not here.
        """
        B, T, _ = answer.activations.shape
        kept_B = from_bits(answer.kept, B)
        self._known.update(name for name, kept in zip(names, kept_B.tolist(), strict=True) if kept)
        whole_BT = tokens_of(mask_BT, B, T)
        return self._changes.read(self.cache, answer, names, tags, whole_BT, payload)


class _Changes:
    """How h2 is read with a cache: the same on both sides, for both keep what it comes to."""

    def __init__(self, whole: Codec) -> None:
        self._whole = whole
        self.name = whole.difference
        """Of the codec of differences; empty: h2 is neither kept nor compared."""
        kind = find_codec(self.name or whole.name)
        self.sender, self._reader = kind(whole.seed), kind(whole.seed)

    def read(
        self,
        cache: Cache,
        answer: pb.Activations,
        names: Sequence[bytes],
        tags: Sequence[int],
        whole_BT: Tensor,
        payload: Payload,
    ) -> Tensor:
        """h2 (B, T, D), which is kept where there is room."""
        B = len(names)
        changed_B, what = from_bits(answer.changed, B), "the trunk's output"
        h2_BTD = decode_rows(
            self._whole, answer.activations, whole_BT & ~changed_B[:, None], payload, what
        )
        if changed_B.any():
            if tuple(answer.changes.shape) != tuple(answer.activations.shape):
                raise TrunkError(
                    f"{what}: changes came with shape {tuple(answer.changes.shape)}, the whole has "
                    f"{tuple(answer.activations.shape)}",
                    kind="shape",
                )
            h2_BTD += decode_rows(
                self._reader, answer.changes, whole_BT & changed_B[:, None], payload, what
            )
        if not self.name:
            return h2_BTD
        data = b"".join(
            payload.of(each, what) for each in (answer.activations, answer.changes) if each.size
        )
        for row in range(B):
            if not changed_B[row]:
                continue
            kept, here_T = cache.h2.get(names[row]), whole_BT[row]
            if kept is None or kept.tag != tags[row] or len(kept.h2_nD) != int(here_T.sum()):
                raise TrunkError(f"{what}: row {row} changes what is not kept here", kind="shape")
            h2_BTD[row, here_T] += kept.h2_nD
        for row in first_of_each(names):
            h2_nD = h2_BTD[row, whole_BT[row]]
            if cache.reserve(names[row], h2_nD):
                before = tags[row].to_bytes(8, "little") if changed_B[row] else b""
                tag = xxhash.xxh3_64_intdigest(names[row] + before + data) or 1
                cache.h2[names[row]] = Kept(h2_nD.clone(), tag)
        return h2_BTD
