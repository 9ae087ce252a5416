"""How well a model does on examples: loss, token accuracy, and answers that it gets exactly right.

Shapes: B texts, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from flower_app.client.ends import token_loss
from flower_app.data.client import IGNORED, Batch, Example, batches
from simulations.evaluate.texts import Answer, answers_of, padded_left


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What an evaluation came to."""

    loss: float
    """Mean over the tokens that count, in nats."""
    perplexity: float
    token_accuracy: float
    """Share of these tokens that were the likeliest after the true ones before them."""
    exact_match: float | None
    """Share of the completions that greedy generation gives; None without prompts."""
    seconds: float


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    generate: bool = True,
) -> Figures:
    """Evaluate a model, wherever its trunk is.

    Parameters
    ----------
    model : PreTrainedModel
        Unsplit, or of `models.remote.join_remote`. How it generates is set to greedy.
    tokenizer : PreTrainedTokenizerBase
        Spells what is generated.
    examples : sequence of Example
        Padded to the longest of `batch_size`.
    generate : bool
        Whether completions are generated, for `exact_match`.
    """
    started, pad = time.perf_counter(), _padding(model, tokenizer)
    total, right, tokens = 0.0, 0, 0
    for batch in batches(examples, batch_size, pad_id=pad):
        loss, hits, count = _score(model, batch)
        total, right, tokens = total + loss, right + hits, tokens + count
    answers = answers_of(examples) if generate else []
    matched = sum(
        _matched(model, tokenizer, answers[at : at + batch_size], pad)
        for at in range(0, len(answers), batch_size)
    )
    return Figures(
        loss=total / tokens,
        perplexity=math.exp(min(total / tokens, 700.0)),
        token_accuracy=right / tokens,
        exact_match=matched / len(answers) if answers else None,
        seconds=time.perf_counter() - started,
    )


def _score(model: PreTrainedModel, batch: Batch) -> tuple[float, int, int]:
    """Loss summed over the batch's tokens, how many were the likeliest, and how many count."""
    device = model.device
    mask = batch.attention_mask.to(device)
    logits_BTV = model(
        batch.input_ids.to(device),
        attention_mask=None if mask.all() else mask,
        use_cache=False,
    ).logits
    labels_BT = batch.labels.to(device)
    loss, count = token_loss(logits_BTV, labels_BT)
    targets = labels_BT[:, 1:]
    hits = (logits_BTV[:, :-1].argmax(-1) == targets) & (targets != IGNORED)
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {float(loss)}: the model gives no probabilities here")
    return float(loss), int(hits.sum()), count


def _matched(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Sequence[Answer], pad: int
) -> int:
    """How many completions greedy generation spells, an end of the text included."""
    ids_BT, mask_BT = padded_left([answer.prompt_T for answer in answers], pad)
    ends = _ends(model, tokenizer)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max(len(answer.completion_T) for answer in answers),
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
    )
    output_BT = model.generate(ids_BT.to(model.device), attention_mask=mask_BT.to(model.device))
    given = [
        _until(row[: len(answer.completion_T)], ends)
        for row, answer in zip(output_BT[:, ids_BT.shape[1] :].tolist(), answers, strict=True)
    ]
    wanted = [_until(answer.completion_T.tolist(), ends) for answer in answers]
    spelled = [
        [(tokenizer.decode(ids, skip_special_tokens=True).strip(), ended) for ids, ended in each]
        for each in (given, wanted)
    ]
    return sum(got == want for got, want in zip(*spelled, strict=True))


def _until(ids: list[int], ends: set[int]) -> tuple[list[int], bool]:
    """What stands before an end of the text, and whether there is one."""
    at = next((index for index, number in enumerate(ids) if number in ends), None)
    return (ids, False) if at is None else (ids[:at], True)


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    told = model.generation_config.eos_token_id
    listed = told if isinstance(told, list) else [told]
    return {int(number) for number in (*listed, tokenizer.eos_token_id) if number is not None}


def _padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills a batch: 0 if the model does not embed the tokenizer's own; it is masked."""
    own = tokenizer.pad_token_id
    size = model.config.get_text_config(decoder=True).vocab_size
    return int(own) if own is not None and own < size else 0
