"""Split equals unsplit: logits and every parameter's gradient, every legal cut."""

from __future__ import annotations

import pytest
import torch

from models import Cut, split
from models.verify import compare, example
from simulations.equality.parity import all_cuts
from tests.models.helpers import FAMILIES, assert_exact, ids, run, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family,attention", FAMILIES)
def test_every_cut_is_exact(family: str, attention: str, tied: bool) -> None:
    model = tiny(family, attention, tie_word_embeddings=tied)
    cuts = all_cuts(4) if tied == (attention == "eager") else [Cut(0, 0), Cut(1, 1), Cut(2, 1)]
    for cut in cuts:
        assert_exact(model, split(model, cut), cut)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_grouped_query_attention(heads: int) -> None:
    model = tiny("llama", "sdpa", num_key_value_heads=heads)
    assert_exact(model, split(model, Cut(1, 2)), heads)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"])
@pytest.mark.parametrize("window", [1, 3])
def test_windows_shorter_than_the_text(family: str, window: int) -> None:
    model = tiny(family, sliding_window=window)
    wide = tiny(family, sliding_window=64)
    with torch.no_grad():
        gap = model(ids(tokens=12)).logits - wide(ids(tokens=12)).logits
    assert gap.abs().max() > 1e-4, "the window has no effect: nothing is tested"
    for cut in (Cut(1, 1), Cut(0, 2), Cut(2, 1)):
        assert_exact(model, split(model, cut), cut)


@pytest.mark.parametrize(
    "family,changes",
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("gemma3_text", {"final_logit_softcapping": 5.0, "layer_types": ["full_attention"] * 4}),
        (
            "qwen2",
            {
                "layer_types": [
                    "full_attention",
                    "sliding_attention",
                    "sliding_attention",
                    "full_attention",
                ]
            },
        ),
    ],
)
def test_quirks(family: str, changes: dict[str, object]) -> None:
    model = tiny(family, **changes)
    for cut in all_cuts(4):
        assert_exact(model, split(model, cut), cut)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_deep_cut_of_one_block_trunk_and_one_token(family: str) -> None:
    model = tiny(family)
    parts = split(model, Cut(2, 1))
    gap = compare(model, parts, *example(model.config, "none", batch=1, tokens=1))
    assert gap.within(1e-5)


def test_dropout_is_that_of_the_unsplit_model() -> None:
    changes = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    model = tiny("gpt2", **changes).train()
    parts = split(model, Cut(1, 1))
    assert all(part.training for part in parts)
    torch.manual_seed(5)
    whole = model(ids()).logits
    torch.manual_seed(5)
    torch.testing.assert_close(run(parts, ids()), whole, rtol=0, atol=1e-5)
    torch.manual_seed(6)
    assert (run(parts, ids()) - whole).abs().max() > 1e-2
    for part in parts:
        part.eval()
    assert torch.equal(run(parts, ids()), run(parts, ids()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_weights(dtype: str) -> None:
    model = tiny("llama").to(getattr(torch, dtype))
    parts = split(model, Cut(1, 1))
    h = parts.bottom(ids())
    assert h.dtype == getattr(torch, dtype)
    logits = parts.top(parts.trunk(h.float()))
    assert torch.equal(logits, model(ids()).logits)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = tiny("llama")
    parts = split(model, Cut(1, 1))
    for part in parts:
        part.train()
        part.model.gradient_checkpointing_enable()
    assert_exact(model, parts, "checkpointing")
