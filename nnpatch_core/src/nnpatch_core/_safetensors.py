"""One safetensors file with JSON in its header: written whole or not at all, read as what it is."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nnpatch_core.errors import PatchingError

_KEY = "nnpatch"


def write_file(
    path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a file that is whole, or leave the one that was there."""
    # safetensors refuses tensors that share memory, as an ablation's two baselines do.
    apart = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / "part"
        save_file(apart, part, metadata={_KEY: json.dumps(header)})
        part.replace(path)


def read_file(
    path: str | os.PathLike[str], form: str, what: str, error: type[PatchingError]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_file` wrote: header and tensors.

    Args:
        path: the file.
        form: what its header must call its format.
        what: what errors call such a file.
        error: raised if it is none.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as cause:
        raise error(f"{os.fspath(path)} is not {what}: {cause}") from cause
    found = header.get("format") if isinstance(header, dict) else None
    if found != form:
        raise error(
            f"{os.fspath(path)} is not {what} of this version: its format is {found!r}, "
            f"this version reads {form!r}"
        )
    return header, tensors
