"""Trunk and ends in folders of their own: the same model, and nothing but what is theirs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import Cut, outline, split
from models.pieces import Label, load_joined, load_pieces, read_label, save_pieces
from tests.models.helpers import ids, run, saved

pytestmark = pytest.mark.usefixtures("one_thread")
LABEL = Label(
    kind="trunk", name="m", cut=Cut(1, 1), fingerprint="f", description="d", hidden_size=32,
    num_blocks=4,
)  # fmt: skip


def in_pieces(folder: Path, family: str, **changes: bool) -> torch.nn.Module:
    model = saved(folder / "base", family, **changes)
    bottom, trunk, top = split(model, LABEL.cut)
    config = outline(str(folder / "base")).config
    save_pieces(folder / "trunk", [trunk], config, LABEL)
    ends = dataclasses.replace(LABEL, kind="ends")
    save_pieces(folder / "ends", [bottom, top], config, ends)
    return model


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("gpt2", False), ("mixtral", False)])
def test_pieces_are_the_model(family: str, tied: bool, tmp_path: Path) -> None:
    model = in_pieces(tmp_path, family, tie_word_embeddings=tied)
    want = model(ids()).logits

    bottom, top = load_pieces(tmp_path / "ends", attention="eager")
    (trunk,) = load_pieces(tmp_path / "trunk", attention="eager")
    whole = load_joined(tmp_path / "trunk", tmp_path / "ends", dtype="float32", attention="eager")

    torch.testing.assert_close(run([bottom, trunk, top], ids()), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole(ids()).logits, want, rtol=0, atol=1e-5)
    head, embedding = top.model.get_output_embeddings(), bottom.model.get_input_embeddings()
    assert (head.weight is embedding.weight) is tied
    assert read_label(tmp_path / "trunk") == LABEL


def test_a_trunk_holds_nothing_of_the_ends(tmp_path: Path) -> None:
    in_pieces(tmp_path, "llama")
    own = load_file(tmp_path / "trunk" / "trunk.safetensors")
    assert {name.split(".")[2] for name in own} == {"1", "2"}
    assert all(name.startswith("model.layers.") for name in own)
    ends = load_file(tmp_path / "ends" / "ends.safetensors")
    assert not own.keys() & ends.keys()


def test_other_tensors_than_were_saved_are_refused(tmp_path: Path) -> None:
    in_pieces(tmp_path, "llama")
    path, label = tmp_path / "trunk" / "trunk.safetensors", tmp_path / "trunk" / "graft.json"
    tensors, told = load_file(path), json.loads(label.read_text())

    def tampered(own: dict[str, torch.Tensor], *, known: bool = True) -> None:
        from models.fingerprint import fingerprint_of

        save_file(own, path)
        told["tensors"]["digest"] = fingerprint_of([path]) if known else "0"
        label.write_text(json.dumps(told))

    name = next(iter(tensors))
    tampered(tensors, known=False)
    with pytest.raises(ValueError, match=r"is not the file that graft.json was written with"):
        load_pieces(tmp_path / "trunk")
    tampered({n: t for n, t in tensors.items() if n != name})
    with pytest.raises(ValueError, match=f"lacks {name}, which the trunk needs"):
        load_pieces(tmp_path / "trunk")
    tampered({**tensors, "lm_head.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"unexpected tensors: lm_head.weight"):
        load_pieces(tmp_path / "trunk")
    tampered({**tensors, name: tensors[name][:1]})
    with pytest.raises(ValueError, match="has shape"):
        load_pieces(tmp_path / "trunk")
    told["format"] = 2
    label.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="has format 2, and this Graft reads 1"):
        read_label(tmp_path / "trunk")
