"""lm-evaluation-harness, in an environment of its own, measures a split model through `graft api`.

`make test-eval` installs it; GRAFT_LM_EVAL may name another `lm_eval`.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from models import Cut
from simulations.api.serve import Server, Settings, listen
from simulations.talk.opening import Asked, opened
from simulations.talk.speaker import Speaker
from tests.simulations.api.conftest import TEXT
from tests.simulations.api.helpers import encoded, logprobs_of

TASK = """task: graft_lines
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{begin}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


def _lines() -> list[dict[str, Any]]:
    """Return beginnings of the text with three ways to go on, of which the last is right.

    None ends with a blank: lm-eval would count it as said, not as given.
    """
    lines = []
    for place in (place for place in range(6, 80, 7) if TEXT[place - 1] != " "):
        right, other = TEXT[place : place + 6], TEXT[(place + 30) % 80 :][:6]
        begin = TEXT[max(0, place - 12) : place]
        lines.append({"begin": begin, "choices": [other, right[::-1], right], "answer": 2})
    return lines


def _judged(speaker: Speaker, line: dict[str, Any]) -> list[float]:
    """Return each choice's log-probability after the beginning, by the unsplit model."""
    start, found = encoded(line["begin"]), []
    for choice in line["choices"]:
        ids = start + encoded(choice)
        rows = logprobs_of(speaker, ids)
        found.append(sum(float(rows[at - 1, ids[at]]) for at in range(len(start), len(ids))))
    return found


def _measure(url: str, name: str, folder: Path, program: str) -> None:
    model = f"base_url={url}/completions,model={name},max_length=256,num_concurrent=2"
    command = [program, "run", "--model", "local-completions", "--model_args", model]
    command += ["--tasks", "graft_lines", "--include_path", str(folder)]
    command += ["--output_path", str(folder / "out"), "--log_samples"]
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]


def _program(project: Path) -> str:
    program = os.environ.get("GRAFT_LM_EVAL", str(project / ".venv" / "lm-eval/bin/lm_eval"))
    if not Path(program).exists():
        pytest.skip("lm-evaluation-harness is not there: make test-eval")
    return program


@pytest.mark.slow
def test_lm_eval_finds_what_the_unsplit_model_says(
    speaker: Speaker, project: Path, tmp_path: Path
) -> None:
    program = _program(project)
    speaker.model.save_pretrained(tmp_path / "swallow")
    speaker.tokenizer.save_pretrained(tmp_path / "swallow")
    lines, file = _lines(), tmp_path / "lines.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    (tmp_path / "lines.yaml").write_text(TASK.replace("FILE", str(file)), encoding="utf-8")

    with (
        opened(Asked(source=str(tmp_path / "swallow"), cut=Cut(1, 1))) as split,
        listen("127.0.0.1", 0) as taken,
        Server(split, Settings(), taken).running() as url,
    ):
        _measure(url, split.name, tmp_path, program)

    expected = [_judged(speaker, line) for line in lines]
    right = [judged.index(max(judged)) == 2 for judged in expected]
    assert 0 < sum(right) < len(right), "a figure of 0 or 1 would say little"
    (results,) = (tmp_path / "out").rglob("results_*.json")
    measured = json.loads(results.read_text(encoding="utf-8"))["results"]["graft_lines"]
    assert measured["acc,none"] == pytest.approx(sum(right) / len(right))
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    for one in map(json.loads, samples.read_text(encoding="utf-8").splitlines()):
        told = [float(answer[0]) for answer in one["filtered_resps"]]
        assert told == pytest.approx(expected[one["doc_id"]], abs=1e-4)
