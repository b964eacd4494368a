"""Writes a file apart until it is whole; the leavings of a kill are cleaned up later."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nnpatch_core.errors import PatchingError

if sys.platform != "win32":  # which has no locks of this kind: nothing is cleaned up there
    import fcntl

_PREFIX = ".nnpatch-unfinished-"


@contextlib.contextmanager
def part_of(target: Path) -> Iterator[Path]:
    """An empty file beside `target`, to be filled and put in its place; gone afterwards."""
    folder, lock = _locked(target.parent)
    try:
        part = folder / "part"
        part.touch()
        yield part
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def clean_up(folder: Path) -> None:
    """Remove from a folder the files that killed processes have left of `part_of` there."""
    with contextlib.suppress(OSError):
        for left in folder.glob(f"{_PREFIX}*"):
            lock = _lock(left, wait=False)
            if lock is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)


def check_folder(folder: Path, error: type[PatchingError]) -> None:
    """Raise `error` unless a file can be made in a folder."""
    if not folder.is_dir():
        raise error(f"there is no folder {str(folder)!r}: make it first")
    try:
        with part_of(folder / "any"):
            pass
    except OSError as cause:
        raise error(f"nothing can be written in {str(folder)!r}: {cause.strerror}") from cause


def _locked(parent: Path) -> tuple[Path, int | None]:
    """A new folder, and its lock, by which others see that somebody is at work there."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = _lock(folder, wait=True)
        # Whoever cleaned up before it was locked has taken it away.
        if folder.is_dir():
            return folder, lock
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A descriptor that holds a folder's lock; None where there is none to be had."""
    if sys.platform == "win32":
        return None
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(lock)
        return None
    return lock
