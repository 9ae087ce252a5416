"""Loading a role: strict, only its own tensors, tied embeddings tied, equal to `split`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import models.shards
from models import Cut, load_client, load_part, load_whole, split
from tests.models.helpers import FAMILIES, ids, run, saved

pytestmark = pytest.mark.usefixtures("one_thread")
CUT = Cut(1, 1)
ROLES = ("bottom", "trunk", "top")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a checkpoint, shard by shard gathered into one file."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    """A change that removes one tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def assert_same_logits(got: Tensor, want: Tensor) -> None:
    """Equal up to the order of additions: memory-mapped weights are aligned differently."""
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", sorted({family for family, _ in FAMILIES}))
@pytest.mark.parametrize("cut", [Cut(2, 1), Cut(0, 0)], ids=str)
def test_loaded_parts_equal_split_ones(family: str, cut: Cut, tmp_path: Path) -> None:
    model = saved(tmp_path, family)
    bottom, top = load_client(str(tmp_path), cut, attention="eager")
    trunk = load_part("trunk", str(tmp_path), cut, attention="eager")
    for own, want in zip((bottom, trunk, top), split(model, cut), strict=True):
        mine, other = dict(own.named_parameters()), dict(want.named_parameters())
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    mask = torch.tensor([[1] * 9, [0, 0] + [1] * 7])
    with torch.no_grad():
        want = model(ids(), attention_mask=mask).logits
        assert_same_logits(run((bottom, trunk, top), ids(), mask), want)
        alone = load_part("top", str(tmp_path), cut, attention="eager")
        assert_same_logits(run((bottom, trunk, alone), ids(), mask), want)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tied: bool, tmp_path: Path) -> None:
    saved(tmp_path, tie_word_embeddings=tied)
    bottom, top = load_client(str(tmp_path), CUT)
    own = {id(p) for p in bottom.parameters()}
    shared = [n for n, p in top.named_parameters() if id(p) in own]
    assert shared == (["model.lm_head.weight"] if tied else [])


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match="different values"):
        load_client(str(tmp_path), CUT)


@pytest.mark.parametrize("dtype,kind", [("bf16", torch.bfloat16), ("float16", torch.float16)])
def test_dtype(dtype: str, kind: torch.dtype, tmp_path: Path) -> None:
    saved(tmp_path)
    part = load_part("trunk", str(tmp_path), CUT, dtype=dtype)
    assert {p.dtype for p in part.parameters()} == {kind}
    assert part(torch.zeros(1, 3, 32)).dtype == kind
    whole = load_whole(str(tmp_path), dtype=dtype).eval()
    bottom, top = load_client(str(tmp_path), CUT, dtype=dtype)
    assert_same_logits(run((bottom, part, top), ids()), whole(ids()).logits)


@pytest.mark.parametrize(
    "role,name",
    [
        ("bottom", "model.embed_tokens.weight"),
        ("bottom", "model.layers.0.self_attn.q_proj.weight"),
        ("trunk", "model.layers.1.mlp.up_proj.weight"),
        ("trunk", "model.layers.2.input_layernorm.weight"),
        ("top", "model.layers.3.self_attn.o_proj.weight"),
        ("top", "model.norm.weight"),
        ("top", "lm_head.weight"),
    ],
)
def test_a_missing_tensor_raises_in_its_role_alone(role: str, name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, without(name))
    for other in ROLES:
        if other == role:
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                load_part(other, str(tmp_path), CUT)
        else:
            load_part(other, str(tmp_path), CUT)


@pytest.mark.parametrize("role", ROLES)
def test_unexpected_renamed_or_misshapen_tensors_raise(role: str, tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"model.layers.1.mlp.up_proj.bias": torch.zeros(64)}))
    with pytest.raises(ValueError, match=r"unexpected.*layers\.1\.mlp\.up_proj\.bias"):
        load_part(role, str(tmp_path), CUT)
    rewrite(tmp_path, without("model.layers.1.mlp.up_proj.bias"))
    load_part(role, str(tmp_path), CUT)
    own = {"bottom": 0, "trunk": 1, "top": 3}[role]
    name = f"model.layers.{own}.mlp.up_proj.weight"
    rewrite(tmp_path, lambda t: t.update({name: t[name][1:].contiguous()}))
    with pytest.raises(ValueError, match=r"has shape \(63, 32\), must be \(64, 32\)"):
        load_part(role, str(tmp_path), CUT)
    rewrite(tmp_path, lambda t: t.update({name.replace("up", "down"): t.pop(name)}))
    with pytest.raises(ValueError, match="up_proj"):
        load_part(role, str(tmp_path), CUT)


def test_a_layer_more_than_the_config_says_raises(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"model.layers.4.input_layernorm.weight": torch.ones(32)}))
    with pytest.raises(ValueError, match=r"unexpected.*layers\.4"):
        load_part("trunk", str(tmp_path), CUT)


@pytest.mark.parametrize("role", ROLES)
def test_a_role_reads_its_own_tensors_alone(
    role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tmp_path)
    read: list[str] = []
    original = models.shards.Shards.slices

    def spy(self, keys, stack):  # type: ignore[no-untyped-def]
        read.extend(keys := set(keys))
        return original(self, keys, stack)

    monkeypatch.setattr(models.shards.Shards, "slices", spy)
    load_part(role, str(tmp_path), CUT)
    own = {n.removeprefix("model.") for n, _ in getattr(split(model, CUT), role).named_parameters()}
    assert set(read) == own


@pytest.mark.parametrize("role", ROLES)
def test_the_shards_of_others_need_not_exist(role: str, tmp_path: Path) -> None:
    saved(tmp_path, shard="8KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    mine = {
        "bottom": ("embed", "layers.0."),
        "trunk": ("layers.1.", "layers.2."),
        "top": ("layers.3.", "model.norm", "lm_head"),
    }[role]
    needed = {file for name, file in index.items() if any(m in name for m in mine)}
    for file in tmp_path.glob("*.safetensors"):
        if file.name not in needed:
            file.unlink()
    assert len(needed) < len(set(index.values()))
    load_part(role, str(tmp_path), CUT)
    (tmp_path / sorted(needed)[0]).unlink()
    with pytest.raises(ValueError, match=r"shard .* is missing"):
        load_part(role, str(tmp_path), CUT)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_keys_without_the_base_models_prefix(family: str, tmp_path: Path) -> None:
    model = saved(tmp_path, family)
    prefix = model.base_model_prefix + "."

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    rewrite(tmp_path, strip)
    bottom, top = load_client(str(tmp_path), CUT, attention="eager")
    trunk = load_part("trunk", str(tmp_path), CUT, attention="eager")
    alone = load_part("top", str(tmp_path), CUT, attention="eager")
    want = model(ids()).logits
    assert_same_logits(run((bottom, trunk, top), ids()), want)
    assert_same_logits(run((bottom, trunk, alone), ids()), want)


def test_expert_weights_stored_one_by_one_are_fused(tmp_path: Path) -> None:
    """Mixtral checkpoints keep each expert apart; transformers fuses them, and so must a role."""
    from models.verify import example

    model = saved(tmp_path, "mixtral")
    stored = {k for file in tmp_path.glob("*.safetensors") for k in load_file(file)}
    assert any(".experts.0." in name for name in stored)
    parts = [
        load_part(r, str(tmp_path), CUT, attention="eager", allow_untested=True) for r in ROLES
    ]
    ids_BT, mask_BT = example(model.config, "none")
    assert_same_logits(run(parts, ids_BT, mask_BT), model(ids_BT).logits)


def test_wrong_sources_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the config"):
        load_part("trunk", str(tmp_path / "nothing"), CUT)
    model = saved(tmp_path)
    with pytest.raises(ValueError, match="unknown role"):
        load_part("middle", str(tmp_path), CUT)
    with pytest.raises(ValueError, match="leaves no trunk"):
        load_part("trunk", str(tmp_path), Cut(2, 2))
    with pytest.raises(ValueError, match="unknown dtype"):
        load_part("trunk", str(tmp_path), CUT, dtype="fp8")
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only from safetensors"):
        load_part("trunk", str(tmp_path), CUT)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        load_part("trunk", str(tmp_path), CUT)
    with pytest.raises(ValueError, match="cannot load"):
        load_whole(str(tmp_path))
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        load_part("trunk", str(tmp_path), CUT)
    for content in ("{}", "{", "[]"):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match="is no index of shards .*download it anew"):
            load_part("trunk", str(tmp_path), CUT)


def test_attentions_that_the_config_asks_for_do_not_matter(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "output_attentions": True}))
    whole = load_whole(str(tmp_path))
    bottom, top = load_client(str(tmp_path), CUT)
    parts = bottom, load_part("trunk", str(tmp_path), CUT), top
    with torch.no_grad():
        assert_same_logits(run(parts, ids()), whole(ids()).logits)


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    saved(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    load_client(str(tmp_path), CUT)
    assert torch.equal(torch.rand(3), expected)


def test_load_whole_is_strict(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, without("model.norm.weight"))
    with pytest.raises(ValueError, match=r"missing_keys.*model\.norm\.weight"):
        load_whole(str(tmp_path))


def in_each_block(suffix: str) -> Callable[[dict[str, Tensor]], None]:
    """A change that adds a tensor to every block, as old checkpoints have it."""

    def change(tensors: dict[str, Tensor]) -> None:
        pattern = re.compile(r"^(.*\.\d+\.)")
        blocks = {found[1] for name in tensors if (found := pattern.match(name))}
        tensors.update({block + suffix: torch.ones(4) for block in blocks})

    return change


def old_norms(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        tensors[old.replace("LayerNorm.bias", "LayerNorm.beta")] = tensors.pop(name)


@pytest.mark.parametrize(
    "family,change",
    [
        ("llama", in_each_block("self_attn.rotary_emb.inv_freq")),
        ("gpt_neox", in_each_block("attention.rotary_emb.inv_freq")),
        ("gpt_neox", in_each_block("attention.masked_bias")),
        ("gpt2", in_each_block("attn.bias")),
        ("gpt2", in_each_block("attn.masked_bias")),
        ("gpt_neo", in_each_block("attn.attention.bias")),
        ("gpt_neo", in_each_block("attn.attention.masked_bias")),
        ("bert", lambda t: t.update({"bert.embeddings.position_ids": torch.arange(4)[None]})),
        ("bert", old_norms),
    ],
)
def test_what_transformers_drops_or_renames_is_no_stranger(
    family: str, change: Callable[[dict[str, Tensor]], None], tmp_path: Path
) -> None:
    saved(tmp_path, family)
    rewrite(tmp_path, change)
    plain = load_whole(str(tmp_path), attention="eager").eval()
    bottom, top = load_client(str(tmp_path), CUT, attention="eager")
    trunk = load_part("trunk", str(tmp_path), CUT, attention="eager")
    with torch.no_grad():
        assert_same_logits(run((bottom, trunk, top), ids()), plain(ids()).logits)


def test_another_classs_checkpoint_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"score.weight": torch.ones(2, 32)}))
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"score\.weight; it was saved as LlamaForSequenceClass"):
        load_client(str(tmp_path), CUT)
