"""The server evaluates the whole averaged model on a file of its own (`data.central_path`).

Its own bottom and top take the averaged ends, and the trunk is the engine's: the clients' parts and
loss, in this process, without a wire between them.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from flwr.app import ArrayRecord

from conf.schema import Config
from flower_app.build import build_client, take_residuals
from flower_app.client.defences.defence import defend
from flower_app.client.defences.registry import make_defence
from flower_app.client.ends import on_device, token_loss
from flower_app.client.plan import check_fit, padding_id
from flower_app.data.client import Batch, batches, load_client_data
from flower_app.data.refusals import DataError
from flower_app.data.text import load_tokenizer
from models import Part, fold_residuals, load_client_state
from models.bridge import take_bridge
from strategies.engine.engine import TrunkEngine
from strategies.optim import autocast
from strategies.records import from_arrays

logger = logging.getLogger(__name__)

Central = Callable[[ArrayRecord], Mapping[str, float] | None]


def evaluates_centrally(config: Config, engine: TrunkEngine) -> Central | None:
    """What evaluates on `data.central_path`, whose texts are read now; None without one.

    Raises
    ------
    ValueError
        If the file cannot be used, with the reason.
    """
    if not config.data.central_path:
        return None
    runtime = replace(config.runtime, client_device=config.runtime.trunk_device)
    return CentralEvaluation(replace(config, runtime=runtime), engine)


class CentralEvaluation:
    """Loss of the whole averaged model on the server's examples.

    Parameters
    ----------
    config : Config
        The run's; `runtime.client_device` says where the server's ends are.
    engine : TrunkEngine
        Holds the trunk. No round is open when this is called.
    """

    def __init__(self, config: Config, engine: TrunkEngine) -> None:
        self._config, self._engine = config, engine
        self._parts: tuple[Part, Part] | None = self._built()
        self._batches = self._read(self._parts[0])

    def __call__(self, arrays: ArrayRecord) -> dict[str, float] | None:
        """Evaluate.

        Parameters
        ----------
        arrays : ArrayRecord
            The averaged tensors of bottom and top, as clients get them; empty: the first ones.

        Returns
        -------
        dict or None
            `loss` in nats, `perplexity` and `num-tokens`; None if the loss is no number.
        """
        residuals, state = take_residuals(take_bridge(from_arrays(arrays))[1])
        # What was folded into the base weights before is not taken out again: build anew.
        bottom, top = self._parts or self._built()
        self._parts = None if residuals else (bottom, top)
        if state:
            load_client_state(bottom, top, state)
            fold_residuals((bottom, top), residuals)
        total = sum(self._loss(bottom, top, batch) for batch in self._batches)
        tokens = sum(batch.tokens for batch in self._batches)
        if not math.isfinite(total):
            logger.warning("the loss on data.central_path is %g: no central evaluation", total)
            return None
        loss = total / tokens
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "num-tokens": tokens}

    @torch.no_grad()
    def _loss(self, bottom: Part, top: Part, batch: Batch) -> float:
        """Summed over the batch's tokens."""
        trunk, device = self._engine.trunk, self._engine.bench.device
        ids, mask, labels = on_device(device, batch)
        with autocast(device, self._config.train.precision):
            total, _ = token_loss(top(trunk(bottom(ids, mask), mask), mask), labels)
        return float(total)

    def _built(self) -> tuple[Part, Part]:
        bottom, top = build_client(self._config)
        # Nothing is to hide here, but the loss is to be that of the model as clients use it.
        defend(bottom, top, make_defence(self._config.privacy, secrets.token_bytes(32)))
        return bottom.eval(), top.eval()

    def _read(self, bottom: Part) -> list[Batch]:
        data, tokenizer = self._config.data, load_tokenizer(self._config.model)
        whole = replace(data, partitioner="iid", partition_by="", heldout=0.0, max_examples=0)
        try:
            examples = load_client_data(
                whole,
                tokenizer,
                partition=0,
                partitions=1,
                data_path=data.central_path,
                seed=self._config.seed,
            ).train
        except DataError as error:
            raise DataError(f"data.central_path, which the server reads: {error}") from error
        check_fit(bottom, examples, data.context)
        size, pad = self._config.train.batch_size, padding_id(bottom, tokenizer)
        return list(batches(examples, size, pad_id=pad, generator=None))
