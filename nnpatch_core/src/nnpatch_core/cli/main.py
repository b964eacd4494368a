"""Reads the arguments and calls the command; every error is told in lines, never a traceback."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import typer

from nnpatch_command.root import markup, root
from nnpatch_command.start import INTERRUPTED, leave_reader
from nnpatch_core._printable import printable
from nnpatch_core._upstream import disable_progress_bar
from nnpatch_core.cli.check import check
from nnpatch_core.cli.compare import compare
from nnpatch_core.cli.components import components
from nnpatch_core.cli.merge import merge
from nnpatch_core.cli.new_adapter import new_adapter
from nnpatch_core.cli.output import UsageError, first_line, only_ours
from nnpatch_core.cli.plugins import plugins
from nnpatch_core.cli.run import plan, run
from nnpatch_core.cli.show import show
from nnpatch_core.errors import PatchingError, SettingsError, TokensError

#: Everything is as it should be; something is not; the command could not be carried out.
OK, FAILED, USAGE = 0, 1, 2
#: Errors of which every line is a fault of its own.
_LISTED = (SettingsError, TokensError)

app = root()


class _ReaderGoneError(Exception):
    """Nobody reads the output any more."""


class _StoppedError(Exception):
    """Stopped by Ctrl-C."""


def _paragraphs(command: Callable[..., bool]) -> str:
    """The text of a command on itself, a line for each paragraph: terminals differ in width."""
    parts = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(" ".join(part.split()) for part in parts)


def _ours(command: Callable[..., bool]) -> Callable[..., bool]:
    """The command, during which nobody else prints: its own output says all that is wrong."""

    @functools.wraps(command)
    def quiet(*args: Any, **kwargs: Any) -> bool:
        output = sys.stdout
        # The parser has codes of its own for these.
        try:
            with only_ours(), warnings.catch_warnings(action="ignore"):
                done = command(*args, **kwargs)
            output.flush()
        except BrokenPipeError as error:
            raise _ReaderGoneError from error
        except KeyboardInterrupt as stop:
            raise _StoppedError(str(stop) or "interrupted") from stop
        return done

    return quiet


for command in (run, merge, plan, show, compare, plugins, components, check, new_adapter):
    app.command(command.__name__.replace("_", "-"), help=_paragraphs(command))(_ours(command))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 1 where a check or a plugin fails; 2 where the command cannot be carried
        out, and 130 where it was interrupted, which is then said on the standard error.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    app.rich_markup_mode = markup()
    try:
        given = sys.argv[1:] if argv is None else argv
        done: Any = app(list(given), prog_name="nnpatch", standalone_mode=False)
    except (PatchingError, UsageError) as error:
        listed = isinstance(error, _LISTED)
        return _refused(*(str(error).splitlines() if listed else [first_line(str(error))]))
    except _ReaderGoneError:
        leave_reader()
        return OK
    except (_StoppedError, KeyboardInterrupt, typer.Abort) as stop:
        return _refused(str(stop) or "interrupted", code=INTERRUPTED)
    except Exception as error:
        misused = getattr(error, "format_message", None)
        if misused is None:
            return _refused(first_line(f"{type(error).__name__}: {error}"))
        # A wrong option or argument, of the parser below typer.
        context = getattr(error, "ctx", None)
        if context is not None:
            sys.stderr.write(f"{context.get_usage()}\n")
        return _refused(" ".join(misused().split()))
    if isinstance(done, bool):
        return OK if done else FAILED
    return done if isinstance(done, int) else OK


def _refused(*lines: str, code: int = USAGE) -> int:
    first, *rest = lines or ("",)
    sys.stderr.write(f"nnpatch: error: {printable(first)}\n")
    for line in rest:
        sys.stderr.write(f"  {printable(line)}\n")
    return code
