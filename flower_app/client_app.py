"""The ClientApp: one train or evaluate message a round, with one session to the trunk inside it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import ConfigRecord as Record
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_app.client import messaged, streamed
from flower_app.client.node import client_name
from flower_app.client.plan import Plan, check_fit, padding_id
from flower_app.client.site import Connect, Site
from flower_app.client.step import Outcome
from flower_app.data.client import batches
from flower_app.logs import mark_lines
from strategies.errors import TrunkError
from strategies.records import ARRAYS, METRICS, OUTCOME, PROFILE, to_arrays
from strategies.transport.stream.link import GrpcLink

logger = logging.getLogger(__name__)


def make_app(connect: Connect | None = None) -> ClientApp:
    """Return the ClientApp.

    Parameters
    ----------
    connect : callable, optional
        Opens sessions in place of `GrpcLink`: for runs that are disturbed on purpose.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Train bottom and top for one round; replies with their tensors and its metrics."""
        return _answer(_train, message, context, connect)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        """Evaluate on the held-out examples; replies with loss and tokens."""
        return _answer(_evaluate, message, context, connect)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        """Tell this client's name, cut, rank and public key; if asked, more."""
        return _answer(_query, message, context, connect)

    return app


app = make_app()


def _query(site: Site, context: Context) -> RecordDict:
    config = site.config
    if site.asked.export:
        return site.export()
    told = {
        "cut-bottom": config.cut.bottom,
        "cut-top": config.cut.top,
        "lora-rank": config.lora.rank,
        "examples": len(site.data()[0].train) if site.asked.count_examples else 0,
        "public-key": site.public_key(),
    }
    if site.key_check:
        told["key-check"] = site.key_check
    content = RecordDict({PROFILE: Record(told)})
    if site.asked.send_tensors:
        content[ARRAYS] = to_arrays(site.shared(*site.parts()))
    return content


def _train(site: Site, context: Context) -> RecordDict:
    data, tokenizer = site.data()
    parked = messaged.Parked(site, context) if site.session else None
    bottom, top = parked.parts() if parked else site.parts()
    check_fit(bottom, data.train, site.config.data.context)
    plan = Plan(
        data.train,
        site.config,
        site.place,
        pad_id=padding_id(bottom, tokenizer),
        sizes=site.asked.batch_sizes,
    )
    if parked:
        return messaged.Training(site, parked, bottom, top, plan).answer()
    link = site.link(plan.count)
    try:
        outcome = streamed.train(
            bottom,
            top,
            link,
            plan,
            plan.count,
            site.config.train,
            site.place,
            site.bridge,
            window=site.config.link.window,
        )
        link.close()
        site.remember(link)
    finally:
        link.abort()
    content = site.trained(bottom, top, outcome.tokens)
    content[METRICS] = _metrics(outcome, link)
    return content


def _evaluate(site: Site, context: Context) -> RecordDict:
    data, tokenizer = site.data()
    parked = messaged.Parked(site, context) if site.session else None
    bottom, top = parked.parts() if parked else site.parts()
    check_fit(bottom, data.heldout, site.config.data.context)
    held_out = list(
        batches(
            data.heldout,
            site.config.train.batch_size,
            pad_id=padding_id(bottom, tokenizer),
            generator=None,
        )
    )
    if parked:
        return messaged.evaluate(site, parked, bottom, top, held_out)
    link = site.link(0)
    try:
        outcome = streamed.evaluate(
            bottom, top, link, held_out, site.config.train, window=site.config.link.window
        )
        link.close()
    finally:
        link.abort()
    return RecordDict({METRICS: _metrics(outcome, link)})


def _answer(
    work: Callable[[Site, Context], RecordDict],
    message: Message,
    context: Context,
    connect: Connect | None,
) -> Message:
    """Reply with what `work` returns, or with the words of the error it met."""
    mark_lines()
    outcome = Record({"client": client_name(context), "error": ""})
    try:
        content = work(Site(message, context, connect), context)
    except (TrunkError, ValueError, OSError) as error:
        logger.warning("%s: %s", outcome["client"], error)  # for this site's own log
        outcome["error"] = f"{error}"
        content = RecordDict()
    except Exception as error:  # a bug of ours or a library's: named, not dumped
        logger.exception("%s failed", outcome["client"])
        outcome["error"] = f"{type(error).__name__}: {error}"
        content = RecordDict()
    content[OUTCOME] = outcome
    return Message(content=content, reply_to=message)


def _metrics(outcome: Outcome, link: GrpcLink) -> MetricRecord:
    return MetricRecord(outcome.counters(link.bytes_up, link.bytes_down))
