"""What a node's own configuration and state say: its name, its key, and how it takes part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flwr.app import ConfigRecord, Context, RecordDict

from conf.schema import Config
from flower_app.build import num_blocks
from models.source import find_source
from strategies.engine.policies.registry import find_policy
from strategies.transport import tickets

NODE_KEY = "graft-node-key"
"""Name of the record in `context.state` that holds this node's private key."""


def private_key(state: RecordDict) -> bytes | None:
    """This node's own key, if it was asked for the other half since it was started."""
    if NODE_KEY not in state.config_records:
        return None
    key = state.config_records[NODE_KEY]["private"]
    assert isinstance(key, bytes)
    return key


def public_key(state: RecordDict) -> bytes:
    """What tickets for this node are made for. Its other half never leaves the node."""
    key = private_key(state) or tickets.new_key()
    state[NODE_KEY] = ConfigRecord({"private": key})
    return tickets.public_half(key)


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
        The node's own configuration: `cut-bottom`, `cut-top`, `lora-rank`, `model-path` and, if
        that is an adapter, `model-base` count here. Other keys are left to others.

    Raises
    ------
    ValueError
        If a statement is wrong, or the run cannot serve it.
    """
    config = _with_own_path(config, node)
    if config.privacy.ends != "plain":
        _refuse_own_form(config, node)
    config = _with_own_cut(config, node)
    return _with_own_rank(config, node)


def _refuse_own_form(config: Config, node: Mapping[str, Any]) -> None:
    """Masked ends are added as they are: all have one form."""
    cut = config.cut
    own = {"cut-bottom": cut.bottom, "cut-top": cut.top, "lora-rank": config.lora.rank}
    if odd := [name for name, usual in own.items() if node.get(name, usual) != usual]:
        raise ValueError(
            f"{odd[0]}={node[odd[0]]} in this node's config, while the run has {own[odd[0]]}: the "
            f"server adds ends that it cannot read (privacy.ends={config.privacy.ends}), so all "
            f"have one form; take {odd[0]} out, or use privacy.ends=plain"
        )


def _with_own_path(config: Config, node: Mapping[str, Any]) -> Config:
    path, base = str(node.get("model-path", "")), str(node.get("model-base", ""))
    if not path:
        return config
    if config.model.scratch:
        raise ValueError(
            f"model-path ({path!r}) in this node's config: the run starts from model.scratch, "
            "which every node makes by itself; take model-path out"
        )
    if config.model.base and find_source(path, base).adapter is None:
        raise ValueError(
            f"model-path ({path!r}) in this node's config is no adapter, and the run starts from "
            f"the adapter {config.model.path}: give this node's copy of that, and in model-base "
            "where the base is, unless the adapter says so"
        )
    return replace(config, model=replace(config.model, path=path, base=base))


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
        _refuse_own_bridge(config, bottom, top)
        blocks = num_blocks(config)
        if blocks is not None and bottom + top >= blocks:
            raise ValueError(
                f"cut-bottom={bottom} and cut-top={top} of this node leave no block to the trunk: "
                f"the model has {blocks}; lower one of them"
            )
    return replace(config, cut=replace(cut, bottom=bottom, top=top))


def _refuse_own_bridge(config: Config, bottom: int, top: int) -> None:
    """A bridge leads from one cut to the other: no mean of bridges of several cuts does."""
    if config.train.bridge:
        raise ValueError(
            f"cut-bottom={bottom} and cut-top={top} in this node's config, while the run has "
            f"cut.bottom={config.cut.bottom}, cut.top={config.cut.top} and averages a bridge from "
            f"one to the other (train.bridge={config.train.bridge}): take them out, or start the "
            "run with train.bridge=0"
        )


def _check_shared_blocks(config: Config, end: str, count: int) -> None:
    """Refuse an end with blocks that others have in the trunk, unless they learn there alike."""
    said = f"cut-{end}={count} in this node's config, while the run has cut.{end}"
    if not find_policy(config.train.strategy).replicates:
        raise ValueError(
            f"{said}={getattr(config.cut, end)}: under train.strategy={config.train.strategy} "
            "all clients share one trunk and one cut; use train.strategy=splitfed-v1, or take "
            f"cut-{end} out"
        )
    if config.aggregation.ends != "average":
        raise ValueError(
            f"{said}={getattr(config.cut, end)}: the blocks between would stay at this node and be "
            f"averaged elsewhere, with aggregation.ends={config.aggregation.ends}; take cut-{end} "
            "out, or use aggregation.ends=average"
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
    if config.aggregation.ends != "average":
        raise ValueError(
            f"lora-rank={rank} in this node's config, while the run has lora.rank="
            f"{config.lora.rank}: with aggregation.ends={config.aggregation.ends} all clients have "
            "the run's rank; take lora-rank out, or use aggregation.ends=average"
        )
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
