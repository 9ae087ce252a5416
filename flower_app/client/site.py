"""What one message and one node's own configuration say, and what is built from both."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from flwr.app import ConfigRecord, Context, Message
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from conf.load import from_json, to_json
from conf.schema import Config
from flower_app.build import build_client, describe, num_blocks, set_threads, take_residuals
from flower_app.client import streamed as training
from flower_app.data.client import ClientData, load_client_data
from flower_app.data.text import load_tokenizer
from models import Part, fold_residuals, load_client_state
from strategies.engine.policies.registry import find_policy
from strategies.records import ARRAYS, CONFIG, FRAMES, KEY_LOST, TICKET, from_arrays
from strategies.transport import tickets
from strategies.transport.link import GrpcLink
from strategies.transport.tickets import Ticket

NODE_KEY = "graft-node-key"
"""Name of the record in `context.state` that holds this node's private key."""


class Site:
    """What one message and this node's own configuration say."""

    def __init__(self, message: Message, context: Context) -> None:
        content, self._node, self._state = message.content, context.node_config, context.state
        self._ticket = content.config_records[TICKET]
        self._arrays = content.array_records[ARRAYS]
        shared = from_json(str(content.config_records[CONFIG]["json"]))
        self.config = config = own_config(shared, self._node)
        self.place = training.Place(
            seed=config.seed,
            client=client_name(context),
            round=int(self._ticket["round"]),  # type: ignore[arg-type]
            rounds=int(self._ticket["rounds"]),  # type: ignore[arg-type]
        )
        by_messages = config.link.transport == "messages"
        self.session = str(self._ticket.get("session", "")) if by_messages else ""
        """Under link.transport=messages, what this node's state belongs to; else empty."""
        self.batch_sizes: list[int] = list(self._ticket.get("batch-sizes", []))  # type: ignore[arg-type]
        """Examples of each step as the server drew them; empty without train.global_batch."""
        records = content.config_records
        self.frames: list[bytes] = list(records[FRAMES]["frames"]) if FRAMES in records else []  # type: ignore[arg-type]
        set_threads(config.runtime.client_threads)

    def data(self) -> tuple[ClientData, PreTrainedTokenizerBase]:
        """This node's examples: its own `data-path`, or its partition of the configured data."""
        path = str(self._node.get("data-path", ""))
        if not path and "partition-id" not in self._node:
            raise ValueError(
                "this node has neither data-path nor partition-id; start its SuperNode with "
                "--node-config 'data-path=\"/path/to/data\"'"
            )
        partition = int(self._node.get("partition-id", 0))
        partitions = int(self._node.get("num-partitions", 1))
        # A step takes several messages; within a session the data is what it was.
        load = _data_of_session if self.session else _data_of_session.__wrapped__
        return load(self.session, to_json(self.config), partition, partitions, path)

    def parts(
        self,
        weights: Mapping[str, Tensor] | None = None,
        residuals: Mapping[str, Tensor] | None = None,
    ) -> tuple[Part, Part]:
        """Bottom and top with the federation's current tensors; the initial ones in round 1.

        Given `weights`, all that is trained, and `residuals`, with these.
        """
        if weights is None:
            residuals, weights = take_residuals(from_arrays(self._arrays))
            bottom, top = build_client(self.config)
        elif residuals:
            bottom, top = build_client(self.config)
        else:  # every trained tensor is replaced below: another message's parts will do
            bottom, top = _parts_to_fill(to_json(self.config), threading.get_ident())
        mine, trunk = describe(bottom), str(self._ticket["model"])
        if mine != trunk:
            raise ValueError(
                f"this node's model is {mine}; the trunk was cut from {trunk}. Give both the same "
                "model.path, or this node's copy of it as model-path in --node-config"
            )
        if weights:
            load_client_state(bottom, top, weights)
            fold_residuals((bottom, top), residuals or {})
        return bottom, top

    @property
    def residuals(self) -> dict[str, Tensor]:
        """Those that came with this message."""
        return take_residuals(from_arrays(self._arrays))[0]

    def link(self, steps: int) -> GrpcLink:
        """Open the session that the ticket is for."""
        if NODE_KEY not in self._state.config_records:
            raise ValueError(
                f"{KEY_LOST}: its SuperNode was started anew; it takes part again when the server "
                "has asked it who it is"
            )
        return GrpcLink(
            Ticket.from_record(self._ticket), self._key(), steps=steps, config=self.config.link
        )

    def public_key(self) -> bytes:
        """What tickets for this node are made for. Its other half never leaves the node."""
        if NODE_KEY not in self._state.config_records:
            self._state[NODE_KEY] = ConfigRecord({"private": tickets.new_key()})
        return tickets.public_half(self._key())

    def _key(self) -> bytes:
        key = self._state.config_records[NODE_KEY]["private"]
        assert isinstance(key, bytes)
        return key


@lru_cache(maxsize=64)
def _data_of_session(
    session: str, config: str, partition: int, partitions: int, path: str
) -> tuple[ClientData, PreTrainedTokenizerBase]:
    run = from_json(config)
    tokenizer = load_tokenizer(run.model)
    data = load_client_data(
        run.data,
        tokenizer,
        partition=partition,
        partitions=partitions,
        data_path=path,
        seed=run.seed,
    )
    return data, tokenizer


@lru_cache(maxsize=2)
def _parts_to_fill(config: str, thread: int) -> tuple[Part, Part]:
    """Parts for one thread's use: the next message's weights go into the same ones."""
    return build_client(from_json(config))


def client_name(context: Context) -> str:
    """A name that stays the same from run to run: the node's `name`, its partition, or its id."""
    node = context.node_config
    if "name" in node:
        return str(node["name"])
    if "partition-id" in node:
        return f"client-{node['partition-id']}"
    return f"node-{context.node_id}"


def own_config(config: Config, node: Mapping[str, Any]) -> Config:
    """The run's configuration as this node takes part in it.

    Parameters
    ----------
    config : Config
        The run's. Its cut says where the trunk begins and ends, so a node may keep more blocks, not
        fewer.
    node : mapping
        The node's own configuration: `cut-bottom`, `cut-top`, `lora-rank` and `model-path` count
        here. Other keys are left to others.

    Raises
    ------
    ValueError
        If a statement is wrong, or the run cannot serve it.
    """
    config = _with_own_path(config, str(node.get("model-path", "")))
    config = _with_own_cut(config, node)
    return _with_own_rank(config, node)


def _with_own_path(config: Config, path: str) -> Config:
    if not path:
        return config
    if config.model.scratch:
        raise ValueError(
            f"model-path ({path!r}) in this node's config: the run starts from model.scratch, "
            "which every node makes by itself; take model-path out"
        )
    return replace(config, model=replace(config.model, path=path))


def _with_own_cut(config: Config, node: Mapping[str, Any]) -> Config:
    cut = config.cut
    bottom = _own_count(node, "cut-bottom", cut.bottom, least=0)
    top = _own_count(node, "cut-top", cut.top, least=0)
    if bottom < cut.bottom:
        raise ValueError(
            f"cut-bottom={bottom} in this node's config: the trunk starts at block {cut.bottom}, "
            f"so nobody would hold what lies between; keep {cut.bottom} blocks or more, or start "
            f"the run with cut.bottom={bottom}"
        )
    if top < cut.top:
        raise ValueError(
            f"cut-top={top} in this node's config: the trunk leaves only the last {cut.top} blocks "
            f"to its clients, so nobody would hold what lies between; keep {cut.top} or more, or "
            f"start the run with cut.top={top}"
        )
    for end, count, fewest in (("bottom", bottom, cut.bottom), ("top", top, cut.top)):
        if count > fewest:
            _check_shared_blocks(config, end, count)
    if (bottom, top) != (cut.bottom, cut.top):
        blocks = num_blocks(config)
        if blocks is not None and bottom + top >= blocks:
            raise ValueError(
                f"cut-bottom={bottom} and cut-top={top} of this node leave no block to the trunk: "
                f"the model has {blocks}; lower one of them"
            )
    return replace(config, cut=replace(cut, bottom=bottom, top=top))


def _check_shared_blocks(config: Config, end: str, count: int) -> None:
    """Refuse an end with blocks that others have in the trunk, unless they learn there alike."""
    said = f"cut-{end}={count} in this node's config, while the run has cut.{end}"
    if not find_policy(config.train.strategy).replicates:
        raise ValueError(
            f"{said}={getattr(config.cut, end)}: under train.strategy={config.train.strategy} "
            "all clients share one trunk and one cut; use train.strategy=splitfed-v1, or take "
            f"cut-{end} out"
        )
    mine, trunk = getattr(config.tuning, end), config.tuning.trunk
    if mine != trunk:
        raise ValueError(
            f"{said}={getattr(config.cut, end)}: the blocks between are in this node's {end} and "
            f"in others' trunk, and tuning.{end}={mine} differs from tuning.trunk={trunk}; make "
            f"them alike, or take cut-{end} out"
        )


def _with_own_rank(config: Config, node: Mapping[str, Any]) -> Config:
    rank = _own_count(node, "lora-rank", config.lora.rank, least=1)
    ends = (config.tuning.bottom, config.tuning.top)
    if rank == config.lora.rank or "lora" not in ends:
        return config  # a node may state its rank for all runs, those without adapters too
    if config.aggregation.lora not in ("exact", "svd"):
        raise ValueError(
            f"lora-rank={rank} in this node's config, while the run has lora.rank="
            f"{config.lora.rank}: aggregation.lora={config.aggregation.lora} averages factors of "
            "one rank; use aggregation.lora=exact or svd, or take lora-rank out"
        )
    return replace(config, lora=replace(config.lora, rank=rank))


def _own_count(node: Mapping[str, Any], key: str, default: int, *, least: int) -> int:
    value = node.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{key} in this node's config must be a whole number, {least} or more, got {value!r}"
        )
    return value
