"""Write what was trained as a folder that others load: adapter, merged model, or parts."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers import PretrainedConfig

from flower_app.beside import keep_privacy
from flower_app.build import cut_of
from flower_app.exports.card import ADAPTER, CARD, MERGED, PARTS, is_card, model_card
from flower_app.exports.origin import Origin, find_origin
from flower_app.serving.source import (
    Served,
    generation_file,
    load_ends,
    load_tokenizer,
    load_trunk,
    load_whole_model,
)
from models import Cut, outline
from models.bridge import BRIDGE_FILE, bridge_state, load_bridge, save_bridge
from models.fingerprint import fingerprint
from models.pieces import ENDS, TRUNK, Label, save_pieces
from models.whole import read_config

FORMS = (ADAPTER, MERGED, PARTS)
EXPORTS = "exports"
"""Where exports of a run go by default, in its folder."""


def export(
    text: str,
    form: str,
    to: Path | None = None,
    *,
    number: int | None = None,
    cut: Cut | None = None,
    license: str = "unknown",
    force: bool = False,
) -> Path:
    """Export a run's model, that of one of its checkpoints, or any model that can be split.

    Parameters
    ----------
    text : str
        As for `find_served`, or a checkpoint.
    form : str
        ``adapter``: a PEFT folder. ``merged``: a `from_pretrained` folder. ``parts``: `trunk/` and
        `ends/`, each of which is used without the other.
    to : Path, optional
        The folder; by default `exports/` in the run's.
    number : int, optional
        The round of the checkpoint.
    cut : Cut, optional
        Where ``parts`` are cut; needed for what is no run's.
    license : str
        Of the weights, for the card.
    force : bool
        Replace a folder that an export wrote.

    Returns
    -------
    Path
        The folder; whole, or as it was before.

    Raises
    ------
    ValueError
        If there is no such model, what was trained is no adapter, or the folder is taken.
    """
    if form not in FORMS:
        raise ValueError(f"--format is {form!r}, must be one of {', '.join(FORMS)}")
    with tempfile.TemporaryDirectory(prefix="graft-export-") as scratch:
        origin = find_origin(text, number=number, cut=cut, scratch=Path(scratch))
        folder = (to.expanduser() if to is not None else _usual(origin, form)).absolute()
        with _replaced(folder, force=force) as draft:
            write = {ADAPTER: _write_adapter, MERGED: _write_merged, PARTS: _write_parts}[form]
            write(origin, draft, license)
    return folder


def _write_adapter(origin: Origin, folder: Path, license: str) -> None:
    served = origin.served
    if served.adapter is None:
        raise ValueError(f"what was trained is no adapter: {_why(origin)}. Take --format merged")
    for file in served.adapter.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    _write_beside(served, folder)
    _write_bridge(origin, folder, served.fingerprint)
    _write_card(origin, folder, ADAPTER, license)


def _why(origin: Origin) -> str:
    config = origin.config
    if config is None:
        return f"{origin.served.base or origin.served.name} is a whole model"
    modes = {config.tuning.bottom, config.tuning.trunk, config.tuning.top}
    if "full" in modes:
        return "weights themselves were trained (tuning.bottom, tuning.trunk or tuning.top is full)"
    if config.model.scratch:
        return "the run began from random weights (model.scratch), which no one else has"
    return (
        "the mean of the clients' adapters does not fit into lora.rank (aggregation.lora=exact), "
        "or the run began from another adapter, which was merged"
    )


def _write_merged(origin: Origin, folder: Path, license: str) -> None:
    served = origin.served
    load_whole_model(served, dtype=_dtype(origin)).save_pretrained(folder)
    _write_beside(served, folder)
    _write_bridge(origin, folder, fingerprint(str(folder)))
    _write_card(origin, folder, MERGED, license)


def _write_parts(origin: Origin, folder: Path, license: str) -> None:
    served, dtype = origin.served, _dtype(origin)
    config = _config(served)
    trunk, ends = load_trunk(served, dtype=dtype), load_ends(served, dtype=dtype)
    save_pieces(folder / TRUNK, [trunk], config, _label(served, TRUNK))
    save_pieces(folder / ENDS, list(ends), config, _label(served, ENDS))
    _write_beside(served, folder / ENDS)
    _write_bridge(origin, folder / ENDS, served.fingerprint)
    _write_card(origin, folder, PARTS, license)
    for part in (TRUNK, ENDS):
        _write_card(origin, folder / part, PARTS, license, part)


def _label(served: Served, kind: str) -> Label:
    return Label(
        kind=kind,
        name=served.name,
        cut=served.cut,
        fingerprint=served.fingerprint,
        description=served.description,
        hidden_size=served.hidden_size,
        num_blocks=served.num_blocks,
        allow_untested=served.allow_untested,
    )


def _write_beside(served: Served, folder: Path) -> None:
    """Tokenizer with its chat template, how the model generates if it is not told, and what is done
    to what leaves who generates with it."""
    load_tokenizer(served).save_pretrained(folder)
    keep_privacy(served.privacy, folder)
    if (settings := generation_file(served)) is not None:
        shutil.copyfile(settings, folder / settings.name)


def _write_bridge(origin: Origin, folder: Path, of: str) -> None:
    """The draft of the trunk that a run taught its ends, if there is one for this cut."""
    served, config = origin.served, origin.config
    place = served.adapter or served.ends or Path(served.base)
    if not (place / BRIDGE_FILE).is_file() or (config and cut_of(config) != served.cut):
        (folder / BRIDGE_FILE).unlink(missing_ok=True)  # an adapter's folder was copied whole
        return
    bridge = load_bridge(place, hidden_size=served.hidden_size)
    save_bridge(bridge_state(bridge), folder, fingerprint=of)


def _write_card(origin: Origin, folder: Path, form: str, license: str, part: str = "") -> None:
    card = model_card(origin, form, license=license, part=part)
    (folder / CARD).write_text(card, encoding="utf-8")


def _config(served: Served) -> PretrainedConfig:
    """The whole model's configuration."""
    if not served.base:
        return read_config(str(served.ends or served.trunk))
    return outline(served.base).config


def _dtype(origin: Origin) -> str:
    """The type in which the weights are kept: the run's, else the checkpoint's own."""
    if origin.config is not None:
        return origin.config.model.dtype
    if origin.served.base.endswith(".gguf"):
        return "float32"
    own = str(getattr(_config(origin.served), "dtype", None)).removeprefix("torch.")
    return own if own in ("float32", "float16", "bfloat16") else "float32"


def _usual(origin: Origin, form: str) -> Path:
    run = origin.served.run
    if run is None:
        raise ValueError("give the folder to export to: --to DIR")
    name = form if origin.round is None else f"{form}-round-{origin.round:04d}"
    return run / EXPORTS / name


@contextlib.contextmanager
def _replaced(folder: Path, *, force: bool) -> Iterator[Path]:
    """A folder to write to, which takes the place of `folder` when all is written."""
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and not force:
        raise ValueError(f"{folder} is there and not empty: take another --to, or --force")
    if taken and not is_card(folder / CARD):
        raise ValueError(
            f"{folder} is no export of Graft's, so --force does not remove it: take another --to, "
            "or remove it"
        )
    with _beside(folder) as parent:
        draft = Path(parent) / folder.name
        draft.mkdir()
        yield draft
        if folder.exists():
            folder.rename(Path(parent) / "before")
        draft.rename(folder)


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[str]:
    """A folder for drafts on the same disk; what cannot be written is said of `folder`."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        drafts = tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent)
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {error.strerror}. Take another --to") from error
    with drafts as parent:
        try:
            yield parent
        except (OSError, SafetensorError) as error:
            if not _is_full(error):
                raise
            raise OSError(
                f"{folder} cannot be written: the disk is full ({error}). What was there before is "
                "as it was. Make room, or take another --to"
            ) from error


def _is_full(error: Exception) -> bool:
    """Safetensors says the system's error in words alone."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"(os error {number})" in str(error) for number in full)
