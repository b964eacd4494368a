"""One safetensors file with JSON in its header: written whole or not at all, read as what it is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from importlib import metadata
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nnpatch_core._bytes import bytes_of
from nnpatch_core._files import check_file, reason, write_whole
from nnpatch_core._printable import named, shown
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
    # safetensors refuses tensors that share memory, as an ablation's two baselines do.
    apart = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    whole = {**header, "writer": metadata.version(_WRITER)}
    whole["digest"] = _digest(whole, apart)
    entries = {_KEY: json.dumps(whole)}
    write_whole(path, lambda part: save_file(apart, part, metadata=entries), error)


def read_file(
    path: str | os.PathLike[str],
    form: str,
    what: str,
    error: type[PatchingError],
    *,
    older: Collection[str] = (),
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header and the tensors that `write_file` wrote.

    Args:
        path: the file.
        form: what its header must call its format.
        what: what errors call such a file.
        error: raised if it is none, or not as it was written.
        older: formats that are read too.
    """
    target = check_file(path, error)
    if not target.exists():
        raise error(f"{named(path)} is not {what}: there is no such file")
    try:
        with safe_open(str(target), framework="pt") as file:
            entries = file.metadata() or {}
            header = json.loads(entries.get(_KEY, "{}"))
            written = header.get("format") if isinstance(header, dict) else None
            if not isinstance(written, str) or written not in older:
                _check_format(path, header, form, what, error)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        written, writer = header.pop("digest", None), header.get("writer")
        digest = _digest(header, tensors)
    except error:
        raise
    # Anybody may have written the file, and two parsers look at it.
    except Exception as cause:
        raise error(f"{named(path)} is not {what}: {reason(cause)}") from cause
    if set(entries) != {_KEY} or not isinstance(writer, str) or written != digest:
        raise error(f"{named(path)} is damaged: its digest is not that of its content")
    del header["writer"]
    return header, tensors


def _check_format(
    path: str | os.PathLike[str], header: Any, form: str, what: str, error: type[PatchingError]
) -> None:
    written = header.get("format") if isinstance(header, dict) else None
    if written == form:
        return
    message = (
        f"{named(path)} is not {what} of this version: its format is {shown(written)}, this "
        f"version reads {form!r}"
    )
    if isinstance(written, str) and written.rpartition(" ")[0] == form.rpartition(" ")[0]:
        parts = [header, header.get("info"), header.get("identity")]
        writers = (part.get(key) for part in parts if isinstance(part, dict) for key in _WRITERS)
        writer = next((name for name in writers if isinstance(name, str)), "another version")
        message += f"; it was written by nnpatch-core {shown(writer)}, which reads it"
        if _number(written) > _number(form):
            message += ": pip install --upgrade nnpatch-core"
    raise error(message)


def _number(form: str) -> int:
    """Which of the formats of its kind this is; 0 of one that has no number."""
    number = form.rpartition(" ")[2]
    return int(number) if number.isascii() and number.isdigit() and len(number) < 9 else 0


#: Where a header has the version of nnpatch-core that wrote it.
_WRITERS = ("writer", _WRITER)


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Digest the header, and the names, types, shapes and bits of the tensors."""
    digest = hashlib.blake2b(digest_size=16)
    in_order = sorted(tensors.items())
    shapes = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in in_order]
    digest.update(json.dumps([header, shapes], sort_keys=True).encode())
    for _, tensor in in_order:
        digest.update(bytes_of(tensor).numpy().data)
    return digest.hexdigest()
