"""The `graft` command: puts together the commands of this folder's files.

A file with `commands = typer.Typer()` is a part of it. Each command imports what it needs, so that
`graft --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

import simulations.cli

PANELS = ("Run", "Use", "Look", "Check and measure")
"""Of `graft --help`, in order; those of other files follow."""


class _Plain(TyperGroup):
    """Print an error that is the user's to mend as one line instead of a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Commands by panel, then in the order of files and of what is in them."""
        panels = {
            name: getattr(each, "rich_help_panel", "") for name, each in self.commands.items()
        }
        return sorted(panels, key=lambda name: _place(panels[name]))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; ValueError and OSError end it with code 2, RuntimeError with 1.

        `graft --verbose` shows the traceback.
        """
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # how commands end, not errors, though RuntimeErrors and an OSError
        except (ValueError, OSError, RuntimeError) as error:
            if ctx.params.get("verbose"):
                raise
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(1 if isinstance(error, RuntimeError) else 2) from None


def _place(panel: Any) -> int:
    return PANELS.index(panel) if panel in PANELS else len(PANELS)


def build() -> typer.Typer:
    """Return the command with whatever the files of this folder add to it."""
    graft = typer.Typer(
        cls=_Plain,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        help="Federated split learning of transformers: clients keep their data and the ends of "
        "the model, the server trains the middle.\n\n"
        "Start with [bold]graft demo[/bold]. Runs of your own: [bold]graft run[/bold], or "
        "[bold]flwr run . --stream[/bold] in the project folder.",
    )
    graft.callback()(configure)
    for name in sorted(each.name for each in pkgutil.iter_modules(simulations.cli.__path__)):
        if name != "app":
            module = importlib.import_module(f"{simulations.cli.__name__}.{name}")
            if hasattr(module, "commands"):
                graft.add_typer(module.commands)
    return graft


def configure(
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show what libraries log, and tracebacks.")
    ] = False,
) -> None:
    """Set up logging, which only entry points do."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars among the results
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")


app = build()


if __name__ == "__main__":
    app()
