"""What a site insists on: the least that a run's `privacy` must be, in its node's own words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from conf.sections.privacy import GAUSSIAN, PrivacyConfig

NODE_SETTING = "privacy-require"
"""In a node's configuration: settings of `privacy`, as ``defence=gaussian clip=4 noise=0.05``."""
AT_MOST = ("clip", "clip_gradient", "update_clip", "delta")
"""Where less is stronger, and 0 is none. Other numbers are stronger the larger they are."""
BESIDE = {
    "unit": ("defence", *GAUSSIAN),
    "weight": ("defence",),
    "delta": ("noise", "noise_gradient", "update_noise"),
}
"""What a run has without any defence, and beside what it counts."""


def refuse_weaker(privacy: PrivacyConfig, node: Mapping[str, Any]) -> None:
    """Refuse a run that protects less than this node's configuration demands.

    Raises
    ------
    ValueError
        If it does, or the demand cannot be read: what nobody understands protects nobody.
    """
    for name, wanted in _read(node.get(NODE_SETTING, "")).items():
        has = getattr(privacy, name)
        if not _as_strong(name, has, wanted):
            least = _shown(name, wanted)
            raise ValueError(
                f"{NODE_SETTING} in this node's config demands {least}, and this run has privacy."
                f"{name}={_text(has)}: start it with privacy.{name}={_text(wanted)}, or change "
                f"{NODE_SETTING}"
            )


def _as_strong(name: str, has: Any, wanted: Any) -> bool:
    if isinstance(wanted, str):
        return bool(has == wanted)
    if name in AT_MOST:
        return bool(0 < has <= wanted)
    return bool(has >= wanted)


def _read(demand: Any) -> dict[str, Any]:
    if not isinstance(demand, str):
        raise ValueError(f"{NODE_SETTING}={demand!r} in this node's config is no text")
    kinds = {field.name: type(field.default) for field in fields(PrivacyConfig)}
    wanted: dict[str, Any] = {}
    for word in demand.split():
        name, equals, value = word.partition("=")
        if not equals or name not in kinds or name in wanted:
            raise ValueError(
                f"{NODE_SETTING} in this node's config says {word!r}: it takes NAME=VALUE, each "
                f'once, of {", ".join(kinds)}, as "defence=gaussian clip=4 noise=0.05"'
            )
        wanted[name] = value if kinds[name] is str else _number(name, value)
    for name, others in BESIDE.items():
        if name in wanted and not wanted.keys() & {*others}:
            raise ValueError(
                f"{NODE_SETTING} in this node's config demands {name}, which does nothing by "
                f"itself: demand {' or '.join(others)} beside it"
            )
    return wanted


def _number(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise ValueError(
            f"{NODE_SETTING} in this node's config says {name}={value}: it must be a number above 0"
        )
    return number


def _shown(name: str, wanted: Any) -> str:
    if isinstance(wanted, str):
        return f"{name}={wanted}"
    return f"{name} of at {'most' if name in AT_MOST else 'least'} {wanted:g}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"
