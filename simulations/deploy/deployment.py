"""A real deployment on one machine: one SuperLink, SuperNodes with a data file each, the same app.

With TLS on every connection, and SuperNodes that the SuperLink knows by their keys. All on
loopback, or each at a place of its own. Processes, ports, keys and Flower homes are this program's
own and end with it.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from simulations.deploy.credentials import (
    ServerCredentials,
    make_node_key,
    make_server_credentials,
    write_secret,
)
from simulations.launch.local_flower import (
    LocalFlower,
    answers,
    flower_env,
    temporary_folder,
)
from simulations.launch.processes import (
    GRACE_SECONDS,
    LOOPBACK,
    Family,
    Place,
    Started,
    free_ports,
    program,
    stopping,
    wait_until,
)

EXPERIMENT = "deployment"
START_SECONDS = 90.0


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A running SuperLink, and what it takes to add SuperNodes to it and run apps on it."""

    flower: LocalFlower
    folder: Path
    superlink: Place
    port: int
    tls: ServerCredentials | None
    started: Family
    direct: tuple[str, ...] = ()
    """Addresses of the SuperLink and the trunk."""

    def add_node(
        self,
        name: str,
        data: Path,
        *,
        registered: bool = True,
        trust: Path | None = None,
        at: Place = LOOPBACK,
    ) -> Started:
        """Start a SuperNode with its own key, Flower home and data file.

        Parameters
        ----------
        name : str
            Its name, which also names it in the run's records.
        data : Path
            Its data.
        registered : bool
            Make its key known to the SuperLink first.
        trust : Path, optional
            The authority whose certificates it accepts; the SuperLink's own by default.
        at : Place
            Where it runs.

        Returns
        -------
        Started
            The SuperNode.
        """
        home = self.folder / name
        home.mkdir()
        runtime_port = free_ports(1)[0]
        command = [*at.within, program("flower-supernode")]
        command += ["--superlink", f"{self.superlink.address}:{self.port}"]
        command += ["--host", "127.0.0.1", "--port", str(runtime_port)]
        command += ["--node-config", f'name="{name}" data-path="{data}"']
        if self.tls is None:
            command += ["--insecure"]
        else:
            private, public = make_node_key(home, "node")
            if registered:
                self.flower.flwr("supernode", "register", str(public), self.flower.superlink)
            command += ["--root-certificates", str(trust or self.tls.ca)]
            command += ["--auth-supernode-private-key", str(private)]
        return self._start(f"SuperNode {name}", command, home / "node.log")

    def add_trunk(self, at: Place) -> Started:
        """Start what runs the ServerApps, and so the trunk, of a SuperLink that runs none itself.

        Parameters
        ----------
        at : Place
            Where it runs.

        Returns
        -------
        Started
            The SuperExec.
        """
        home = self.folder / "trunk"
        home.mkdir()
        command = [*at.within, program("flower-superexec")]
        command += ["--runtime-api-address", f"{self.superlink.address}:{self.port}"]
        if self.tls is None:
            command += ["--insecure"]
        else:
            command += ["--root-certificates", str(self.tls.ca)]
        command += ["--superexec-auth-secret-file", str(self.secret)]
        return self._start("the trunk", command, home / "trunk.log")

    @property
    def secret(self) -> Path:
        """What a SuperExec elsewhere shows the SuperLink."""
        return self.folder / "superexec.secret"

    @property
    def database(self) -> Path:
        """What the SuperLink keeps its state and its messages in."""
        return self.flower.home / "state.db"

    def _start_superlink(self, *, apart: bool) -> None:
        """Start the SuperLink and wait until it answers; `apart`: its ServerApps run elsewhere."""
        at, tls = self.superlink, self.tls
        command = [*at.within, program("flower-superlink")]
        command += ["--host", at.address, "--port", str(self.port)]
        command += ["--database", str(self.database)]
        if tls is None:
            command += ["--insecure"]
        else:
            command += ["--ssl-ca-certfile", str(tls.ca), "--ssl-certfile", str(tls.certificate)]
            command += ["--ssl-keyfile", str(tls.key), "--enable-supernode-auth"]
        if apart:
            write_secret(self.secret, secrets.token_bytes(32))
            command += ["--isolation", "process"]
            command += ["--superexec-auth-secret-file", str(self.secret)]
        superlink = self._start("the SuperLink", command, self.flower.home / "superlink.log")
        wait_until(
            lambda: _answers(at, self.port, tls),
            seconds=START_SECONDS,
            what="the SuperLink to answer",
            process=superlink,
        )

    def _start(self, name: str, command: list[str], log: Path) -> Started:
        home = log.parent
        env = flower_env(home, direct=self.direct) | self.started.mark
        process = Started(name, command, env=env, log=log, cwd=home)
        self.started.append(process)
        return process

    def cut_off(self, node: Started) -> None:
        """End a SuperNode and all its processes at once, without a good-bye, as a power cut does.

        Parameters
        ----------
        node : Started
            What `add_node` returned.
        """
        assert node in self.started
        parent = psutil.Process(node.process.pid)
        family = [parent, *parent.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.process.wait()
        psutil.wait_procs(family[1:], timeout=GRACE_SECONDS)

    def online(self) -> int:
        """Return how many SuperNodes the SuperLink counts as online."""
        listed = self.flower.flwr("supernode", "list", self.flower.superlink, "--format", "json")
        nodes = json.loads(listed)["nodes"]
        return sum(node["status"] == "online" for node in nodes)

    def explain(self) -> str:
        """Return the end of what every process printed."""
        return "\n".join(f"--- {each.name}\n{each.tail(15)}" for each in self.started)


@contextlib.contextmanager
def deployment(
    *, insecure: bool = False, at: Place = LOOPBACK, trunk: Place | None = None
) -> Iterator[Deployment]:
    """Start a SuperLink on a free port.

    Parameters
    ----------
    insecure : bool
        Without TLS and without node authentication.
    at : Place
        Where it runs; `flwr` is called there too.
    trunk : Place, optional
        Where the ServerApp runs, if not beside the SuperLink.

    Yields
    ------
    Deployment
        Everything started through it is stopped when the context is left, however it is left.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(temporary_folder()))
        home, port = folder / "superlink", free_ports(1)[0]
        home.mkdir()
        tls = None
        if not insecure:
            tls = make_server_credentials(home, sorted({LOOPBACK.address, at.address}))
        started = stack.enter_context(stopping(folder))
        direct = (at.address, *([] if trunk is None else [trunk.address]))
        flower = LocalFlower(
            home=home,
            env=flower_env(home, direct=direct) | started.mark,
            superlink="deployment",
            within=at.within,
        )
        (home / "config.toml").write_text(_connection(at, port, tls), encoding="utf-8")
        site = Deployment(
            flower=flower,
            folder=folder,
            superlink=at,
            port=port,
            tls=tls,
            started=started,
            direct=direct,
        )
        site._start_superlink(apart=trunk is not None)
        if trunk is not None:
            site.add_trunk(trunk)
        yield site


def write_data(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Write a jsonl file of English text for each node: Python's help topics, dealt out in turn.

    Parameters
    ----------
    folder : Path
        Where the files go.
    names : tuple of str
        One for each file.

    Returns
    -------
    list of Path
        The files; each line holds a `text`.
    """
    from pydoc_data.topics import topics

    texts = sorted(set(topics.values()))  # some topics share a text, and nodes must not
    files = []
    for index, name in enumerate(names):
        lines = (json.dumps({"text": text}) for text in texts[index :: len(names)])
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        files.append(path)
    return files


def _connection(at: Place, port: int, tls: ServerCredentials | None) -> str:
    trust = "insecure = true" if tls is None else f"root-certificates = {json.dumps(str(tls.ca))}"
    return (
        '[superlink]\ndefault = "deployment"\n\n[superlink.deployment]\n'
        f'address = "{at.address}:{port}"\n{trust}\n'
    )


def _answers(at: Place, port: int, tls: ServerCredentials | None) -> bool:
    """Return whether a SuperLink is up, as seen from where it runs."""
    if at.within:
        knock = f"import socket; socket.create_connection(({at.address!r}, {port}), 2)"
        command = [*at.within, sys.executable, "-S", "-c", knock]
        return not subprocess.run(command, capture_output=True, check=False).returncode
    trust = None if tls is None else ssl.create_default_context(cafile=str(tls.ca))
    scheme = "http" if tls is None else "https"
    return answers(f"{scheme}://{at.address}:{port}/health", trust)
