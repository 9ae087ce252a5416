"""FedAvg-LoRA of the unsplit model, as an ordinary Flower app: transformers, peft, plain PyTorch.

It is what Graft is compared with, so it has no code of Graft's but the settings and the batches,
which make both train on the same tokens in the same order. Its own folder is a whole Flower app.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from conf.load import load_config
from conf.schema import Config, TrainConfig
from simulations.bench.compare.data import Batch, client_steps, heldout

IGNORED = -100

client = ClientApp()
server = ServerApp()


# ---- the client -------------------------------------------------------------------------------


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train the whole model's adapter for one round."""
    config, model, number = _received(message, context)
    steps = client_steps(config, _partition(context), number)
    optimizer = plain_optimizer(model, config.train)
    done = train_steps(model, steps, config.train, optimizer, number)
    reply = _reply(message, {"num-tokens": done.tokens, "loss": done.loss})
    reply.content["arrays"] = ArrayRecord(get_peft_model_state_dict(model))
    reply.content["timing"] = ConfigRecord({"seconds": done.seconds})
    return reply


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Mean loss over this client's held-out batches."""
    config, model, _ = _received(message, context)
    loss, tokens = mean_loss(model, heldout(config, _partition(context)))
    return _reply(message, {"num-tokens": tokens, "loss": loss})


def _received(message: Message, context: Context) -> tuple[Config, PeftModel, int]:
    torch.set_num_threads(1)
    path = str(context.run_config["experiment"])
    model = _model(path)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    return load_config(path), model, int(message.content["config"]["server-round"])


def _reply(message: Message, metrics: dict[str, Any]) -> Message:
    content = RecordDict({"metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)


def _partition(context: Context) -> int:
    return int(context.node_config["partition-id"])


@lru_cache(maxsize=1)
def _model(path: str) -> PeftModel:
    """The model that this process keeps from one message to the next; its adapter is replaced."""
    return load_model(load_config(path))


# ---- training, which the central baseline shares ----------------------------------------------


def load_model(config: Config, adapter: str = "") -> PeftModel:
    """The base model with an adapter, by default the one that training starts from."""
    base = AutoModelForCausalLM.from_pretrained(config.model.base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, at what peft calls
        return PeftModel.from_pretrained(base, adapter or config.model.path, is_trainable=True)


def plain_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over what is trained."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    return torch.optim.AdamW(
        parameters,
        lr=train.lr,
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
    )


class Trained:
    """What the steps of a round amounted to."""

    def __init__(self) -> None:
        self.tokens, self.total = 0, 0.0
        self.losses: list[float] = []
        self.seconds: list[float] = []
        """Of each step."""

    @property
    def loss(self) -> float:
        """Mean over all tokens, in nats."""
        return self.total / max(1, self.tokens)


def train_steps(
    model: nn.Module,
    steps: Sequence[Sequence[Batch]],
    train: TrainConfig,
    optimizer: torch.optim.Optimizer,
    number: int = 1,
) -> Trained:
    """Train in place; a step minimises the mean loss over the tokens of its micro-batches.

    Parameters
    ----------
    model : nn.Module
        Any causal model; what requires gradients is trained.
    steps : sequence of sequences of Batch
        The micro-batches of each step.
    train : TrainConfig
        Clipping, learning rate and its cosine schedule over `train.rounds`.
    optimizer : Optimizer
        Of `plain_optimizer`.
    number : int
        The round, from 1.
    """
    done = Trained()
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    model.train()
    for index, micro_batches in enumerate(steps):
        started = time.perf_counter()
        progress = (number - 1 + index / len(steps)) / train.rounds
        for group in optimizer.param_groups:
            group["lr"] = train.lr * 0.5 * (1 + math.cos(math.pi * progress))
        tokens, total = sum(batch.tokens for batch in micro_batches), 0.0
        for batch in micro_batches:
            loss = summed_loss(model, batch)
            (loss / tokens).backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(parameters, train.clip)
        optimizer.step()
        optimizer.zero_grad()
        done.seconds.append(time.perf_counter() - started)
        done.losses.append(total / tokens)
        done.total += total
        done.tokens += tokens
    return done


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the next token, summed over the tokens that count."""
    mask = None if bool(batch.attention_mask.all()) else batch.attention_mask
    logits_BTV = model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits
    targets = batch.labels[:, 1:].flatten()
    return F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum"
    )


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch]) -> tuple[float, int]:
    """Mean loss per token over batches, and how many tokens there are."""
    model.eval()
    pairs = [(float(summed_loss(model, batch)), batch.tokens) for batch in batches]
    tokens = sum(count for _, count in pairs)
    return sum(total for total, _ in pairs) / tokens, tokens


# ---- the server -------------------------------------------------------------------------------


class TimedFedAvg(FedAvg):
    """Flower's FedAvg, which is not changed: what it is told and when is written down."""

    def __init__(self, clients: int) -> None:
        super().__init__(
            min_train_nodes=clients,
            min_evaluate_nodes=clients,
            min_available_nodes=clients,
            weighted_by_key="num-tokens",
        )
        self.rounds: list[dict[str, Any]] = []
        self._began = 0.0

    def evaluate_first(self, grid: Grid, arrays: ArrayRecord) -> None:
        """Evaluate before training, as Graft does: a process that is new imports torch now."""
        self._began = time.monotonic()
        self.rounds.append({"round": 0, "seconds": 0.0, "averaging": 0.0, "clients": []})
        messages = self.configure_evaluate(0, arrays, ConfigRecord(), grid)
        self.aggregate_evaluate(0, grid.send_and_receive(messages))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A round begins."""
        messages = super().configure_train(server_round, arrays, config, grid)
        self._began = time.monotonic()
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """All have trained."""
        answers = list(replies)
        asked = time.monotonic()
        result = super().aggregate_train(server_round, answers)
        ended = time.monotonic()
        self.rounds.append(
            {
                "round": server_round,
                "seconds": ended - self._began,
                "averaging": ended - asked,
                "clients": [
                    {**reply.content["metrics"], **reply.content["timing"]} for reply in answers
                ],
            }
        )
        return result

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The round is over."""
        metrics = super().aggregate_evaluate(server_round, replies)
        assert metrics is not None, "nobody evaluated"
        self.rounds[-1] |= {"whole": time.monotonic() - self._began, "heldout": metrics["loss"]}
        return metrics


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Average the clients' adapters for so many rounds; leaves `history.json` and the adapter."""
    torch.set_num_threads(1)
    config = load_config(str(context.run_config["experiment"]))
    model, strategy = load_model(config), TimedFedAvg(config.federation.min_clients)
    first = ArrayRecord(get_peft_model_state_dict(model))
    strategy.evaluate_first(grid, first)
    result = strategy.start(grid, first, num_rounds=config.train.rounds)
    set_peft_model_state_dict(model, result.arrays.to_torch_state_dict())
    folder = Path(config.output.folder)
    model.save_pretrained(str(folder / "model"))
    (folder / "history.json").write_text(json.dumps(strategy.rounds), encoding="utf-8")
