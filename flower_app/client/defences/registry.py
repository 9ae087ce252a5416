"""The defences that `privacy.defence` may name: all that this folder holds."""

from __future__ import annotations

from conf.registry import kinds
from conf.rules import check_known
from conf.sections.privacy import PrivacyConfig
from flower_app.client.defences.defence import Defence

NONE = "none"


def defences() -> dict[str, type[Defence]]:
    """Every defence by its name."""
    return kinds(__name__.rpartition(".")[0], Defence)


def find_defence(name: str) -> type[Defence] | None:
    """The defence of a name, None for `none`; `ConfigError` with the nearest one if there is
    none of that name."""
    found = defences()
    check_known("privacy.defence", name, [NONE, *found])
    return found.get(name)


def make_defence(config: PrivacyConfig, secret: bytes) -> Defence | None:
    """The configured defence of one client; None if there is none."""
    kind = find_defence(config.defence)
    return kind(config, secret) if kind else None
