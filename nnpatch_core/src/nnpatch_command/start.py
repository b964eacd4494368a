"""Begins the program: listens for Ctrl-C, and loads what the command needs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

#: Stopped by Ctrl-C, as shells have it.
INTERRUPTED = 130
#: All that needs no library of ours.
_AT_ONCE = (["--version"], ["--help"], ["-h"])
_TOLD = "nnpatch: error: interrupted; nothing was begun\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Returns:
        The exit code, as `nnpatch_core.cli.main` has it.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    with _stopping_at_once():
        command = _at_once if given in _AT_ONCE else _loaded()
    try:
        return command(given)
    except KeyboardInterrupt:
        sys.stderr.write(_TOLD)
        return INTERRUPTED
    except SystemExit as end:
        # What draws the help ends like this where its reader has gone.
        if isinstance(end.__context__, BrokenPipeError):
            return 0
        raise


def _loaded() -> Callable[[Sequence[str]], int]:
    from nnpatch_core.cli import main  # It takes seconds.

    return main


def _at_once(given: Sequence[str]) -> int:
    from nnpatch_command.root import listing

    try:
        listing()(list(given), prog_name="nnpatch", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        leave_reader()
    return 0


def leave_reader() -> None:
    """Whoever read the output has gone; Python must not fail again when it closes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _stopping_at_once() -> Iterator[None]:
    """End the process at Ctrl-C: an exception may be caught by a library that is just loaded."""
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # Others handle it themselves, or ignore it, as in the background of a shell.
    if not heard or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(*_: Any) -> None:
    os.write(2, _TOLD.encode("ascii"))
    # No file is open yet, and nothing else is to be cleaned up.
    os._exit(INTERRUPTED)
