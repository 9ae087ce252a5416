"""Run the app with `flwr run` against a SuperLink of one's own, and learn how it ended.

A SuperLink that Flower starts by itself stays up, keeps its state in `~/.flwr`, and is shared by
every run on the machine. Tests, demos and sweeps must not meet it, so they bring their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simulations.launch.machine import look_at_machine
from simulations.launch.processes import Started, free_ports, program, stopping, wait_until

PROJECT = Path(__file__).resolve().parents[2]
COMPLETED = "finished:completed"

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CHATTER = re.compile(
    r"^(INFO|WARNING|DEBUG) *:|^\s*$|^\((raylet|pid=|ClientAppActor pid=\d+\) WARNING)"
    r"|^Successfully (installed|started)|^Using SuperLink|^Flower configuration not found"
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    run_id: str
    status: str
    """`finished:completed`, or Flower's other words."""
    details: str
    folder: Path | None
    """The run folder, if the run came so far."""
    lines: list[str] = field(repr=False)
    """Everything that was streamed."""

    @property
    def completed(self) -> bool:
        """Whether Flower saw the run through."""
        return self.status == COMPLETED

    def summary(self) -> dict[str, Any]:
        """Return the run's summary; an error in words if the run did not get there."""
        path = None if self.folder is None else self.folder / "summary.json"
        if path is None or not path.exists():
            raise RuntimeError(f"run {self.run_id} left no summary: {self.explain()}")
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def explain(self) -> str:
        """Return status, details and the end of the output."""
        tail = "\n".join(self.lines[-30:])
        return f"status {self.status} ({self.details}); the end of its output:\n{tail}"


@dataclass(frozen=True, kw_only=True)
class LocalFlower:
    """A Flower home, and the environment that leads `flwr` to it."""

    home: Path
    env: Mapping[str, str]
    superlink: str = "local"
    """Name of the connection in the home's config.toml."""
    within: tuple[str, ...] = ()
    """What precedes its commands: `ip netns exec NAME` runs them on another host."""

    def run(
        self,
        experiment: str,
        overrides: str = "",
        *,
        resume: str = "",
        federation: str = "",
        app: Path = PROJECT,
        echo: Callable[[str], None] | None = None,
        started: Callable[[subprocess.Popen[str]], None] | None = None,
    ) -> Outcome:
        """Run an app and wait for its end.

        Parameters
        ----------
        experiment, overrides : str
            The run's configuration.
        resume : str
            A run folder, or one of its checkpoints, to go on from; `experiment` is not read then.
        federation : str
            Value of `--federation-config`, such as `num-supernodes=4`.
        app : Path
            Folder of the app.
        echo : callable, optional
            Takes each line as it arrives.
        started : callable, optional
            Takes the process that waits for the run; to end it ends the waiting.

        Returns
        -------
        Outcome
            How it ended.
        """
        # A file, because `--run-config` has no way to write a quote within a value.
        config = self.home / "run-config.toml"
        config.write_text(
            f"experiment = {json.dumps(experiment)}\noverrides = {json.dumps(overrides)}\n"
            f"resume = {json.dumps(resume)}\n",
            encoding="utf-8",
        )
        command = [*self.within, program("flwr"), "run", str(app), self.superlink, "--stream"]
        command += ["--run-config", str(config)]
        if federation:
            command += ["--federation-config", federation]
        lines = list(self._stream(command, echo, started))
        run_id = run_id_in(lines)
        if run_id is None:
            raise RuntimeError("`flwr run` started nothing:\n" + "\n".join(lines[-30:]))
        return self._outcome(run_id, lines)

    def follow(
        self,
        run_id: str,
        *,
        echo: Callable[[str], None] | None = None,
        started: Callable[[subprocess.Popen[str]], None] | None = None,
    ) -> Outcome:
        """Wait for the end of a run that was started before, as `run` does."""
        command = [*self.within, program("flwr"), "log", run_id, self.superlink, "--stream"]
        return self._outcome(run_id, list(self._stream(command, echo, started)))

    def status(self, run_id: str) -> tuple[str, str]:
        """Return a run's status and its details, in Flower's words."""
        answer = self.flwr("list", self.superlink, "--run-id", run_id, "--format", "json")
        run = json.loads(answer)["runs"][0]
        return run["status"], run["status-details"]

    def _outcome(self, run_id: str, lines: list[str]) -> Outcome:
        status, details = self.status(run_id)
        folder = _first(r"^run folder: (.+)$", lines)
        return Outcome(
            run_id=run_id,
            status=status,
            details=details,
            folder=None if folder is None else Path(folder),
            lines=lines,
        )

    def flwr(self, *arguments: str) -> str:
        """Run a `flwr` command.

        Parameters
        ----------
        *arguments : str
            What follows `flwr`.

        Returns
        -------
        str
            What it printed.
        """
        done = subprocess.run(
            [*self.within, program("flwr"), *arguments],
            env=dict(self.env),
            cwd=self.home,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"flwr {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def _stream(
        self,
        command: list[str],
        echo: Callable[[str], None] | None,
        started: Callable[[subprocess.Popen[str]], None] | None,
    ) -> Iterator[str]:
        with subprocess.Popen(
            command,
            env=dict(self.env),
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            if started is not None:
                started(process)
            try:
                for line in process.stdout:
                    plain = without_colours(line.rstrip("\n"))
                    if echo is not None:
                        echo(plain)
                    yield plain
            except BaseException:
                process.terminate()
                raise


@contextlib.contextmanager
def local_superlink(folder: Path | None = None) -> Iterator[LocalFlower]:
    """Bring up a SuperLink in simulation mode, on a free port and with a home of its own.

    Parameters
    ----------
    folder : Path, optional
        Its home; by default a temporary one, removed at the end.

    Yields
    ------
    LocalFlower
        Runs apps on it. The SuperLink is stopped when the context is left, however it is left.
    """
    with contextlib.ExitStack() as stack:
        home = folder or Path(stack.enter_context(temporary_folder()))
        home.mkdir(parents=True, exist_ok=True)
        ray, port = (
            Path(stack.enter_context(temporary_folder(look_at_machine().temporary))),
            free_ports(1)[0],
        )
        started = stack.enter_context(stopping(ray, *([] if folder else [home])))
        env = flower_env(home) | started.mark
        env |= {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port), "RAY_TMPDIR": str(ray)}
        command = [program("flower-superlink"), "--insecure", "--simulation"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        command += ["--database", str(home / "state.db")]
        superlink = Started("the SuperLink", command, env=env, log=home / "superlink.log", cwd=home)
        started.append(superlink)
        wait_until(
            lambda: answers(f"http://127.0.0.1:{port}/health"),
            seconds=60,
            what="the SuperLink to answer",
            process=superlink,
        )
        yield LocalFlower(home=home, env=env)


def flower_env(home: Path, *, direct: Sequence[str] = ()) -> dict[str, str]:
    """Return the environment in which Flower's commands use a home of their own.

    Parameters
    ----------
    home : Path
        The Flower home.
    direct : sequence of str
        Hosts, beside loopback, that are reached without a proxy.

    Returns
    -------
    dict
        A copy of this process's environment, changed.
    """
    # Flower starts its other programs by name, so the environment's programs must come first.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    no_proxy = [os.environ.get("NO_PROXY"), "127.0.0.1", "localhost", *direct]
    here = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return here | {  # not on a Ray cluster that this user has elsewhere
        "PATH": path,
        "NO_PROXY": ",".join(filter(None, no_proxy)),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # what is installed is what was tested
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning of Ray
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
    }


def answers(url: str, context: Any = None) -> bool:
    """Return whether a GET of the address succeeds.

    Parameters
    ----------
    url : str
        The address.
    context : ssl.SSLContext, optional
        Which certificates are trusted.

    Returns
    -------
    bool
        True if the answer is 2xx.
    """
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    try:
        with direct.open(url, timeout=2) as answer:
            return bool(answer.status < 300)
    except (urllib.error.URLError, OSError):
        return False


def temporary_folder(parent: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder that tolerates a last write while it is removed."""
    return tempfile.TemporaryDirectory(prefix="graft-", dir=parent, ignore_cleanup_errors=True)


def without_colours(text: str) -> str:
    """Return text without the escape sequences that colour it.

    Parameters
    ----------
    text : str
        What a Flower program printed.

    Returns
    -------
    str
        The same, plain.
    """
    return _COLOUR.sub("", text)


def worth_reading(line: str) -> bool:
    """Return whether a streamed line is the app's or an error, and not Flower's housekeeping.

    Parameters
    ----------
    line : str
        A line without colours.

    Returns
    -------
    bool
        False for Flower's and Ray's notices.
    """
    return _CHATTER.search(line) is None


def run_id_in(lines: list[str]) -> str | None:
    """Return the run that `flwr run` says it has started; None if it has not yet."""
    return _first(r"Successfully started run (\d+)", lines)


def _first(pattern: str, lines: list[str]) -> str | None:
    matches = (re.search(pattern, line) for line in lines)
    return next((match.group(1) for match in matches if match), None)
