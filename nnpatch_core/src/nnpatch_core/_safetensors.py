"""One safetensors file with JSON in its header: written whole or not at all, read as what it is."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nnpatch_core._arguments import shown
from nnpatch_core._bytes import bytes_of
from nnpatch_core._parts import part_of
from nnpatch_core.errors import PatchingError

_KEY = "nnpatch"
_WRITER = "nnpatch-core"


def write_file(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    error: type[PatchingError],
) -> None:
    """Write a file that is whole, or leave the one that was there.

    A link is followed. A new file's mode is what the process's mask leaves, a file that is replaced
    hands its mode on.

    Args:
        path: the file.
        header: its format and what else is JSON.
        tensors: by name.
        error: raised if it cannot be written.
    """
    target = check_file(path, error)
    if not target.parent.is_dir():
        raise error(f"{_named(path)} could not be written: there is no folder {target.parent}")
    # safetensors refuses tensors that share memory, as an ablation's two baselines do.
    apart = {key: each.detach().cpu().contiguous().clone() for key, each in tensors.items()}
    whole = {**header, "writer": metadata.version(_WRITER)}
    whole["digest"] = _digest(whole, apart)
    try:
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
        with part_of(target) as part:
            usual = stat.S_IMODE(part.stat().st_mode)
            save_file(apart, part, metadata={_KEY: json.dumps(whole)})
            # Some disks tell only now that they are full.
            _flush(part)
            part.chmod(usual if mode is None else mode)
            part.replace(target)
    except (OSError, SafetensorError) as cause:
        raise error(f"{_named(path)} could not be written: {_reason(cause)}") from cause


def read_file(
    path: str | os.PathLike[str], form: str, what: str, error: type[PatchingError]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_file` wrote: header and tensors.

    Args:
        path: the file.
        form: what its header must call its format.
        what: what errors call such a file.
        error: raised if it is none, or not as it was written.
    """
    target = check_file(path, error)
    if not target.exists():
        raise error(f"{_named(path)} is not {what}: there is no such file")
    try:
        with safe_open(str(target), framework="pt") as file:
            known = file.metadata() or {}
            header = json.loads(known.get(_KEY, "{}"))
            _check_format(path, header, form, what, error)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        told, writer = header.pop("digest", None), header.get("writer")
        found = _digest(header, tensors)
    except error:
        raise
    # Anybody may have written the file, and two parsers look at it.
    except Exception as cause:
        raise error(f"{_named(path)} is not {what}: {_reason(cause)}") from cause
    if set(known) != {_KEY} or not isinstance(writer, str) or told != found:
        raise error(f"{_named(path)} is damaged: its digest is not that of its content")
    del header["writer"]
    return header, tensors


def check_file(path: Any, error: type[PatchingError]) -> Path:
    """The file that a path leads to, links followed, if there is one or can be.

    Args:
        path: a string or a path.
        error: raised if it is neither, or leads to something else than a file.
    """
    if not isinstance(path, str | os.PathLike):
        raise error(f"a file is named by a string or a path, got {shown(path)}")
    named = os.fspath(path)
    if not isinstance(named, str) or not named or "\0" in named:
        raise error(f"a file is named by a string or a path, got {shown(named)}")
    try:
        target = Path(os.path.realpath(named))
        kind = os.lstat(target).st_mode
    except FileNotFoundError:
        if not named.endswith(os.sep):
            return target
        raise error(f"{named!r} is not a file: it names a folder") from None
    except (OSError, ValueError) as cause:
        raise error(f"{named!r} is not a file: {_reason(cause)}") from cause
    if not stat.S_ISREG(kind):
        is_folder = stat.S_ISDIR(kind)
        raise error(f"{named!r} is not a file" + ": it is a folder" * is_folder)
    return target


def _check_format(
    path: str | os.PathLike[str], header: Any, form: str, what: str, error: type[PatchingError]
) -> None:
    found = header.get("format") if isinstance(header, dict) else None
    if found == form:
        return
    told = f"{_named(path)} is not {what} of this version: its format is {shown(found)}, this "
    told += f"version reads {form!r}"
    if isinstance(found, str) and found.rpartition(" ")[0] == form.rpartition(" ")[0]:
        kept = [header, header.get("info"), header.get("identity")]
        names = (each.get(name) for each in kept if isinstance(each, dict) for name in _WRITERS)
        writer = next((name for name in names if isinstance(name, str)), "another version")
        told += f"; it was written by nnpatch-core {shown(writer)}, which reads it"
    raise error(told)


#: Where a header has the version of nnpatch-core that wrote it.
_WRITERS = ("writer", _WRITER)


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Another word for another header, and for other names, types, shapes or bits of tensors."""
    found = hashlib.blake2b(digest_size=16)
    shapes = [[name, str(each.dtype), list(each.shape)] for name, each in sorted(tensors.items())]
    found.update(json.dumps([header, shapes], sort_keys=True).encode())
    for _, tensor in sorted(tensors.items()):
        found.update(bytes_of(tensor).numpy().data)
    return found.hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _named(path: str | os.PathLike[str]) -> str:
    """A path as a message shows it."""
    found = os.fspath(path)
    return found if found.isprintable() else repr(found)


def _reason(cause: BaseException) -> str:
    """An error of another library in one line."""
    found = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    line = " ".join(found.split())[:200]
    return (line if line.isprintable() else repr(line)) or type(cause).__name__
