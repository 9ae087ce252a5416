"""Puts the model of a run with masked ends together, for who has the sites' key."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from conf.load import load_config
from flower_app.beside import keep_privacy
from flower_app.client.masked import reveal
from flower_app.client.perturbed import fold
from flower_app.client.site_key import read_site_key
from flower_app.data.tokenizer import load_tokenizer
from flower_app.export import assemble, export_model
from flower_app.runs.folders import COMMON, MASKED
from flower_app.serving.source import find_run_folder
from strategies.aggregate.masked import take_masked


def unmask(text: str, key: Path, to: Path) -> Path:
    """Export the model of a run of ``privacy.ends=masked``.

    Parameters
    ----------
    text : str
        The run, as for `find_run_folder`.
    key : Path
        The sites' key.
    to : Path
        The folder; not the run's, which is the server's.

    Raises
    ------
    ValueError
        If it is no such run, its key is another, or the folder is taken.
    """
    run = find_run_folder(text)
    if run is None or not (run / MASKED).is_file():
        raise ValueError(
            f"{text} has no masked ends ({MASKED}): it is no run of privacy.ends=masked, has not "
            "ended (`graft resume` ends it), or saved no model (output.save_model=false)"
        )
    if to.exists():
        raise ValueError(f"{to} is there already: take another --to")
    found, _ = take_masked(load_file(run / MASKED))
    assert found is not None
    site = read_site_key(key)
    state = {**load_file(run / COMMON), **reveal(found, site)}
    config = load_config(str(run / "config.yaml"))
    tokenizer = load_tokenizer(config.model)
    if not config.privacy.perturb:
        return export_model(config, state, tokenizer, to)
    whole = assemble(config, state)  # no adapter holds it
    fold(whole, site, config.privacy.perturb)
    whole.save_pretrained(to)
    tokenizer.save_pretrained(to)
    keep_privacy(config.privacy, to)
    return to
