"""A real deployment on loopback: one SuperLink, SuperNodes with a data file each, the same app.

With TLS on every connection, and SuperNodes that the SuperLink knows by their keys. Processes,
ports, keys and Flower homes are this program's own and end with it.
"""

from __future__ import annotations

import contextlib
import json
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from simulations.credentials import ServerCredentials, make_node_key, make_server_credentials
from simulations.local_flower import (
    LocalFlower,
    Outcome,
    answers,
    flower_env,
    temporary_folder,
    worth_reading,
)
from simulations.processes import (
    GRACE_SECONDS,
    Started,
    free_ports,
    program,
    stopping,
    wait_until,
)

EXPERIMENT = "deployment"
NODES = ("alder", "birch")
START_SECONDS = 90.0


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A running SuperLink, and what it takes to add SuperNodes to it and run apps on it."""

    flower: LocalFlower
    folder: Path
    port: int
    tls: ServerCredentials | None
    started: list[Started]

    def add_node(self, name: str, data: Path, *, registered: bool = True) -> Started:
        """Start a SuperNode with its own key, Flower home and data file.

        Parameters
        ----------
        name : str
            Its name, which also names it in the run's records.
        data : Path
            Its data.
        registered : bool
            Make its key known to the SuperLink first.

        Returns
        -------
        Started
            The SuperNode.
        """
        home = self.folder / name
        home.mkdir()
        runtime_port = free_ports(1)[0]
        command = [program("flower-supernode"), "--superlink", f"127.0.0.1:{self.port}"]
        command += ["--host", "127.0.0.1", "--port", str(runtime_port)]
        command += ["--node-config", f'name="{name}" data-path="{data}"']
        if self.tls is None:
            command += ["--insecure"]
        else:
            private, public = make_node_key(home, "node")
            if registered:
                self.flower.flwr("supernode", "register", str(public), self.flower.superlink)
            command += ["--root-certificates", str(self.tls.ca)]
            command += ["--auth-supernode-private-key", str(private)]
        node = Started(
            f"SuperNode {name}", command, env=flower_env(home), log=home / "node.log", cwd=home
        )
        self.started.append(node)
        return node

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
def deployment(*, insecure: bool = False) -> Iterator[Deployment]:
    """Start a SuperLink on a free port of loopback.

    Parameters
    ----------
    insecure : bool
        Without TLS and without node authentication.

    Yields
    ------
    Deployment
        Everything started through it is stopped when the context is left, however it is left.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(temporary_folder()))
        home, port = folder / "superlink", free_ports(1)[0]
        home.mkdir()
        tls = None if insecure else make_server_credentials(home)
        flower = LocalFlower(home=home, env=flower_env(home), superlink="deployment")
        (home / "config.toml").write_text(_connection(port, tls), encoding="utf-8")
        started = stack.enter_context(stopping())
        command = [program("flower-superlink"), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--database", str(home / "state.db")]
        if tls is None:
            command += ["--insecure"]
        else:
            command += ["--ssl-ca-certfile", str(tls.ca), "--ssl-certfile", str(tls.certificate)]
            command += ["--ssl-keyfile", str(tls.key), "--enable-supernode-auth"]
        superlink = Started(
            "the SuperLink", command, env=flower.env, log=home / "superlink.log", cwd=home
        )
        started.append(superlink)
        trust = None if tls is None else ssl.create_default_context(cafile=str(tls.ca))
        address = f"{'http' if tls is None else 'https'}://127.0.0.1:{port}/health"
        wait_until(
            lambda: answers(address, trust),
            seconds=START_SECONDS,
            what="the SuperLink to answer",
            process=superlink,
        )
        yield Deployment(flower=flower, folder=folder, port=port, tls=tls, started=started)


def deployment_demo(
    *,
    insecure: bool = False,
    say: Callable[[str], None] = print,
    verbose: bool = False,
    overrides: str = "",
) -> Path:
    """Deploy two SuperNodes, run the app on them, and check what it left.

    Parameters
    ----------
    insecure : bool
        Without TLS and without node authentication.
    say : callable
        Takes one line for the console.
    verbose : bool
        Show Flower's own lines too.
    overrides : str
        Changes to the experiment.

    Returns
    -------
    Path
        The run folder.
    """

    def echo(line: str) -> None:
        if verbose or worth_reading(line):
            say(line)

    guard = "no TLS, no node authentication" if insecure else "TLS, SuperNodes known by their keys"
    say(f"starting a SuperLink on loopback ({guard}) ...")
    with deployment(insecure=insecure) as site:
        for name, data in zip(NODES, write_data(site.folder, NODES), strict=True):
            site.add_node(name, data)
            say(f"SuperNode {name}: {data.stat().st_size:,} bytes of text in {data.name}")
        wait_until(
            lambda: site.online() == len(NODES), seconds=START_SECONDS, what="the SuperNodes"
        )
        say(
            "both are connected; running the app (a message starts a process: it takes a while) ..."
        )
        link = "link.tls=off" if insecure else "link.tls=on"
        outcome = site.flower.run(EXPERIMENT, f"{link} {overrides}".strip(), echo=echo)
        summary = _checked(outcome, site)
    say("")
    say(
        f"Deployed and trained: held-out loss {summary['eval_loss_first']:.3f} -> "
        f"{summary['eval_loss_last']:.3f} in {summary['rounds']} rounds on "
        f"{summary['clients']} SuperNodes ({', '.join(NODES)}). All processes are stopped."
    )
    assert outcome.folder is not None
    say(f"Results in {outcome.folder}")
    return outcome.folder


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


def _checked(outcome: Outcome, site: Deployment) -> dict[str, Any]:
    """Return the summary of a run in which both nodes took part and the loss fell."""
    if not outcome.completed:
        raise RuntimeError(f"the run did not complete: {outcome.explain()}\n{site.explain()}")
    summary = outcome.summary()
    if summary["clients"] != len(NODES):
        raise RuntimeError(
            f"{summary['clients']} of {len(NODES)} SuperNodes took part\n{site.explain()}"
        )
    first, last = summary["eval_loss_first"], summary["eval_loss_last"]
    if first is None or last is None or not last < first:
        raise RuntimeError(f"the held-out loss did not fall: first {first}, last {last}")
    return summary


def _connection(port: int, tls: ServerCredentials | None) -> str:
    trust = "insecure = true" if tls is None else f"root-certificates = {json.dumps(str(tls.ca))}"
    return (
        '[superlink]\ndefault = "deployment"\n\n[superlink.deployment]\n'
        f'address = "127.0.0.1:{port}"\n{trust}\n'
    )
