"""One training run over a watched link, and its held-out loss with the codec and without."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from transformers import PreTrainedModel

from conf.load import from_json, to_json
from conf.schema import AggregationConfig, Config, LinkConfig, PrivacyConfig, TuningConfig
from flower_app.build import build_whole, cut_of, start
from flower_app.client import streamed
from flower_app.client.defences.defence import defend
from flower_app.client.defences.registry import make_defence
from flower_app.client.perturbed import perturb
from flower_app.client.place import Place
from flower_app.client.plan import Plan, padding_id
from flower_app.client.site_key import SiteKey
from flower_app.data.client import Batch, Example, batches, load_client_data, load_tokenizer
from models import Parts, split
from simulations.equality.fold import fold
from simulations.study.codecs.settings import BASE, Condition, Mix, parse_mix
from simulations.study.codecs.watched import WatchedLink
from strategies.engine.engine import TrunkEngine

CLIENT = "client-0"
SECRET = b"of the study's one client"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a line of `runs.jsonl` holds."""

    condition: Mapping[str, Any]
    codec: str
    seed: int
    crossings: Mapping[str, Mapping[str, float]]
    """`Crossing.summary` of the training session."""
    bytes_per_token: float
    """Of whole frames, both ways."""
    tokens: int
    """That crossed in training; padding does not count."""
    loss_start: float | None
    """Held-out, before training; of the base alone."""
    loss_without: float
    """Held-out, after training, evaluated in fp32."""
    loss_with: float
    """The same, evaluated through the codec."""
    heldout_tokens: int
    seconds: float


def train(condition: Condition, mix: Mix, seed: int) -> Run:
    """Train and evaluate once; the same arguments give the same losses.

    Parameters
    ----------
    condition : Condition
        What is trained.
    mix : Mix
        The codecs; the start, the data and their order do not depend on them.
    seed : int
        Of the run's configuration.
    """
    started, config = time.perf_counter(), condition.config(seed)
    examples, heldout = _data(config, condition.examples, condition.heldout)
    parts = _parts(config, condition.before)
    engine = _engine(parts, config)
    pad_id = padding_id(parts.bottom, load_tokenizer(config.model))
    held = list(batches(heldout, condition.batch_size, pad_id=pad_id))
    base = parse_mix(BASE)
    before = _loss(engine, parts, base, held, config) if mix == base else None
    plan = Plan(examples, config, _place(config), pad_id=pad_id)
    link = _train(engine, parts, mix, plan, config)
    without = _loss(engine, parts, base, held, config)
    crossed = link.watch.crossings["h1"].elements // parts.trunk.hidden_size
    return Run(
        condition=asdict(condition),
        codec=mix.name,
        seed=seed,
        crossings=link.summary(),
        bytes_per_token=(link.bytes_up + link.bytes_down) / crossed,
        tokens=crossed,
        loss_start=before,
        loss_without=without,
        loss_with=without if mix == base else _loss(engine, parts, mix, held, config),
        heldout_tokens=sum(batch.tokens for batch in held),
        seconds=round(time.perf_counter() - started, 1),
    )


def _train(engine: TrunkEngine, parts: Parts, mix: Mix, plan: Plan, config: Config) -> WatchedLink:
    """Train all three parts for a round of one client; returns the link for what crossed it."""
    engine.open_round(1, 1, training=True)
    session = engine.open("train", client=CLIENT, steps=plan.count)
    link = WatchedLink(_with(config, mix), session)
    place = replace(_place(config), secret=SECRET if config.link.cache_mb else b"")
    streamed.train(parts.bottom, parts.top, link, plan, plan.count, config.train, place)
    fold(engine, {"train": 1.0})
    return link


def _loss(
    engine: TrunkEngine, parts: Parts, mix: Mix, held: Sequence[Batch], config: Config
) -> float:
    """Held-out loss, nats per token, through a session with these codecs."""
    engine.open_round(1, 1, training=False)
    link = WatchedLink(_with(config, mix), engine.open("evaluate", client=CLIENT))
    outcome = streamed.evaluate(parts.bottom, parts.top, link, held, config.train)
    engine.close_round()
    return outcome.loss


def _with(config: Config, mix: Mix) -> LinkConfig:
    return replace(config.link, codec=dict(mix.codecs))


def _place(config: Config) -> Place:
    return Place(seed=config.seed, client=CLIENT, round=1, rounds=1)


def _data(config: Config, most: int, heldout: int) -> tuple[list[Example], list[Example]]:
    """Training examples, `most` of them (0: all), and held-out ones."""
    data = load_client_data(
        config.data,
        load_tokenizer(config.model),
        partition=0,
        partitions=1,
        seed=config.seed,
    )
    return data.train[: most or None], data.heldout[:heldout]


def _engine(parts: Parts, config: Config) -> TrunkEngine:
    return TrunkEngine(
        parts.trunk,
        hidden_size=parts.trunk.hidden_size,
        train=config.train,
        seed=config.seed,
        max_in_flight=2**62,
    )


def _parts(config: Config, before: int) -> Parts:
    """The configured parts at their start, which so many steps in fp32 may go before."""
    # What goes before depends on no link or defence, pretrained weights not on the seed either.
    base = replace(
        config, link=LinkConfig(), privacy=PrivacyConfig(), aggregation=AggregationConfig()
    )
    base = base if config.model.scratch else replace(base, seed=0)
    parts = split(copy.deepcopy(_whole(to_json(base), before)), cut_of(config))
    start([parts.bottom, parts.trunk, parts.top], config)
    ends, server = config.runtime.client_device, config.runtime.trunk_device
    parts = Parts(parts.bottom.to(ends), parts.trunk.to(server), parts.top.to(ends))
    perturb(parts.bottom, parts.top, SiteKey(SECRET), config.privacy.perturb)
    defend(parts.bottom, parts.top, make_defence(config.privacy, SECRET))
    return parts


@lru_cache(maxsize=1)
def _whole(text: str, before: int) -> PreTrainedModel:
    """The base, which takes half a minute to read out of a .gguf file, or to train."""
    config = from_json(text)
    whole = build_whole(config)
    if before:
        train = replace(config.train, local_steps=before, lr=4 * config.train.lr)
        config = replace(
            config, train=train, tuning=TuningConfig(bottom="full", trunk="full", top="full")
        )
        parts = split(whole, cut_of(config))
        start([parts.bottom, parts.trunk, parts.top], config)
        examples, _ = _data(config, 0, 0)
        pad_id = padding_id(parts.bottom, load_tokenizer(config.model))
        plan = Plan(examples, config, replace(_place(config), round=0), pad_id=pad_id)
        _train(_engine(parts, config), parts, parse_mix(BASE), plan, config)
    return whole
