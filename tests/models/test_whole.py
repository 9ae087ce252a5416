"""Random models from a config: deterministic, and wrong configs refused in words."""

from __future__ import annotations

import pytest
import torch

from models import build_scratch

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
}


def test_weights_are_a_function_of_config_and_seed() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    one, two, other = build_scratch(TINY, 3), build_scratch(TINY, 3), build_scratch(TINY, 4)
    assert torch.equal(torch.rand(2), expected), "the global generator was disturbed"
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_dtype_and_attention() -> None:
    model = build_scratch(TINY, 0, dtype="bf16", attention="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": ""}, "is not a causal language model"),
        ({"hiden_size": 3}, "no key 'hiden_size'; did you mean 'hidden_size'"),
        ({"num_attention_heads": 3}, "refused by transformers"),
    ],
)
def test_wrong_configs_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_scratch({**TINY, **changes}, 0)


def test_wrong_dtype_and_attention_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'bf16'"):
        build_scratch(TINY, 0, dtype="bf61")
    with pytest.raises(ValueError, match="did you mean 'sdpa'"):
        build_scratch(TINY, 0, attention="spda")
    with pytest.raises(ValueError, match="gemma2 has no sdpa"):
        build_scratch({"model_type": "gemma2"}, 0, attention="sdpa")
