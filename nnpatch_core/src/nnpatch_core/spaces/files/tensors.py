"""Reading what others have written: JSON, safetensors, and state dicts, of which no code runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import safe_open
from torch import Tensor

from nnpatch_core._files import reason
from nnpatch_core._printable import named, shown
from nnpatch_core.errors import SubspaceError

#: A `config.json` is never so large.
_MOST = 10_000_000


@attrs.frozen(eq=False)
class Tensors:
    """The content of a file of tensors.

    Args:
        header: what nnpatch has written beside them, an empty mapping if nothing.
        by_name: the tensors.
    """

    header: Any
    by_name: Mapping[str, Tensor]


def json_of(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        SubspaceError: it is none.
    """
    try:
        if file.stat().st_size > _MOST:
            raise SubspaceError(f"{named(file)} is larger than any config.json")
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as cause:
        if isinstance(cause, SubspaceError):
            raise
        raise SubspaceError(f"{named(file)} is not JSON: {reason(cause)}") from cause


def tensors_in(file: Path) -> Tensors:
    """The tensors of a safetensors file, or of a state dict that torch has saved.

    Raises:
        SubspaceError: it is neither, or a state dict with something else in it than tensors.
    """
    if file.suffix == ".safetensors":
        return _safetensors(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as cause:
        raise SubspaceError(f"{named(file)} cannot be read: {reason(cause)}") from cause
    # Anybody may have written the file.
    except Exception as cause:
        raise SubspaceError(
            f"{named(file)} is not a state dict that can be read without running code of it: "
            f"{reason(cause)}"
        ) from cause
    if not isinstance(found, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()
    ):
        raise SubspaceError(f"{named(file)} is no state dict of tensors, but {shown(found)}")
    plain = {
        key: value
        for key, value in found.items()
        if value.layout == torch.strided and not value.is_quantized and not value.is_meta
    }
    if len(plain) < len(found):
        raise SubspaceError(f"{named(file)} has tensors that are sparse, quantised or empty")
    return Tensors({}, {key: value.detach() for key, value in plain.items()})


def _safetensors(file: Path) -> Tensors:
    try:
        with safe_open(str(file), framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get("nnpatch", "{}"))
            names = opened.keys()
            return Tensors(header, {name: opened.get_tensor(name) for name in names})
    except Exception as cause:
        raise SubspaceError(f"{named(file)} is not a safetensors file: {reason(cause)}") from cause
