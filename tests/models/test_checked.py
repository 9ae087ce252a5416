"""`split` takes what is tested and refuses the rest in words; flags of the config do not matter."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    T5ForConditionalGeneration,
)

from models import Cut, split
from models.tiny import roughen, tiny_config
from tests.models.helpers import assert_exact, ids, run, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
CUT = Cut(1, 1)


def headed(kind: type[PreTrainedModel], family: str, **changes: Any) -> PreTrainedModel:
    """A tiny model of one class."""
    config = tiny_config(family, **{"pad_token_id": 0, **changes})
    return roughen(kind._from_config(config, attn_implementation="eager")).eval()


class _Doubled(LlamaForCausalLM):
    """A user's own class: other logits, in a way that splits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


class _Peeping(LlamaForCausalLM):
    """A user's own class that looks at the ids again above the blocks."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        out = super().forward(input_ids=input_ids, **kwargs)
        if input_ids is not None:
            out.logits = out.logits + input_ids[..., None] * 0.01
        return out


@pytest.mark.parametrize(
    "kind,family",
    [
        (LlamaModel, "llama"),
        (LlamaForQuestionAnswering, "llama"),
        (GPT2DoubleHeadsModel, "gpt2"),
        (BertForQuestionAnswering, "bert"),
        (BertForMultipleChoice, "bert"),
        (BertForPreTraining, "bert"),
        (_Peeping, "llama"),
    ],
)
def test_classes_that_cannot_be_exact_are_refused_in_words(
    kind: type[PreTrainedModel], family: str
) -> None:
    model = headed(kind, family)
    with pytest.raises(ValueError, match=rf"class {kind.__name__} is not tested.*allow-untested"):
        split(model, CUT)
    with pytest.raises(ValueError, match="cannot be split"):
        split(model, CUT, allow_untested=True)


def test_a_class_of_ones_own_is_checked_on_the_spot() -> None:
    model = headed(_Doubled, "llama")
    with pytest.raises(ValueError, match="class _Doubled is not tested"):
        split(model, CUT)
    assert_exact(model, split(model, CUT, allow_untested=True), "_Doubled")


def test_a_forward_put_in_the_place_of_the_class_own_is_noticed() -> None:
    model = tiny("llama")
    model.forward = MethodType(_Peeping.forward, model)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="with a forward of its own is not tested"):
        split(model, CUT)


def test_what_is_no_model_of_transformers_is_refused() -> None:
    class Reward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny("llama")

    with pytest.raises(ValueError, match="Reward cannot be split.*merge_and_unload"):
        split(Reward(), CUT)  # type: ignore[arg-type]
    t5 = T5ForConditionalGeneration(
        AutoConfig.for_model("t5", d_model=16, d_kv=4, d_ff=16, num_layers=4, num_heads=2)
    )
    for allow in (False, True):
        with pytest.raises(ValueError, match="t5"):
            split(t5, CUT, allow_untested=allow)


@pytest.mark.parametrize(
    "kind,family",
    [(LlamaForSequenceClassification, "llama"), (GPT2ForSequenceClassification, "gpt2")],
)
def test_a_text_whose_last_token_looks_like_padding_is_named(
    kind: type[PreTrainedModel], family: str
) -> None:
    parts = split(headed(kind, family), CUT)
    ids_BT = ids()
    ids_BT[1, -2:] = 0
    with pytest.raises(ValueError, match=r"row 1 ends at position 8 by its mask and at 6 by its"):
        parts.bottom(ids_BT)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, -2:] = 0
    parts.bottom(ids_BT, mask_BT)


def test_a_classifier_without_a_pad_token_takes_one_text() -> None:
    model = headed(LlamaForSequenceClassification, "llama", pad_token_id=None)
    parts = split(model, CUT)
    torch.testing.assert_close(run(parts, ids(batch=1)), model(ids(batch=1)).logits)
    with pytest.raises(ValueError, match="no padding token"):
        run(parts, ids())


@pytest.mark.parametrize(
    "family,flags",
    [
        ("llama", {"output_hidden_states": True}),
        ("llama", {"output_attentions": True}),
        ("gpt2", {"return_dict": False, "use_cache": True}),
        ("bert", {"return_dict": False, "output_hidden_states": True}),
        ("mixtral", {"output_router_logits": True}),
        ("qwen3_moe", {"output_router_logits": True, "output_attentions": True}),
        ("jetmoe", {"output_router_logits": True, "return_dict": False}),
    ],
)
def test_what_a_config_asks_for_beside_the_logits_does_not_matter(
    family: str, flags: dict[str, Any]
) -> None:
    plain, model = tiny(family), tiny(family, **flags)
    parts = split(model, CUT)
    torch.testing.assert_close(run(parts, ids()), plain(ids()).logits, rtol=0, atol=1e-5)
    assert_exact(model, parts, flags)
    assert {flag: getattr(model.config, flag) for flag in flags} == flags, "the user's own config"
