"""`make deployment-demo`: deploy, show who is refused, run the app, and judge what it left."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from simulations.deploy.deployment import (
    EXPERIMENT,
    START_SECONDS,
    Deployment,
    deployment,
    write_data,
)
from simulations.deploy.intruders import send_intruders
from simulations.deploy.thief import steal_ticket, try_ticket
from simulations.launch.console import Console
from simulations.launch.local_flower import Outcome
from simulations.launch.processes import wait_until
from strategies.transport.tickets import new_key

NODES = ("alder", "birch")
REPLAY_SECONDS = 12.0
"""After which a client has begun the session of the ticket that it was sent."""


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
    guard = "no TLS, no node authentication" if insecure else "TLS, SuperNodes known by their keys"
    say(f"starting a SuperLink on loopback ({guard}) ...")
    with deployment(insecure=insecure) as site:
        for name, data in zip(NODES, write_data(site.folder, NODES), strict=True):
            site.add_node(name, data)
            say(f"SuperNode {name}: {data.stat().st_size:,} bytes of text in {data.name}")
        intruders = [] if insecure else send_intruders(site, data)
        wait_until(
            lambda: site.online() >= len(NODES), seconds=START_SECONDS, what="the SuperNodes"
        )
        for intruder in intruders:
            say(f"refused: {intruder.who}: {intruder.refusal()}")
        if site.online() != len(NODES):
            raise RuntimeError(f"{site.online()} SuperNodes are online, not {len(NODES)}")
        say(
            "both are connected; running the app (a message starts a process: it takes a while) ..."
        )
        link = "link.tls=off" if insecure else "link.tls=on"
        with ThreadPoolExecutor(1) as pool:
            theft = pool.submit(_rob, site.database, say)
            outcome = site.flower.run(
                EXPERIMENT, f"{link} {overrides}".strip(), echo=Console(say, verbose)
            )
            summary = _checked(outcome, site)
            theft.result()
    say("")
    say(
        f"Deployed and trained: held-out loss {summary['eval_loss_first']:.3f} -> "
        f"{summary['eval_loss_last']:.3f} in {summary['rounds']} rounds on "
        f"{summary['clients']} SuperNodes ({', '.join(NODES)}). All processes are stopped."
    )
    assert outcome.folder is not None
    say(f"Results in {outcome.folder}")
    return outcome.folder


def _rob(database: Path, say: Callable[[str], None]) -> None:
    """Steal a ticket of the run and knock at the trunk with it: before its client does, and again.

    The run goes on; that the thief does its client no harm shows when the run is checked.
    """
    stolen, key = steal_ticket(database, seconds=START_SECONDS), new_key()
    say(f"refused: a ticket out of the SuperLink's database: {try_ticket(stolen, key)}")
    time.sleep(REPLAY_SECONDS)
    say(f"refused: the same ticket, replayed: {try_ticket(stolen, key)}")


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
