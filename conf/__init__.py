"""Configuration of Graft."""

VERSION = "0.1.0"
"""Of Graft, as in pyproject.toml, which an app bundle's code does not read."""
