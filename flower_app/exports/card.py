"""The model card of an export: what a hub reads in its head, and what a person asks first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from conf.schema import DataConfig
from flower_app.exports.origin import Origin
from flower_app.serving.source import Served

ADAPTER, MERGED, PARTS = "adapter", "merged", "parts"
CARD = "README.md"
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")


def is_card(file: Path) -> bool:
    """Return whether a file is a card that `model_card` wrote, so its folder is an export."""
    if not file.is_file():
        return False
    head = file.read_text(encoding="utf-8", errors="replace").split("\n---\n")[0]
    return head.startswith("---\n") and "\ngraft:\n  form: " in head


def model_card(origin: Origin, form: str, *, license: str = "unknown", part: str = "") -> str:
    """Return the text of a README.md as the Hugging Face hub reads it.

    Parameters
    ----------
    origin : Origin
        What is exported.
    form : str
        ``adapter``, ``merged`` or ``parts``.
    license : str
        Of the weights, as the hub calls it.
    part : str
        ``trunk`` or ``ends``, in a folder that holds these alone.
    """
    head = yaml.safe_dump(_head(origin, form, license), sort_keys=False, allow_unicode=True)
    served = origin.served
    body = [
        f"# {served.name}" + (f": {part}" if part else ""),
        _opening(origin, form, part),
        *_training(origin),
        "## How to load",
        _loading(served, form, part),
    ]
    return f"---\n{head}---\n\n" + "\n\n".join(body) + "\n"


def _head(origin: Origin, form: str, license: str) -> dict[str, Any]:
    served, told = origin.served, origin.told
    base = _hub_id(served.base)
    tags = ["graft", "split-learning", *(["federated-learning"] if origin.config else [])]
    graft: dict[str, Any] = {
        "form": form,
        "cut_bottom": served.cut.bottom,
        "cut_top": served.cut.top,
        "fingerprint": served.fingerprint,
        **({"rounds": origin.round} if origin.round is not None else {}),
        **{key: told[key] for key in ("clients", "tokens", "strategy") if key in told},
    }
    return {
        **({"base_model": base} if base else {}),
        "library_name": {ADAPTER: "peft", MERGED: "transformers", PARTS: "graft"}[form],
        "pipeline_tag": "text-generation",
        "license": license,
        "tags": [*tags, *(["lora"] if served.adapter is not None else [])],
        "graft": graft,
    }


def _opening(origin: Origin, form: str, part: str) -> str:
    served = origin.served
    what = {
        ADAPTER: "A LoRA adapter (PEFT)",
        MERGED: "A whole model",
        PARTS: {
            "": "A model in parts: `trunk/` for the server, `ends/` for clients",
            "trunk": "The trunk of a split model: its middle blocks, and nothing else",
            "ends": "The ends of a split model: embeddings, first and last blocks, head, tokenizer",
        }[part],
    }[form]
    base = f" Its base is {_base(served.base)}." if served.adapter is not None else ""
    trained = (
        "It was trained with Graft by several holders of data who kept their data and the ends of "
        "the model, while a server trained the middle."
        if origin.config
        else "It was cut with Graft."
    )
    return (
        f"{what}: {served.description}.{base} {trained} The cut leaves {served.cut.bottom} blocks "
        f"below the trunk and {served.cut.top} above it."
    )


def _training(origin: Origin) -> Iterator[str]:
    config, told = origin.config, origin.told
    if config is None:
        return
    yield "## Training"
    tuning = f"bottom {config.tuning.bottom}, trunk {config.tuning.trunk}, top {config.tuning.top}"
    start = "random weights" if config.model.scratch else _base(config.model.path)
    rows = {
        "from": start,
        "what is trained": tuning,
        "rounds": origin.round,
        "clients": told.get("clients"),
        "tokens": f"{told['tokens']:,}" if told.get("tokens") else None,
        "strategy": told.get("strategy"),
        "type of the weights": config.model.dtype,
        "seed": config.seed,
    }
    yield _table(("", "value"), rows)
    metrics = {
        "held-out loss": told.get("eval_loss_last"),
        "held-out perplexity": told.get("eval_perplexity_last"),
        "held-out loss before training": told.get("eval_loss_first"),
        "loss on the server's own data": told.get("central_loss_last"),
    }
    measured = {name: f"{value:.4f}" for name, value in metrics.items() if value is not None}
    yield _table(("metric", "value"), measured) if measured else "No loss was measured."
    yield "## Data"
    yield _data(config.data)


def _data(data: DataConfig) -> str:
    sources = {
        "builtin": "English text that comes with Python (`pydoc_data.topics`)",
        "files": f"files of the clients' own (`{Path(data.path).name or 'given by each client'}`)",
        "hub": f"`{data.path}` of the Hugging Face hub, split `{data.split}`",
    }
    learned = (
        f"completions in column `{data.completion_column}` after their prompts"
        if data.completion_column
        else "assistant turns of conversations"
        if data.messages_column
        else f"format `{data.format}`"
    )
    return (
        f"{sources[data.source][0].upper()}{sources[data.source][1:]}; {learned}; examples of at "
        f"most {data.context} tokens, divided among the clients as `{data.partitioner}`, of which "
        f"{data.heldout:.0%} were held out. No data of a client left it; a client may have used a "
        "source of its own, which the server is not told."
    )


def _loading(served: Served, form: str, part: str) -> str:
    if form == ADAPTER:
        base = _hub_id(served.base) or "THE_BASE_MODEL"
        code = (
            "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")'
        )
    elif form == MERGED:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")'
        )
    else:
        return _parts_loading(part)
    cut = f"{served.cut.bottom},{served.cut.top}"
    return f"```python\n{code}\n```\n\nOr split again: `graft serve THIS_FOLDER --cut {cut}`."


def _parts_loading(part: str) -> str:
    at = "" if part else "THIS_FOLDER/"
    server = f"`graft serve {at or 'THIS_FOLDER'}{'trunk' if at else ''}`"
    client = f"`{at + 'ends' if at else 'THIS_FOLDER'}`"
    serve = f"The server holds the trunk and needs no tokenizer: {server}."
    use = f"A client needs {client} and the access file that the server writes for it."
    return {"trunk": serve, "ends": use}.get(part, f"{serve} {use}")


def _table(head: tuple[str, str], rows: dict[str, Any]) -> str:
    known = {name: value for name, value in rows.items() if value is not None}
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in known.items())])


def _hub_id(path: str) -> str:
    """The hub's name of a base, also of one in the hub's cache; empty for a folder of one's own."""
    if match := _CACHED.search(path + "/"):
        return "/".join(match.groups())
    return "" if not path or Path(path).expanduser().exists() else path


def _base(path: str) -> str:
    """A base in words: a folder by its last name, for where it lies is its owner's affair."""
    return f"`{_hub_id(path) or Path(path).name}`"
