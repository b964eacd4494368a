"""Files that are written whole or not at all, whatever is in them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from nnpatch_core._parts import part_of
from nnpatch_core._printable import named, shown
from nnpatch_core.errors import PatchingError

#: Words of every error of `write_whole`: the file is not there, or is as it was before.
UNWRITTEN = "could not be written"


def write_whole(
    path: str | os.PathLike[str], fill: Callable[[Path], object], error: type[PatchingError]
) -> None:
    """Write a file that is whole, or leave the one that was there.

    A link is followed. A new file's mode is what the process's mask leaves, a file that is replaced
    hands its mode on.

    Args:
        path: the file.
        fill: writes the content into an empty file.
        error: raised if it cannot be written.
    """
    target = check_file(path, error)
    if not target.parent.is_dir():
        raise error(f"{named(path)} {UNWRITTEN}: there is no folder {target.parent}")
    try:
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
        with part_of(target) as part:
            usual = stat.S_IMODE(part.stat().st_mode)
            fill(part)
            # Some disks tell only now that they are full.
            _flush(part)
            part.chmod(usual if mode is None else mode)
            part.replace(target)
    except (OSError, SafetensorError) as cause:
        raise error(f"{named(path)} {UNWRITTEN}: {reason(cause)}") from cause


def check_file(path: Any, error: type[PatchingError]) -> Path:
    """The file that a path leads to, links followed, if there is one or can be.

    Args:
        path: a string or a path.
        error: raised if it is neither, or leads to something else than a file.
    """
    if not isinstance(path, str | os.PathLike):
        raise error(f"a file is named by a string or a path, got {shown(path)}")
    name = os.fspath(path)
    if not isinstance(name, str) or not name or "\0" in name:
        raise error(f"a file is named by a string or a path, got {shown(name)}")
    try:
        target = Path(os.path.realpath(name))
        kind = os.lstat(target).st_mode
    except FileNotFoundError:
        if not name.endswith(os.sep):
            return target
        raise error(f"{name!r} is not a file: it names a folder") from None
    except (OSError, ValueError) as cause:
        raise error(f"{name!r} is not a file: {reason(cause)}") from cause
    if not stat.S_ISREG(kind):
        is_folder = stat.S_ISDIR(kind)
        raise error(f"{name!r} is not a file" + ": it is a folder" * is_folder)
    return target


def reason(cause: BaseException) -> str:
    """Give the message of another library's error in one line."""
    message = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    line = " ".join(message.split())[:200].rstrip()
    return named(line) if line else type(cause).__name__


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
