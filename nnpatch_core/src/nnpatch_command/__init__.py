"""The program `nnpatch`, up to where its libraries are loaded.

It is no part of `nnpatch_core`, whose import takes seconds: Ctrl-C is heard from the first moment
on, and `--version` and `--help` need none of it.
"""

from nnpatch_command.start import main

__all__ = ["main"]
