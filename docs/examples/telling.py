"""How the examples say what they find: lines of text, and a picture in a folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nnpatch_core import Outcome


def folder(described: str) -> Path:
    """The folder for the pictures, by the command line; it is made where it is missing.

    Args:
        described: the docstring of the script, whose first line is shown by `--help`.
    """
    parser = argparse.ArgumentParser(description=described.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("nnpatch-examples"),
        help="folder for the pictures (default: %(default)s)",
    )
    found: Path = parser.parse_args().out
    found.mkdir(parents=True, exist_ok=True)
    return found


def draw(outcome: Outcome, path: Path) -> None:
    """Write the heatmap of an outcome as a picture."""
    outcome.plot().savefig(path, dpi=80)
    say(f"Picture: {path}")


def row(name: str, values: list[float]) -> None:
    """Print a name, and numbers in columns."""
    say(f"{name:>14}" + "".join(f" {value:6.3f}" for value in values))


def say(text: str) -> None:
    """Print a line at once, in order with the progress bar."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
