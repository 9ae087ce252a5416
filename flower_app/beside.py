"""What lies beside a saved model for who generates with it: the run's `privacy`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from conf.rules import ConfigError
from conf.sections.privacy import PrivacyConfig
from flower_app.client.defences.registry import NONE

FILE = "privacy.json"


def keep_privacy(privacy: PrivacyConfig, folder: Path) -> None:
    """Write what is done to all that leaves a client, if anything is."""
    if privacy.defence != NONE:
        text = json.dumps(asdict(privacy), indent=2) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")


def kept_privacy(folder: Path) -> PrivacyConfig:
    """What `keep_privacy` wrote into a model's folder; nothing is done where it wrote none.

    Raises
    ------
    ValueError
        If it cannot be read: nobody may generate without the defence for that.
    """
    try:
        return PrivacyConfig(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return PrivacyConfig()
    except (OSError, TypeError, ValueError, ConfigError) as error:
        raise ValueError(
            f"{folder / FILE} says what is done to all that leaves a client, and cannot be read: "
            f"{error}. Export the model anew"
        ) from error
