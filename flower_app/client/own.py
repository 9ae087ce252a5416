"""Ends that never leave this client (`aggregation.ends`): kept from round to round, and saved.

They lie in Flower's `context.state`, which outlives messages but not the SuperNode's process, nor
the Flower run; so each round's are written to a folder of this site's too, from which a resumed
run takes them up. The server says which round's count: it knows whose answers it took.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flwr.app import RecordDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from conf.load import to_yaml
from conf.schema import Config
from flower_app.data.text import load_tokenizer
from flower_app.export import export_model
from strategies.records import from_arrays, to_arrays

logger = logging.getLogger(__name__)

RECORD = "graft-ends"
"""Begins the names of the records in `context.state`."""


def site_folder(node: Mapping[str, Any], run: str, client: str) -> Path:
    """Where a client keeps its own ends of a run.

    `ends-path` of the node's configuration, by default `$GRAFT_HOME/sites`, holds a folder for each
    run and client.

    Raises
    ------
    ValueError
        If it is a relative path: Flower decides the ClientApp's working folder.
    """
    home = Path(os.environ.get("GRAFT_HOME") or "~/.graft").expanduser()
    parent = Path(str(node.get("ends-path", "")) or home / "sites").expanduser()
    if not parent.is_absolute():
        raise ValueError(
            f"this site would keep its ends in the relative path '{parent}', and Flower does not "
            "run a client in the folder you start it from; give an absolute path as ends-path in "
            "--node-config"
        )
    return parent / run / quote(client, safe=" ")


class OwnEnds:
    """What of one client's ends stays with it during one run.

    Parameters
    ----------
    state : RecordDict
        `context.state`.
    folder : Path
        Of this client and run: `site_folder`.
    run : str
        The run's id. Another run's ends are never taken for this one's.
    """

    def __init__(self, state: RecordDict, folder: Path, run: str) -> None:
        self._state, self.folder, self._run = state, folder, run

    def tensors(self, number: int) -> dict[str, Tensor]:
        """What this client held after round `number`.

        Raises
        ------
        ValueError
            If it is neither in the state nor in the folder: to begin anew would be another run.
        """
        record = self._state.array_records.get(self._record(number))
        if record is not None:
            return from_arrays(record)
        path = self._file(number)
        if not path.is_file():
            raise ValueError(
                f"this site's own ends after round {number} are gone: its SuperNode was started "
                f"anew, or another machine took its place, and {path} is not there (it has "
                f"{self._there()}). Put that folder back, or resume from a checkpoint of a round "
                "that is there, or begin the run anew"
            )
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"this site's own ends after round {number} cannot be read: {path}: {error}. Put "
                "the file back as it was, or resume from a checkpoint of another round"
            ) from error

    def keep(
        self, number: int, tensors: Mapping[str, Tensor], *, base: int, best: int, most: int
    ) -> None:
        """Keep what the client holds after round `number`.

        Parameters
        ----------
        number : int
            The round.
        tensors : mapping
            By their names in the whole model.
        base : int
            The round they were trained from. Those of later rounds never counted, and go.
        best : int
            A round that stays.
        most : int
            How many of those that counted stay: as many as the server keeps checkpoints.
        """
        counted = sorted(each for each in self._rounds() if each <= base)
        stay = {*counted[-most:], best, number}
        self._state[self._record(number)] = to_arrays(tensors)
        for name in [n for n in self._state.array_records if n.startswith(f"{RECORD}/")]:
            if name not in {self._record(each) for each in stay}:
                del self._state[name]
        try:
            self._write(self._file(number), tensors)
            for each in self._files() - stay:
                self._file(each).unlink()
        except (OSError, SafetensorError) as error:
            logger.warning(
                "%s of round %d cannot be kept in %s: %s. The run goes on, but cannot be resumed "
                "at this site from there; mend that, or name another folder as ends-path in "
                "--node-config",
                "the ends", number, self.folder, error,
            )  # fmt: skip

    def export(self, config: Config, number: int, common: Mapping[str, Tensor]) -> Path:
        """Save what this client holds after round `number` as an artifact of its own.

        Parameters
        ----------
        config : Config
            The run's, as this node takes part in it.
        common : mapping
            What of the trained model is the same for all. With the trunk in it
            (`output.share_trunk`) a whole model is saved, as the server does with averaged ends;
            else `ends.safetensors`, by names in the whole model.

        Returns
        -------
        Path
            The model's folder, or the file.
        """
        state = {**common, **self.tensors(number)}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        if config.output.share_trunk:
            tokenizer = load_tokenizer(config.model)
            return export_model(config, state, tokenizer, self.folder / "model")
        self._write(self.folder / "ends.safetensors", state)
        return self.folder / "ends.safetensors"

    def _record(self, number: int) -> str:
        return f"{RECORD}/{self._run}/{number}"

    def _file(self, number: int) -> Path:
        return self.folder / f"round-{number:04d}.safetensors"

    def _files(self) -> set[int]:
        names = (path.stem.removeprefix("round-") for path in self.folder.glob("round-*"))
        return {int(name) for name in names if name.isdecimal()}

    def _rounds(self) -> set[int]:
        start = self._record(0)[:-1]
        held = (name.removeprefix(start) for name in self._state.array_records)
        return self._files() | {int(name) for name in held if name.isdecimal()}

    def _there(self) -> str:
        rounds = ", ".join(map(str, sorted(self._rounds())))
        return f"rounds {rounds}" if rounds else "none of this run"

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.with_name(f".{path.name}.tmp")
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, draft)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
