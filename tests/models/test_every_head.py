"""Other heads than the causal one: which classes of the tested families split exactly."""

from __future__ import annotations

import os

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

from models import Cut, families
from models.heads import HEADS, causal_class
from models.parts import split_unchecked
from models.tiny import roughen, tiny_config
from models.verify import PADDINGS, compare, example

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "MASKED_LM")
QUICK = (
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "OPTForSequenceClassification",
    "Qwen2ForSequenceClassification",
)


def candidates() -> dict[str, str]:
    """Family of every class with a head that is not its causal one, by the name of the class."""
    found = {}
    for kind in KINDS:
        names = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")
        found.update(
            {names[f]: f for f in families.tested_families() if isinstance(names.get(f), str)}
        )
    return found


def why_not(name: str, family: str) -> str:
    """Say what is wrong with the split of a class; empty if it is exact."""
    kind = getattr(transformers, name)
    config = tiny_config(family, pad_token_id=0)
    if kind is causal_class(config):
        return "it is the causal one"
    torch.manual_seed(0)
    try:
        model = roughen(kind._from_config(config, attn_implementation="eager")).eval()
        for cut in (Cut(1, 1), Cut(0, 2), Cut(2, 0)):
            parts = split_unchecked(model, cut)
            for padding in PADDINGS:
                gap = compare(model, parts, *example(config, padding, batch=3))
                if not gap.within():
                    return f"{cut}, padding {padding}: {gap}"
    except Exception as error:  # whatever a model's own code may raise
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("name", QUICK)
def test_other_heads_split_exactly(name: str) -> None:
    assert name in HEADS
    assert why_not(name, candidates()[name]) == ""


@pytest.mark.slow
def test_the_table_of_heads_is_what_this_machine_finds() -> None:
    found = {name: why_not(name, family) for name, family in sorted(candidates().items())}
    if os.environ.get("GRAFT_PRINT_HEADS"):
        print("\n".join(f"{name}: {why or 'exact'}" for name, why in found.items()))
    assert {name for name in HEADS if found.get(name)} == set()
    assert set(HEADS) == {name for name, why in found.items() if not why}
