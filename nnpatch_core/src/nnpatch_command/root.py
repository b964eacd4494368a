"""The program before its commands: its name, its own options, and the list of commands."""

from __future__ import annotations

import shutil
from importlib import metadata
from typing import Annotated, Literal

import typer

#: Each command, and what its help begins with.
COMMANDS = {
    "run": "Patch a table of prompts, and write outcome, tables, pictures and a report.",
    "merge": "Put the shards of a run together, and write outcome, tables, pictures and a report.",
    "plan": "Say what a run would cost, and whether table and model are fit for it; nothing is "
    "written.",
    "show": "Print the strongest cells of a run, how sure they are, and how they were measured.",
    "compare": "Print where two runs differ most, with the intervals of the differences.",
    "plugins": "List the installed plugins, and what failed to load.",
    "components": "Show where the components of a model are.",
    "check": "Put an adapter through the conformance kit.",
    "new-adapter": "Write a package with an adapter for a model type.",
}
#: So wide must a terminal be for boxes.
_BOXES = 80


def root() -> typer.Typer:
    """The program, as yet without commands."""
    app = typer.Typer(
        name="nnpatch",
        help="Activation patching on Hugging Face language models.",
        epilog="Exit code: 0; 1 where a check or a plugin fails; 2 for a wrong argument or table; "
        "130 after Ctrl-C.",
        pretty_exceptions_enable=False,
        rich_markup_mode=markup(),
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_nnpatch)
    return app


def markup() -> Literal["rich"] | None:
    """How help is laid out: boxes cut names of options where there is no room."""
    return "rich" if shutil.get_terminal_size().columns >= _BOXES else None


def listing() -> typer.Typer:
    """The program with commands that do nothing, for its help."""
    app = root()
    for name, words in COMMANDS.items():
        app.command(name, help=words)(_nothing)
    return app


def _nothing() -> None:
    """Never called: the arguments name no command."""


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"nnpatch-core {metadata.version('nnpatch-core')}")
        raise typer.Exit


def _nnpatch(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Activation patching on Hugging Face language models."""
