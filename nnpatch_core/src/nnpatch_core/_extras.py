"""Optional libraries, asked for where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from nnpatch_core.errors import OutcomeError, PatchingError


def extra(module: str, name: str, kind: type[PatchingError] = OutcomeError) -> Any:
    """The module, or an error of a kind that says which extra of nnpatch-core brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise kind(f"this needs {library}: pip install 'nnpatch-core[{name}]'") from error
