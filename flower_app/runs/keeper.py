"""Keeps checkpoints while a run goes on; a full disk costs a checkpoint, not the run."""

from __future__ import annotations

import errno
import logging

from conf.load import to_dict
from conf.schema import Config
from flower_app.runs import checkpoint
from flower_app.runs.checkpoint import Facts
from flower_app.runs.folders import folders
from flower_app.runs.recorder import Recorder
from strategies.rounds.splitfed import SplitFed

logger = logging.getLogger(__name__)


class Keeper:
    """Writes a checkpoint after every `output.checkpoint_every` rounds and after the last.

    As soon as the round is trained; what its evaluation came to is added.

    Parameters
    ----------
    config : Config
        The run's.
    recorder : Recorder
        Knows the run folder, and when the run began.
    """

    def __init__(self, config: Config, recorder: Recorder) -> None:
        self._config, self._recorder = config, recorder
        self._owed = False

    def __call__(self, number: int, strategy: SplitFed, *, last: bool = False) -> None:
        """Write a checkpoint if one is due, the run ends, or the last could not be written."""
        run, every = self._recorder.folder, self._config.output.checkpoint_every
        written = number in dict(folders(run))
        last = last or number == self._config.train.rounds
        best = self._config.output.model == "best" and number == strategy.losses.best
        due = best or (every and (not number % every or last or self._owed))
        if not written and not due:
            return
        facts = Facts(
            round=number,
            config=to_dict(self._config),
            clients=strategy.roster.clients,
            loss=strategy.losses.of(number),
            started=self._recorder.started,
            seconds=self._recorder.seconds,
        )
        try:
            self._recorder.sync()  # a checkpoint whose records are lost would leave a gap
            keep = checkpoint.amend if written else checkpoint.write
            keep(run, facts, strategy.state_dict())
            self._owed = False
        except OSError as error:
            self._owed = True
            self._complain(number, error, written=written)
            return
        try:
            checkpoint.prune(run, self._config.output.keep_checkpoints)
        except OSError as error:
            logger.warning("an old checkpoint in %s could not be removed: %s", run, error)

    def _complain(self, number: int, error: OSError, *, written: bool) -> None:
        if written:
            text = "the checkpoint of round %d does not know its evaluation: %s. The run goes on; "
            text += "resumed from there, that round is evaluated again"
            logger.warning(text, number, error)
            return
        kept = [round for round, _ in folders(self._recorder.folder)]
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space on this disk" if full else "mend that"
        logger.warning(
            "no checkpoint of round %d: %s. The run goes on, the last checkpoint is %s; %s, and "
            "the next round is kept again (output.checkpoint_every=0 keeps none, a smaller "
            "output.keep_checkpoints fewer)",
            number,
            error,
            f"that of round {kept[-1]}" if kept else "none",
            remedy,
        )
