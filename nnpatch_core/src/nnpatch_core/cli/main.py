"""Reads the arguments and calls the command; every error is one line, never a traceback."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata

from nnpatch_core._hints import did_you_mean
from nnpatch_core._printable import printable
from nnpatch_core._upstream import disable_progress_bar
from nnpatch_core.cli import check, components, new_adapter, plugins
from nnpatch_core.cli.output import UsageError, first_line, only_ours
from nnpatch_core.errors import PatchingError

_COMMANDS = (plugins, components, check, new_adapter)
#: Everything is as it should be; something is not; the command could not be carried out.
OK, FAILED, USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 1 where a check or a plugin fails; 2 where the command cannot be carried
        out, which is then said in one line on the standard error.
    """
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        # What is wrong with plugins and models is in the output of the commands.
        with only_ours(), warnings.catch_warnings(action="ignore"):
            done: bool = arguments.run(arguments)
        sys.stdout.flush()
    except (PatchingError, UsageError) as error:
        return _refused(str(error))
    except BrokenPipeError:
        # Whoever read the output has gone; Python must not fail again when it closes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return _refused("interrupted")
    except Exception as error:
        return _refused(f"{type(error).__name__}: {error}")
    return OK if done else FAILED


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; a misspelled command or option is an error that says what is like it."""
    parser, commands = _parser()
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        parser.error(
            f"unknown command {argv[0]!r}; there are {', '.join(commands)}"
            f"{did_you_mean(argv[0], commands)}"
        )
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        # An option may stand before the command, where it is the program's.
        chosen = commands.get(argv[0], parser)
        options = [name for action in chosen._actions for name in action.option_strings]
        hints = (did_you_mean(word.partition("=")[0], options) for word in unknown)
        chosen.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(hints)}")
    return arguments


def _refused(reason: str) -> int:
    sys.stderr.write(f"nnpatch: error: {printable(first_line(reason))}\n")
    return USAGE


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser, and that of each command."""
    parser = argparse.ArgumentParser(
        prog="nnpatch",
        description="Activation patching on Hugging Face language models: plugins and adapters.",
        epilog="Exit code: 0; 1 where a check or a plugin fails; 2 for a wrong argument.",
    )
    version = metadata.version("nnpatch-core")
    parser.add_argument("--version", action="version", version=f"nnpatch-core {version}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_to(commands)
    return parser, commands.choices
