"""What `model.path` names, and what is refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.source import Source, find_model, find_source, tokenizer_of
from tests.models.helpers import saved


def adapter(folder: Path, base: str, **changes: object) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": base, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def test_folders_files_hub_ids_and_adapters_are_told_apart(tmp_path: Path) -> None:
    saved(tmp_path / "base")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    own = adapter(tmp_path / "adapter", str(tmp_path / "base"))
    gone = adapter(tmp_path / "moved", "/gone/base")

    assert find_source(str(tmp_path / "base")) == Source(str(tmp_path / "base"))
    assert find_source(str(gguf)) == Source(str(gguf))
    assert find_source("org/name-1.5") == Source("org/name-1.5")
    assert find_source(str(own)) == Source(str(tmp_path / "base"), own)
    assert find_source(str(gone), str(tmp_path / "base")) == Source(str(tmp_path / "base"), gone)


def test_what_wants_a_whole_model_refuses_an_adapter_and_names_its_base(tmp_path: Path) -> None:
    saved(tmp_path / "base")
    own = adapter(tmp_path / "adapter", str(tmp_path / "base"))

    assert find_model(str(tmp_path / "base"), key="--model") == str(tmp_path / "base")
    with pytest.raises(ValueError, match=f"^--model .* is an adapter: .* {tmp_path / 'base'}$"):
        find_model(str(own), key="--model")


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(tmp_path: Path) -> None:
    saved(tmp_path / "base")
    own = adapter(tmp_path / "adapter", str(tmp_path / "base"))
    assert tokenizer_of(str(own)) == str(tmp_path / "base")
    (own / "tokenizer_config.json").write_text("{}")
    assert tokenizer_of(str(own)) == str(own)
    assert tokenizer_of("last:run") == "last:run"


@pytest.mark.parametrize(
    ("path", "base", "words"),
    [
        ("/nope", "", "model.path /nope does not exist"),
        ("here/or/there", "", "here/or/there does not exist"),
        ("{0}/none.gguf", "", "none.gguf does not exist"),
        ("{0}/notes.txt", "", "is a file: give the model's folder"),
        ("{0}/empty", "", "is an empty folder"),
        ("{0}/run", "", r"no config\.json, but base; did you mean .*/run/base"),
        ("{0}/run/base", "x/y", "model.base .*is none: clear it"),
        ("{0}/bare", "", "has no weights"),
        ("{0}/pickled", "", r"pytorch_model\.bin; .*Convert it once: python -c .*save_pretrained"),
        ("{0}/shards", "", r"pytorch_model\.bin\.index\.json; .*Convert it once"),
        ("{0}/orphan", "", r"its base /gone/base does not exist; set model\.base to where"),
        ("{0}/orphan", "/no", r"its base /no does not exist; correct model\.base"),
        ("{0}/nameless", "", r"does not name its base; set model\.base"),
        ("{0}/second", "", "an adapter of .*orphan, which is an adapter itself|its base"),
        ("{0}/ia3", "", "adapter of type IA3; .*merge_and_unload"),
        ("{0}/garbled", "", r"adapter_config\.json is not JSON"),
    ],
)
def test_what_is_no_model_is_refused_in_words(
    path: str, base: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "empty").mkdir()
    for name in ("run/base", "bare", "pickled", "shards"):
        saved(tmp_path / name, shard="1GB")
        if name != "run/base":
            (tmp_path / name / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "shards" / "pytorch_model.bin.index.json").write_text("{}")
    adapter(tmp_path / "orphan", "/gone/base")
    adapter(tmp_path / "nameless", "")
    adapter(tmp_path / "second", str(tmp_path / "orphan"))
    adapter(tmp_path / "ia3", "x", peft_type="IA3")
    (adapter(tmp_path / "garbled", "x") / "adapter_config.json").write_text("{")

    with pytest.raises(ValueError, match=words):
        find_source(path.format(tmp_path), base)
