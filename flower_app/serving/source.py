"""What is served: a run, a model, an adapter or a folder of parts, as the user names it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from conf.load import load_config
from conf.schema import Config, ModelConfig, PrivacyConfig
from flower_app.beside import kept_privacy
from flower_app.build import LAST, cut_of, in_words
from flower_app.data.tokenizer import load_tokenizer as load_configured
from flower_app.runs.folders import find_last_run, model_of, newest_round, runs_folder
from models import Cut, Part, load_client, load_part, load_whole, outline
from models.anatomy import count_blocks, share_copy, width
from models.continued import add_adapter, check_adapted, merge_adapter
from models.fingerprint import fingerprint
from models.load import Loading
from models.parts import split_unchecked
from models.pieces import ENDS, LABEL, TRUNK, Label, load_joined, load_pieces, read_label
from models.source import Source, find_source, generation_settings
from models.whole import has_sdpa, read_config

__all__ = [
    "Served",
    "find_run_folder",
    "find_served",
    "generation_file",
    "load_ends",
    "load_generation_config",
    "load_tokenizer",
    "load_trunk",
    "load_trunks",
    "load_whole_model",
    "serve_model",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model that can be served, found but not loaded."""

    name: str
    """How users call it: the run's, the folder's or the hub's name."""
    cut: Cut
    description: str
    """As `flower_app.build.describe` says of its parts."""
    hidden_size: int
    num_blocks: int
    fingerprint: str
    """Of the whole model (`models.fingerprint`): ends and trunk must have the same."""
    base: str = ""
    """Folder, hub id or .gguf file of the whole model; empty: there are parts alone."""
    adapter: Path | None = None
    """Folder of an adapter of it."""
    trunk: Path | None = None
    """Folder of the trunk alone."""
    ends: Path | None = None
    """Folder of bottom and top alone."""
    tokenizer: str = ""
    """Where it is, if not beside the model: folder, hub id or `bytes`."""
    run: Path | None = None
    """The run folder, if it is a run's."""
    attention: str = "sdpa"
    allow_untested: bool = False
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    """The run's: what is done to all that leaves a client."""


def find_served(text: str, cut: Cut | None = None, *, base: str = "") -> Served:
    """Find what the user means; nothing of the weights is kept in memory.

    Parameters
    ----------
    text : str
        A run (its folder, its name as `graft runs` shows it, `last:demo`), the folder or hub id of
        a model or a .gguf file, the folder of a PEFT adapter, or one that `graft export --format
        parts` wrote.
    cut : Cut, optional
        Needed for a model and an adapter; of a run, its own is the default.
    base : str
        Of the adapter at `text`; empty: the one that it names.

    Raises
    ------
    ValueError
        If there is no such thing, it has no model, or no cut is given where none is known.
    """
    place = Path(text).expanduser()
    labelled = [folder for folder in (place, place / TRUNK, place / ENDS) if _is_labelled(folder)]
    if labelled:
        return _of_parts(labelled, cut)
    run = find_run_folder(text)
    if run is not None:
        return _of_run(run, cut)
    beside = place.absolute().parent
    if (beside / "config.yaml").is_file() and model_of(beside) == place.absolute():
        return _of_run(beside, cut)
    try:
        source = find_source(text, base, key="the model")
    except ValueError as error:
        raise ValueError(f"{error}; nor is it a run under {runs_folder()} (`graft runs`)") from None
    if cut is None:
        raise ValueError(
            f"{text} is a model and does not say where it is to be cut: give the blocks that stay "
            "with the client, --cut 1,1 for instance (one below the trunk, one above)"
        )
    return _of_model(place.name or text, text, source, cut)


def find_run_folder(text: str) -> Path | None:
    """Return the folder of the run that is meant: by path, by name, or `last:NAME`; else None."""
    if text.startswith(LAST):
        return find_last_run(text.removeprefix(LAST)).parent
    place = Path(text).expanduser()
    named = place if place.exists() or len(place.parts) > 1 else runs_folder() / text
    return named.resolve() if (named / "config.yaml").is_file() else None


def load_trunk(served: Served, *, dtype: str = "fp32", device: str = "cpu") -> Part:
    """Load the trunk alone; an adapter is merged into it. In evaluation mode."""
    if not served.base:
        folder = _needed(served, TRUNK, served.trunk)
        return load_pieces(folder, dtype=dtype, attention=served.attention, device=device)[0]
    how = _loading(served, dtype, device)
    return _merged([load_part("trunk", served.base, served.cut, **how)], served.adapter)[0]


def load_trunks(
    served: Sequence[Served], *, dtype: str = "fp32", device: str = "cpu"
) -> list[Part]:
    """Load several trunks; those of one base and cut share its weights.

    The adapter of each such trunk stays beside the weights, so that the memory is that of the base
    and of the adapters.

    Returns
    -------
    list[Part]
        In the order of `served`, in evaluation mode.
    """
    shared: dict[tuple[str, Cut, str], Part] = {}
    keys = [(one.base, one.cut, one.attention) for one in served]
    found = []
    for one, key in zip(served, keys, strict=True):
        if not one.base or keys.count(key) == 1:
            found.append(load_trunk(one, dtype=dtype, device=device))
            continue
        if key not in shared:
            shared[key] = load_trunk(replace(one, adapter=None), dtype=dtype, device=device)
        view = share_copy(shared[key])
        if one.adapter is not None:
            add_adapter(view, one.adapter)
        found.append(view.to(device).eval().requires_grad_(False))
    return found


def load_ends(served: Served, *, dtype: str = "fp32", device: str = "cpu") -> tuple[Part, Part]:
    """Load bottom and top alone; an adapter is merged into them. In evaluation mode.

    Their models have the `generation_config` of the whole model.
    """
    if served.base:
        ends = load_client(served.base, served.cut, **_loading(served, dtype, device))
        bottom, top = _merged(list(ends), served.adapter)
    else:
        folder = _needed(served, ENDS, served.ends)
        bottom, top = load_pieces(folder, dtype=dtype, attention=served.attention, device=device)
    for part in (bottom, top):
        part.model.generation_config = load_generation_config(served, part.model)
    return bottom, top


def load_whole_model(served: Served, *, dtype: str = "fp32") -> PreTrainedModel:
    """Load the model unsplit, with an adapter merged; on the CPU, in evaluation mode."""
    if served.base:
        whole = load_whole(served.base, dtype=dtype, attention=served.attention)
        if served.adapter is not None:
            _merged(list(split_unchecked(whole, served.cut)), served.adapter)
    else:
        trunk = _needed(served, TRUNK, served.trunk)
        ends = _needed(served, ENDS, served.ends)
        whole = load_joined(trunk, ends, dtype=dtype, attention=served.attention)
    whole.generation_config = load_generation_config(served, whole)
    return whole.eval()


def load_tokenizer(served: Served) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to the model."""
    if served.base or served.tokenizer:
        path = str(served.adapter or served.base)
        base = served.base if served.adapter is not None else ""
        return load_configured(ModelConfig(path=path, base=base, tokenizer=served.tokenizer))
    return load_configured(ModelConfig(path=str(_needed(served, ENDS, served.ends))))


def load_generation_config(served: Served, model: PreTrainedModel) -> GenerationConfig:
    """Return how a model generates if it is not told: what lies beside it, else by its config."""
    file = generation_file(served)
    if file is None:
        return GenerationConfig.from_model_config(model.config)
    return GenerationConfig.from_pretrained(str(file.parent))


def generation_file(served: Served) -> Path | None:
    """Return the file beside a model that says how it generates; None if there is none."""
    places = (served.adapter, served.ends, served.base or None)
    found = (generation_settings(str(place)) for place in places if place is not None)
    return next((file for file in found if file is not None), None)


def _is_labelled(folder: Path) -> bool:
    return (folder / LABEL).is_file()


def _of_parts(folders: list[Path], cut: Cut | None) -> Served:
    labels = {folder: read_label(folder) for folder in folders}
    first = labels[folders[0]]
    for folder, label in labels.items():
        if label.fingerprint != first.fingerprint or label.cut != first.cut:
            raise ValueError(
                f"{folders[0]} and {folder} are parts of two models ({_words(first)}; "
                f"{_words(label)}): export both anew"
            )
    if cut not in (None, first.cut):
        raise ValueError(f"{folders[0]} was cut at {first.cut} and cannot be cut at {cut}")
    at = {label.kind: folder for folder, label in labels.items()}
    return Served(
        name=first.name,
        cut=first.cut,
        description=first.description,
        hidden_size=first.hidden_size,
        num_blocks=first.num_blocks,
        fingerprint=first.fingerprint,
        trunk=at.get(TRUNK),
        ends=at.get(ENDS),
        attention=_attention(str(folders[0])),
        allow_untested=first.allow_untested,
        privacy=kept_privacy(at.get(ENDS, folders[0])),
    )


def _words(label: Label) -> str:
    return f"{label.name} cut at {label.cut}, fingerprint {label.fingerprint}"


def _of_run(run: Path, cut: Cut | None) -> Served:
    config = load_config(str(run / "config.yaml"))
    model = model_of(run)
    if model is None:
        raise ValueError(_without_model(run, config))
    return serve_model(run, model, config, cut)


def serve_model(run: Path, model: Path, config: Config, cut: Cut | None = None) -> Served:
    """Say what a run's model is, wherever it lies; `cut` is the run's own by default."""
    source = find_source(str(model))
    served = _of_model(run.name, str(model), source, cut or cut_of(config), config)
    return replace(served, run=run, privacy=config.privacy)


def _without_model(run: Path, config: Config) -> str:
    if config.privacy.ends != "plain":
        return (
            f"{run} has no model of its own: its ends are masked (privacy.ends="
            f"{config.privacy.ends}). A site makes one: `graft unmask {run} --site-key FILE --to "
            "DIR`; name that folder"
        )
    if config.aggregation.ends != "average":
        return (
            f"{run} has no model of its own: each client has its own ends (aggregation.ends="
            f"{config.aggregation.ends}), saved at its site with output.share_trunk=true; name "
            "that folder"
        )
    if (last := newest_round(run)) is not None:
        return (
            f"{run} has no model, but a checkpoint of round {last}: `graft export {run} "
            "--format merged --to DIR` makes a model of it"
        )
    return f"{run} has neither a model nor a checkpoint: nothing of it can be used"


def _of_model(
    name: str, text: str, source: Source, cut: Cut, config: Config | None = None
) -> Served:
    whole = outline(source.base)
    if source.adapter is not None:
        check_adapted(source.adapter, whole)
    blocks, hidden_size = count_blocks(whole), width(whole)
    cut.ranges(blocks)  # refuses one that leaves no trunk
    told = config.model if config is not None else ModelConfig(path=text)
    attention = told.attention if has_sdpa(whole.config) else "eager"
    return Served(
        name=name,
        cut=cut,
        description=in_words(whole.config, blocks, hidden_size),
        hidden_size=hidden_size,
        num_blocks=blocks,
        fingerprint=fingerprint(source.base, source.adapter),
        base=source.base,
        adapter=source.adapter,
        tokenizer=_tokenizer(source.adapter or Path(source.base), told.tokenizer),
        attention=attention,
        allow_untested=told.allow_untested,
        privacy=kept_privacy(source.adapter or Path(source.base)),
    )


def _tokenizer(folder: Path, told: str) -> str:
    """A run's model has its tokenizer beside it, if it was saved by this Graft."""
    return "" if any(folder.glob("tokenizer*")) else told


def _attention(folder: str) -> str:
    return "sdpa" if has_sdpa(read_config(folder)) else "eager"


def _loading(served: Served, dtype: str, device: str) -> Loading:
    return {
        "dtype": dtype,
        "attention": served.attention,
        "allow_untested": served.allow_untested,
        "device": device,
    }


def _merged(parts: list[Part], adapter: Path | None) -> list[Part]:
    for part in parts:
        if adapter is not None:
            merge_adapter(part, adapter)
            part.eval()
    return parts


def _needed(served: Served, kind: str, folder: Path | None) -> Path:
    if folder is None:
        other = served.trunk or served.ends
        words = "the trunk" if kind == TRUNK else "a client's ends (bottom, top, tokenizer)"
        raise ValueError(
            f"{other} does not hold {words}: `graft export RUN --format parts` writes {kind}/ "
            "beside it"
        )
    return folder
