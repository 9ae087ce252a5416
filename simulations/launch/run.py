"""Run an experiment from outside, as `make demo` does, and judge what it left."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conf.schema import Config
from simulations.launch.console import Console
from simulations.launch.local_flower import Outcome, local_superlink
from simulations.launch.machine import check_machine, look_at_machine
from simulations.launch.preflight import FLOWERS_CLIENTS, check_config, check_run

FALL_NATS = 2.0
"""By how much the held-out loss of the demo must fall."""

RAY_LATE = "The current node timed out during startup"
"""Ray gives its processes 30 seconds to start, which a busy machine may miss."""


def run_experiment(
    experiment: str,
    overrides: str = "",
    *,
    clients: int = 0,
    say: Callable[[str], None] = print,
    verbose: bool = False,
) -> Outcome:
    """Run an experiment on a SuperLink of its own and wait for its end.

    Parameters
    ----------
    experiment, overrides : str
        The run's configuration; it is checked before anything is started.
    clients : int
        Simulated clients; 0: Flower's default, two.
    say : callable
        Takes one line for the console.
    verbose : bool
        Show Flower's own lines too.

    Returns
    -------
    Outcome
        A completed run. Any other end raises a RuntimeError.
    """
    federation = _federation(check_run(experiment, overrides, clients), clients, _cpus(say))
    say(f"starting Flower and its simulated clients for experiment '{experiment}' ...")
    return _run(experiment, overrides, "", federation, say, verbose)


def resume_run(
    run: str,
    overrides: str = "",
    *,
    clients: int = 0,
    say: Callable[[str], None] = print,
    verbose: bool = False,
) -> Outcome:
    """Go on with a run that was stopped, on a SuperLink of its own, and wait for its end.

    Parameters
    ----------
    run : str
        A run folder, its name as `graft runs` shows it, or one of its checkpoints.
    overrides : str
        Changes to its configuration.
    clients : int
        Simulated clients; 0: as many as there were.
    say : callable
        Takes one line for the console.
    verbose : bool
        Show Flower's own lines too.

    Returns
    -------
    Outcome
        A completed run. Any other end raises a RuntimeError.
    """
    from flower_app.runs.resume import look_up  # with torch

    point = look_up(run, overrides)
    count = clients or len(point.clients)
    federation = _federation(check_config(point.config, count), count, _cpus(say))
    say(
        f"starting Flower and its simulated clients to go on with {point.run} after round "
        f"{point.number} of {point.config.train.rounds} ..."
    )
    return _run(point.config.experiment, overrides, str(point.source), federation, say, verbose)


def _run(
    experiment: str,
    overrides: str,
    resume: str,
    federation: str,
    say: Callable[[str], None],
    verbose: bool,
) -> Outcome:
    echo = Console(say, verbose)
    try:
        with local_superlink() as flower:

            def run() -> Outcome:
                return flower.run(
                    experiment, overrides, resume=resume, federation=federation, echo=echo
                )

            outcome = run()
            if not outcome.completed and any(RAY_LATE in line for line in outcome.lines):
                say("Ray, which runs the simulated clients, did not come up in time; once more ...")
                outcome = run()
    except (KeyboardInterrupt, SystemExit):
        if echo.folder is not None:
            say(f"stopped; what there is: {echo.folder}")
        raise
    if not outcome.completed:
        raise RuntimeError(f"the run did not complete: {outcome.details} ({outcome.status})")
    outcome.summary()
    return outcome


def _cpus(say: Callable[[str], None]) -> int:
    """The CPUs of a machine on which a simulation can run; a ConfigError for any other."""
    machine = look_at_machine()
    for note in check_machine(machine):
        say(note)
    return machine.cpus


def _federation(config: Config, clients: int, cpus: int) -> str:
    """Value of `--federation-config`: how many clients, and all at once if the run needs that."""
    from strategies.engine.policies.registry import find_policy  # with torch, which takes a while

    count = f"num-supernodes={clients}" if clients else ""
    together = find_policy(config.train.strategy).needs_all_at_once(config.train)
    if together and config.link.transport == "stream":
        how = f"client-resources-num-cpus=1 init-args-num-cpus={clients or FLOWERS_CLIENTS}"
    else:  # Flower gives a client two CPUs, and ends a run where there is one
        how = "" if cpus > 1 else "client-resources-num-cpus=1 init-args-num-cpus=1"
    return f"{count} {how}".strip()


def demo(say: Callable[[str], None] = print, verbose: bool = False) -> Path:
    """Run the demo, check that it learned, and say what to look at and to try next.

    Parameters
    ----------
    say : callable
        Takes one line for the console.
    verbose : bool
        Show Flower's own lines too.

    Returns
    -------
    Path
        The run folder.
    """
    outcome = run_experiment("demo", say=say, verbose=verbose)
    summary, folder = outcome.summary(), outcome.folder
    assert folder is not None
    check_fall(summary, FALL_NATS)
    say("")
    say(
        f"The demo learned: held-out loss {summary['eval_loss_first']:.3f} -> "
        f"{summary['eval_loss_last']:.3f} nats per byte "
        f"(perplexity {summary['eval_perplexity_last']:.2f}) in {summary['rounds']} rounds "
        f"with {summary['clients']} clients."
    )
    say("")
    say(f"Results in {folder}")
    for name, what in _LEFT.items():
        if (folder / name).exists():
            say(f"  {name:<14} {what}")
    say("")
    say("Next:")
    for command, what in _next_commands(folder, summary["rounds"]).items():
        say(f"  {command}  # {what}")
    return folder


def _next_commands(folder: Path, rounds: int) -> dict[str, str]:
    """Commands that go on from a run, as they can be typed here, and what each does."""
    graft = Path(sys.executable).parent / "graft"
    if shutil.which("graft") == str(graft):
        graft = Path("graft")
    elif graft.is_relative_to(Path.cwd()):
        graft = graft.relative_to(Path.cwd())
    run, model = shlex.quote(str(folder)), shlex.quote(str(folder / "model"))
    return {
        f"{graft} resume {run} train.rounds={rounds + 2}": "two more rounds of the same",
        f"{graft} run lora model.path={model}": "LoRA in all three parts, on what the demo learned",
        f"{graft} parity --model {model} --cut 2,1": "the model, split and whole: the same numbers",
        f"{graft} chat {run}": "talk with it: /help there shows what it can do",
    }


def check_fall(summary: dict[str, Any], nats: float) -> None:
    """Raise unless the held-out loss fell by at least so many nats.

    Parameters
    ----------
    summary : dict
        A run's summary.
    nats : float
        The least fall.
    """
    first, last = summary["eval_loss_first"], summary["eval_loss_last"]
    if first is None or last is None or not math.isfinite(first - last):
        raise RuntimeError(f"the run has no held-out loss: first {first}, last {last}")
    if first - last < nats:
        raise RuntimeError(
            f"the held-out loss went from {first:.3f} to {last:.3f}; "
            f"a fall of {nats:g} nats was expected"
        )


_LEFT = {
    "summary.json": "how it ended, in numbers",
    "metrics.jsonl": "every step and round",
    "loss.png": "the loss, drawn",
    "model": "the trained model, for transformers",
    "config.yaml": "the configuration that reproduces it",
}
