"""A trunk of one's own in another process: it serves, says what is wrong, and ends with us."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from transformers import ByT5Tokenizer

from flower_app.serving.local import open_local
from models import Cut
from tests.models.helpers import ids, saved

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_local_trunk_writes_the_unsplit_models_text_and_leaves_nothing(tmp_path: Path) -> None:
    whole = saved(tmp_path / "model")
    ByT5Tokenizer().save_pretrained(tmp_path / "model")

    with open_local(tmp_path / "model", cut=Cut(1, 1), threads=1) as client:
        (child,) = _children()
        got = client.model.generate(ids(batch=1), max_new_tokens=8, do_sample=False)  # type: ignore[operator]

    assert torch.equal(got, whole.generate(ids(batch=1), max_new_tokens=8, do_sample=False))  # type: ignore[operator]
    assert not child.is_running()


@pytest.mark.slow
def test_what_cannot_be_served_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; nor is it a run"):
        open_local(tmp_path / "nothing")
    assert not _children()


def _children() -> list[psutil.Process]:
    found = psutil.Process().children()
    return [each for each in found if "flower_app.serving.local" in " ".join(each.cmdline())]
