"""Peak memory of each role against the whole model, each loaded in a process of its own.

``graft bench memory`` prints what `bench_memory` finds. The checkpoint is a random one made for the
purpose, of about 200 MB, in several shards.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from strategies.memory import peak_bytes

CONFIG = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
    "tie_word_embeddings": False,
}
CUT = (2, 1)
WHOLE = "whole"
_MIB = 2**20


def bench_memory(path: str | None = None, cut: tuple[int, int] = CUT) -> dict[str, Any]:
    """Load each role, and the whole model, in a fresh process and measure its peak.

    Parameters
    ----------
    path : str, optional
        Folder of a checkpoint; by default one is made in a temporary folder.
    cut : tuple of int
        Blocks of bottom and top.

    Returns
    -------
    dict
        ``checkpoint_mb`` and for each of bottom, trunk, top and whole: ``weights_mb`` (its own
        tensors), ``peak_mb`` (growth of the resident set to its peak while loading and reading
        every weight once; unread weights would be left in the file by the memory map) and
        ``share`` of the whole model's peak.
    """
    if path is not None:
        return _measure_all(path, cut)
    with tempfile.TemporaryDirectory(prefix="graft-memory-") as folder:
        _run(_MAKE, folder, json.dumps(CONFIG))
        return _measure_all(folder, cut)


def _measure_all(path: str, cut: tuple[int, int]) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    result: dict[str, Any] = {"cut": list(cut), "checkpoint_mb": round(size / _MIB, 1)}
    for role in (WHOLE, "bottom", "trunk", "top"):
        result[role] = json.loads(_run(_MEASURE, role, path, *map(str, cut)).splitlines()[-1])
    for role in (WHOLE, "bottom", "trunk", "top"):
        result[role]["share"] = round(result[role]["peak_mb"] / result[WHOLE]["peak_mb"], 3)
    return result


def measure(role: str, path: str, bottom: int, top: int) -> dict[str, float]:
    """Load one role in this process; return its weights and the growth of the peak, in MiB."""
    from models import Cut, load_part, load_whole

    before = peak_bytes()
    if role == WHOLE:
        loaded: Any = load_whole(path)
    else:
        loaded = load_part(role, path, Cut(bottom, top))
    weights = sum(p.numel() * p.element_size() for p in loaded.parameters())
    for parameter in loaded.parameters():
        parameter.detach().sum()  # brings the pages in, as a forward does
    peak = peak_bytes() - before
    return {"weights_mb": round(weights / _MIB, 1), "peak_mb": round(peak / _MIB, 1)}


_MAKE = """
import json, sys
from models import build_scratch
build_scratch(json.loads(sys.argv[2]), 0).save_pretrained(sys.argv[1], max_shard_size="20MB")
"""

_MEASURE = """
import json, sys
import torch
torch.set_num_threads(1)
from transformers import LlamaForCausalLM  # imports are not what is measured
from simulations.bench.memory import measure
role, path, bottom, top = sys.argv[1:]
print(json.dumps(measure(role, path, int(bottom), int(top))))
"""


def _run(code: str, *arguments: str) -> str:
    project = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring failed: {done.stderr[-2000:]}")
    return done.stdout
