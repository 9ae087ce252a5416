"""The ClientApp: one train or evaluate message a round, with one session to the trunk inside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from flwr.app import ConfigRecord as Record
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_app import training
from flower_app.data import batches, num_steps, steps
from flower_app.site import Site, client_name
from flower_app.text import Example
from models import Part, client_state
from strategies.answers import ARRAYS, METRICS, OUTCOME, PROFILE, TICKET, to_arrays
from strategies.errors import TrunkError
from strategies.optim import derive_seed
from strategies.transport.link import GrpcLink

logger = logging.getLogger(__name__)

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train bottom and top for one round; replies with their tensors and the round's metrics."""
    return _answer(_train, message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate on the held-out examples; replies with loss and tokens."""
    return _answer(_evaluate, message, context)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Tell this client's name, cut and rank, and, if asked, how many examples it trains on."""

    def profile(site: Site) -> RecordDict:
        config = site.config
        counted = message.content.config_records[TICKET]["count-examples"]
        told = {
            "cut-bottom": config.cut.bottom,
            "cut-top": config.cut.top,
            "lora-rank": config.lora.rank,
            "examples": len(site.data()[0].train) if counted else 0,
        }
        return RecordDict({PROFILE: Record(told)})

    return _answer(profile, message, context)


def _train(site: Site) -> RecordDict:
    config, place = site.config, site.place
    data, tokenizer = site.data()
    bottom, top = site.parts()
    check_fit(bottom, data.train, config.data.context)
    count = num_steps(len(data.train), config.train)
    order = torch.Generator().manual_seed(
        derive_seed(config.seed, place.round, place.client, "order")
    )
    plan = steps(
        data.train,
        batch_size=config.train.batch_size,
        accumulate=config.train.accumulate,
        steps=count,
        pad_id=int(tokenizer.pad_token_id),
        generator=order,
    )
    link = site.link(count)
    try:
        outcome = training.train(bottom, top, link, plan, count, config.train, place)
        link.close()
    finally:
        link.abort()
    return RecordDict(
        {ARRAYS: to_arrays(client_state(bottom, top)), METRICS: _metrics(outcome, link)}
    )


def _evaluate(site: Site) -> RecordDict:
    data, tokenizer = site.data()
    bottom, top = site.parts()
    check_fit(bottom, data.heldout, site.config.data.context)
    held_out = batches(
        data.heldout,
        site.config.train.batch_size,
        pad_id=int(tokenizer.pad_token_id),
        generator=None,
    )
    link = site.link(0)
    try:
        outcome = training.evaluate(bottom, top, link, held_out, site.config.train)
        link.close()
    finally:
        link.abort()
    return RecordDict({METRICS: _metrics(outcome, link)})


def check_fit(bottom: Part, examples: Sequence[Example], context: int) -> None:
    """Refuse texts that the model cannot embed, which torch would answer with an IndexError."""
    config = bottom.config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and context > positions:
        raise ValueError(
            f"data.context={context} exceeds the {positions} positions of this model; lower it"
        )
    largest = max((int(example.input_ids.max()) for example in examples), default=0)
    if largest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer gave id {largest}, the model embeds {config.vocab_size}; set "
            "model.tokenizer to the model's own, or leave it empty"
        )


def _answer(work: Callable[[Site], RecordDict], message: Message, context: Context) -> Message:
    """Reply with what `work` returns, or with the words of the error it met."""
    outcome = Record({"client": client_name(context), "error": ""})
    try:
        content = work(Site(message, context))
    except (TrunkError, ValueError, OSError) as error:
        outcome["error"] = f"{error}"
        content = RecordDict()
    except Exception as error:  # a bug of ours or a library's: named, not dumped
        logger.exception("%s failed", outcome["client"])
        outcome["error"] = f"{type(error).__name__}: {error}"
        content = RecordDict()
    content[OUTCOME] = outcome
    return Message(content=content, reply_to=message)


def _metrics(outcome: training.Outcome, link: GrpcLink) -> MetricRecord:
    return MetricRecord(
        {
            "num-tokens": outcome.tokens,
            "loss": outcome.loss,
            "steps": outcome.steps,
            "bytes-up": link.bytes_up,
            "bytes-down": link.bytes_down,
        }
    )
