"""The command line: `nnpatch plugins`, `components`, `check` and `new-adapter`."""

from nnpatch_core.cli.main import main

__all__ = ["main"]
