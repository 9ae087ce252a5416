"""A model of a client's own ends and a trunk that is served elsewhere."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conf.schema import LinkConfig
from flower_app.client.defences.registry import make_defence
from flower_app.serving.access import Access, ServedModel, read_access
from flower_app.serving.defended import DefendedTrunk
from flower_app.serving.source import Served, find_served, load_ends, load_tokenizer
from models.remote import join_remote
from strategies.transport.stream.remote import Place, StreamTrunk
from strategies.transport.tickets import Ticket

PATIENCE = LinkConfig(timeout=120.0, grace=60.0)
"""For an answer, and for a server that is out of reach."""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A Hugging Face model whose trunk is elsewhere; a context manager, which leaves the trunk."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    trunk: StreamTrunk
    after: Callable[[], None] = lambda: None
    """What is to be done after that."""

    def close(self) -> None:
        """Leave the trunk."""
        self.trunk.close()
        self.after()

    def __enter__(self) -> Joined:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def connect(
    access: Path | str, ends: Path | str, *, model: str = "", link: LinkConfig = PATIENCE
) -> Joined:
    """Join a client's ends with a trunk that is served.

    Parameters
    ----------
    access : path
        The access file that `graft serve` wrote for this client.
    ends : path or str
        Where bottom and top are: a run, a model, or parts that were exported.
    model : str
        Which of the models served; by default the first.
    link : LinkConfig
        Deadlines.

    Raises
    ------
    ValueError
        If the access file or the ends are none, or not of the model that is served.
    TrunkError
        In words, if the server cannot be reached or refuses.
    """
    allowed = read_access(access)
    told = allowed.model(model)
    served = find_served(str(ends), told.cut)
    _check_same(served, told, str(ends))
    trunk = StreamTrunk(_place(allowed, told.name, served.fingerprint, link))
    trunk.check()
    bottom, top = load_ends(served)
    # A secret of this process: the server has made the client's key.
    defence = make_defence(served.privacy, secrets.token_bytes(32))
    asked = trunk if defence is None else DefendedTrunk(trunk, defence)
    return Joined(
        model=join_remote(bottom, top, asked),
        tokenizer=load_tokenizer(served),
        name=told.name,
        trunk=trunk,
    )


def _place(access: Access, model: str, fingerprint: str, link: LinkConfig) -> Place:
    ticket = Ticket(
        session="",
        address=access.address,
        nonce=access.nonce,
        trunk_key=access.trunk_key,
        certificate=access.certificate.encode(),
    )
    return Place(
        ticket=ticket,
        client=access.client,
        key=access.key,
        model=model,
        fingerprint=fingerprint,
        link=link,
    )


def _check_same(served: Served, told: ServedModel, ends: str) -> None:
    if served.cut != told.cut:
        raise ValueError(
            f"{ends} is cut at {served.cut}, the trunk of '{told.name}' at {told.cut}: use the "
            "ends that belong to it"
        )
    if served.fingerprint != told.fingerprint:
        raise ValueError(
            f"{ends} ({served.description}) is another model than '{told.name}' "
            f"({told.description}), which is served: their weights differ; use the ends of the "
            "same run or export"
        )
