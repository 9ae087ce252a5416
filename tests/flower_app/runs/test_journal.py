"""What a kill, a power cut or an editor leaves in a journal stops a resume only where it must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flower_app.runs.journal import cut_back, read_records, require_round


def record(number: int, kind: str = "round") -> bytes:
    return json.dumps({"kind": kind, "round": number}).encode()


WHOLE = b"\n".join(record(number) for number in range(3)) + b"\n"

BEHIND = {
    "a torn line": b'{"kind": "st',
    "a garbage line": b"garbage\n",
    "garbage before whole lines": b"garbage\n" + record(3, "step") + b"\n" + record(3) + b"\n",
    "NULs": b"\0" * 512,
    "NULs and a line": b"\0" * 512 + record(3) + b"\n",
    "no UTF-8": b'{"kind": "step", "round": 3, "client": "\xff\xfe"}\n',
    "another writer": record(3, "step") + record(3, "step") + b"\n",
    "no object": b"[]\n3\nnull\n",
    "no number": b'{"kind": "step", "round": null}\n{"kind": "step", "round": "3"}\n',
    "too deep": b"[" * 100_000 + b"\n",
    "empty lines": b"\n\n \n",
    "later rounds": record(3, "step") + b"\n" + record(3) + b"\n",
}


@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND)
def test_whatever_follows_the_checkpoint_is_dropped(behind: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(WHOLE + behind)

    found = cut_back(path, 2)

    assert [one["round"] for one in found] == [0, 1, 2]
    assert path.read_bytes() == WHOLE
    assert list(read_records(path)) == found


@pytest.mark.parametrize("damage", [b"garbage", b"\0" * 9, b'{"kind": "st', b"[]", record(1)[:-1]])
def test_a_damaged_line_before_it_is_named_and_nothing_is_changed(
    damage: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(record(0) + b"\n" + damage + b"\n" + WHOLE)

    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is no record .*mend or remove"):
        cut_back(path, 2)

    assert path.read_bytes() == record(0) + b"\n" + damage + b"\n" + WHOLE
    with pytest.raises(ValueError, match="line 2 is no record"):
        list(read_records(path))


@pytest.mark.parametrize(
    "written",
    [b"\xef\xbb\xbf" + WHOLE, WHOLE.replace(b"\n", b"\r\n"), WHOLE[:-1]],
    ids=["byte order mark", "CR LF", "no last newline"],
)
def test_what_an_editor_leaves_is_no_damage(written: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(written)

    found = cut_back(path, 2)

    assert [one["round"] for one in found] == [0, 1, 2]
    assert path.read_bytes() == WHOLE


def test_lines_of_a_round_that_come_late_stay(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(WHOLE + record(3, "step") + b"\n" + record(2, "step") + b"\ngarbage\n")

    found = cut_back(path, 2)

    assert [(one["kind"], one["round"]) for one in found][-1] == ("step", 2)
    assert len(found) == 4


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (None, "is missing: without it this run cannot be resumed"),
        (b"", r"does not hold round 2, .* cut off or emptied. Put it back, or begin the run anew"),
        (b"\0" * 99, "does not hold round 2"),
        (WHOLE.replace(record(2), b""), "resume from the checkpoint of round 1 or before, or beg"),
    ],
)
def test_a_journal_that_lost_the_round_of_the_checkpoint_is_refused(
    written: Any, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    if written is not None:
        path.write_bytes(written)
    with pytest.raises(ValueError, match=words):
        require_round(path, 2)
