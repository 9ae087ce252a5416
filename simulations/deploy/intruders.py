"""SuperNodes that have no business in a deployment, and why each of them is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simulations.deploy.credentials import make_server_credentials
from simulations.deploy.deployment import START_SECONDS, Deployment
from simulations.launch.local_flower import without_colours
from simulations.launch.processes import Started, wait_until


@dataclass(frozen=True, kw_only=True)
class Intruder:
    """A SuperNode that must not get in."""

    who: str
    node: Started
    expected: str
    """What the line of its output says that gives the reason."""

    def refusal(self, *, seconds: float = START_SECONDS) -> str:
        """Wait for it to give up.

        Parameters
        ----------
        seconds : float
            How long to wait.

        Returns
        -------
        str
            The reason that it was given. A RuntimeError is raised if it was let in, or if it gave
            up for any other reason.
        """
        wait_until(lambda: not self.node.running, seconds=seconds, what=f"{self.who} to be refused")
        lines = without_colours(self.node.tail(200)).splitlines()
        reasons = [line.strip() for line in lines if self.expected in line]
        if not reasons or not self.node.process.returncode:
            raise RuntimeError(
                f"{self.who} was not refused: it ended with exit code "
                f"{self.node.process.returncode} and without '{self.expected}':\n"
                f"{self.node.tail()}"
            )
        return reasons[-1]


def send_intruders(site: Deployment, data: Path) -> list[Intruder]:
    """Start a SuperNode of each kind that a deployment with TLS and node keys refuses.

    Parameters
    ----------
    site : Deployment
        The deployment.
    data : Path
        A data file for them.

    Returns
    -------
    list of Intruder
        They run side by side.
    """
    elsewhere = site.folder / "another-authority"
    elsewhere.mkdir()
    other = make_server_credentials(elsewhere)
    return [
        Intruder(
            who="a SuperNode whose key is not registered",
            node=site.add_node("stranger", data, registered=False),
            expected="Failed to activate SuperNode",
        ),
        # Its key is registered: nothing but the certificate stops it.
        Intruder(
            who="a SuperLink whose certificate another authority signed",
            node=site.add_node("distrustful", data, trust=other.ca),
            expected="CERTIFICATE_VERIFY_FAILED",
        ),
    ]
