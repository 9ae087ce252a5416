"""Try every decoder family that transformers can build tiny, and write the support table.

A family that splits without a refusal and is not exact fails the test; so does a family of the
tested table that is not exact here. ``GRAFT_FAMILIES=mamba,bloom`` tries only some.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from conf.schema import LoraSettings
from models import (
    Cut,
    Parts,
    load_client,
    load_part,
    named_trainable,
    save_adapter,
    tested_families,
    trainable_state,
    tune,
)
from models.anatomy import examine
from models.cut import ROLES
from models.families import NO_ADAPTER
from models.parts import Part, split_unchecked
from models.tiny import roughen, tiny_config
from models.verify import PADDINGS, compare, example
from models.whole import has_sdpa
from simulations.equality.parity import all_cuts
from tests.models.generating import generates

MOST_PARAMETERS = 30_000_000
TOLERANCE = 1e-5
LORA = LoraSettings(rank=2)
BEGIN, END = "<!-- table -->\n", "<!-- /table -->\n"


@dataclass(frozen=True)
class Outcome:
    family: str
    verdict: str
    """exact, refused, not buildable, or WRONG."""
    detail: str = ""
    loads: str = ""
    lora: str = ""
    """How LoRA by default fares: ``yes`` and the share of the blocks' weights, or what is wrong."""
    generates: str = ""
    """How it generates with its trunk elsewhere, as `generating.generates` says it."""


def build(family: str, attention: str) -> PreTrainedModel:
    config = tiny_config(family)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"the tiny config still has {size / 1e6:.0f}M parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = roughen(model).eval()
    for padding in PADDINGS:
        ids_BT, mask_BT = example(model.config, padding)
        logits = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        if not torch.isfinite(
            logits[torch.ones_like(ids_BT).bool() if mask_BT is None else mask_BT.bool()]
        ).all():
            raise ValueError(f"its own logits are not finite (padding {padding})")
    return model


def worst_difference(model: PreTrainedModel, thorough: bool) -> tuple[float, str]:
    """Every cut, with one padding each and a few with all; or those few only."""
    worst, where = 0.0, ""
    anatomy = examine(model)
    for number, cut in enumerate(all_cuts(4)):
        in_full = cut in (Cut(0, 0), Cut(2, 1))
        if not (thorough or in_full):
            continue
        parts = [Part(model, role, cut, anatomy) for role in ROLES]
        for padding in PADDINGS if in_full else [PADDINGS[number % 3]]:
            gap = compare(model, parts, *example(model.config, padding))
            for size, what in ((gap.logits, "logits"), (gap.gradient, gap.parameter)):
                if not size <= worst:
                    worst, where = size, f"{what}, cut {cut}, padding {padding}"
    return worst, where


def loads_like_split(model: PreTrainedModel, folder: str) -> str:
    """Save, load each role by itself, compare bitwise; say in a word how it went."""
    cut = Cut(1, 1)
    try:
        model.save_pretrained(folder)
        whole = AutoModelForCausalLM.from_pretrained(folder)
        bottom, top = load_client(folder, cut, attention="eager", allow_untested=True)
        trunk = load_part("trunk", folder, cut, attention="eager", allow_untested=True)
    except Exception as error:
        return f"refused: {one_line(error)}"
    for own, want in zip((bottom, trunk, top), split_unchecked(whole, cut), strict=True):
        mine, other = own.state_dict(), want.state_dict()
        buffers, same = dict(own.named_buffers()), dict(want.named_buffers())
        for left, right in ((mine, other), (buffers, same)):
            if left.keys() != right.keys():
                return f"WRONG: {sorted(left.keys() ^ right.keys())[0]}"
            for name in left:
                if not torch.equal(left[name], right[name]):
                    return f"WRONG: {name}"
    return "yes"


def adapts_like_peft(folder: str) -> str:
    """Adapt the split model, train and save it, and let PEFT load that; say how it went."""
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    parts, cut = split_unchecked(plain, Cut(1, 1)), Cut(1, 1)
    ids_BT, mask_BT = example(plain.config, "right")
    assert mask_BT is not None
    keep = mask_BT.bool()
    plain(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[keep].sum().backward()
    moved = {n for n, p in plain.named_parameters() if p.grad is not None and p.grad.any()}
    state = {}
    for part in parts:
        state |= trainable_state(tune(part, "lora", lora=LORA))
    if wrong := adapters_wrong(parts, state, moved, ids_BT, mask_BT):
        return f"WRONG: {wrong}"
    want = parts.top(parts.trunk(parts.bottom(ids_BT, mask_BT), mask_BT), mask_BT)[keep]
    save_adapter(f"{folder}/adapter", state, folder, LORA)
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    peft = PeftModel.from_pretrained(base, f"{folder}/adapter").eval()
    got = peft(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[keep]
    if not float((got - want).abs().max()) <= TOLERANCE * max(1.0, float(want.abs().max())):
        return f"WRONG: PEFT's logits differ by {float((got - want).abs().max()):.2g}"
    blocks = parts.trunk.inventory.share(
        parts.trunk.inventory.choose(()), "trunk", range(cut.bottom, 4 - cut.top)
    )
    return f"yes, {blocks:.0%}"


def adapters_wrong(
    parts: Parts, state: dict[str, Tensor], moved: set[str], ids_BT: Tensor, mask_BT: Tensor
) -> str:
    """Say what is wrong with adapters that were just made; they have something to add afterwards.

    `moved` are the base weights that get a gradient in the unsplit model.
    """
    if ranks := {t.shape[0] for n, t in state.items() if ".lora_A." in n} - {LORA.rank}:
        return f"ranks {sorted(ranks)}"
    generator = torch.Generator().manual_seed(1)
    for name, tensor in state.items():
        if ".lora_B." in name:
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    x = ids_BT
    for part in parts:
        x = part(x, mask_BT)
    x[mask_BT.bool()].sum().backward()
    for part in parts:
        for name, parameter in named_trainable(part).items():
            adapted = name.partition(".lora_")[0]
            reached = parameter.grad is not None and bool(parameter.grad.any())
            if not reached and moved & {adapted, f"{adapted}.weight"}:
                return f"no gradient reaches {name}"
    left_out = parts.trunk.inventory.left_out
    if adapted_twice := {n.partition(".lora_")[0] for n in state} & left_out.keys():
        return f"{sorted(adapted_twice)[0]} is adapted and left out"
    return ""


def try_family(family: str) -> Outcome:
    try:
        model = build(family, "eager")
    except Exception as error:
        return Outcome(family, "not buildable", one_line(error))
    try:
        worst, where = worst_difference(model, thorough=True)
        if worst <= TOLERANCE and has_sdpa(model.config):
            worst, where = worst_difference(build(family, "sdpa"), thorough=False)
    except ValueError as error:
        if "cannot be split" in str(error):
            return Outcome(family, "refused", one_line(error))
        return Outcome(family, "WRONG", f"no refusal in words: {one_line(error)}")
    except Exception as error:
        # Loud, not silent; split(..., allow_untested=True) turns it into a refusal.
        return Outcome(family, "refused", f"the split does not run: {one_line(error)}")
    if not worst <= TOLERANCE:
        return Outcome(family, "inexact", f"differs by {worst:.2g} ({where})")
    with tempfile.TemporaryDirectory() as folder:
        loads = loads_like_split(model, folder)
        try:
            lora = adapts_like_peft(folder)
        except Exception as error:
            refused = loads.startswith("refused")
            lora = "refused" if refused else f"WRONG: {one_line(error)}"
        return Outcome(family, "exact", loads=loads, lora=lora, generates=generates(model))


def one_line(error: Exception) -> str:
    text = " ".join(f"{error}".split()) or type(error).__name__
    text = text.replace("|", "/").replace("`", "'")
    return text if len(text) <= 160 else text[:157] + "..."


def write_table(outcomes: list[Outcome], path: Path) -> None:
    counts = Counter(outcome.verdict for outcome in outcomes)
    built = len(outcomes) - counts["not buildable"]
    table = set(tested_families())
    lines = [
        "Written by `pytest -m slow tests/models/test_every_family.py`; do not edit. Every decoder",
        f"family of transformers {transformers.__version__} is built with four tiny blocks and",
        "random weights, split at every legal cut, and compared with itself unsplit: logits and",
        "every gradient, unpadded, left- and right-padded, eager and (where it exists) sdpa, fp32,",
        f"tolerance {TOLERANCE:g}. *Tested* families split without further ado; the others only",
        "with `allow-untested`, which makes that comparison on the spot and refuses what differs.",
        "*load_part* tells whether roles loaded one by one hold bitwise the same tensors.",
        "*LoRA* was tried by default: every rank is the one asked for, an adapter gets a gradient",
        "where its weight does, and PEFT loads what is saved and gives the same logits. The number",
        "is the share of the middle blocks' weights that has an adapter. *generate*: greedy,",
        "padded, by beams and look-up, token for token as unsplit with the trunk elsewhere, whose",
        "single tokens of several sessions go *together* or *one by one*; a family *without a",
        "cache* of its own in transformers sends the whole text for each token.",
        "",
        f"{counts['exact']} of {built} families that can be built tiny are exact; "
        f"{built - counts['exact']} are refused; {counts['not buildable']} cannot be built tiny.",
        "",
        "| family | split | tested | load_part | LoRA | generate | remark |",
        "|---|---|---|---|---|---|---|",
    ]
    order = {"exact": 0, "inexact": 1, "refused": 1, "not buildable": 2}
    for o in sorted(outcomes, key=lambda o: (order.get(o.verdict, 0), o.family)):
        verdict = "refused" if o.verdict == "inexact" else o.verdict
        loads = "refused" if o.loads.startswith("refused") else o.loads
        remark = o.detail or (o.loads if loads == "refused" else "") or left_out_of(o)
        tested = "yes" if o.family in table else ""
        cells = (o.family, verdict, tested, loads, o.lora, o.generates, remark)
        lines.append(f"| {' | '.join(cells)} |")
    before, _, rest = path.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after)


def left_out_of(outcome: Outcome) -> str:
    names = sorted(NO_ADAPTER.get(outcome.family, ()))
    return f"no adapters on {', '.join(names)}" if names and "yes" in outcome.lora else ""


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")
def test_no_family_splits_wrongly_in_silence(project: Path) -> None:
    only = [name for name in os.environ.get("GRAFT_FAMILIES", "").split(",") if name]
    outcomes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for family in only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            outcomes.append(try_family(family))
            print(*vars(outcomes[-1]).values(), sep=" | ", flush=True)
    if not only:
        write_table(outcomes, project / "docs" / "families.md")
    exact = {o.family for o in outcomes if o.verdict == "exact"}
    assert not [o for o in outcomes if o.verdict == "WRONG" or o.loads.startswith("WRONG")]
    assert not [o for o in outcomes if o.generates.startswith("WRONG")]
    assert not [o for o in outcomes if o.family in tested_families() and o.family not in exact]
    assert not [o for o in outcomes if o.family in tested_families() and "yes" not in o.lora]
    for outcome in outcomes:
        if outcome.verdict == "inexact":
            refuses(outcome.family)
    assert only or len(exact) >= 120


def refuses(family: str) -> None:
    """A family that is not exact must be refused even by someone who allows untested ones."""
    from models import split

    with pytest.raises(ValueError, match="cannot be split"):
        split(build(family, "eager"), Cut(1, 1), allow_untested=True)
