"""The models and adapters that the arguments of commands name."""

from __future__ import annotations

import importlib
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnpatch_core._upstream import AutoConfig, AutoModelForCausalLM
from nnpatch_core.cli.output import UsageError
from nnpatch_core.model_api import ModelAPI
from nnpatch_core.plugins.lookup import find_adapter
from nnpatch_core.testing.models import causal_model_types, tiny_model

MODEL_HELP = (
    "a model's folder, a config.json, a model type such as llama (then a tiny random model), or "
    "the name of a model on the Hugging Face hub"
)


def find_api(name: str) -> ModelAPI:
    """The adapter of a registered name, or the attribute that `module:attribute` names."""
    module, separator, attribute = name.partition(":")
    if not separator:
        return find_adapter(name)
    # As with `python -m`, one's own module is looked for in the current folder, too.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{name!r} cannot be imported: {type(error).__name__}: {error}") from error
    return find_adapter(found)


def weightless(name: str) -> nn.Module:
    """A model without weights, on the device "meta"; a tiny one, with weights, for a type."""
    if name in causal_model_types():
        return tiny_model(name)
    config = _read(AutoConfig, _folder(name))
    with torch.device("meta"):
        # Nothing is computed; but in this type the kernels of mixtures of experts give a shape.
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    return model


def loaded(name: str) -> nn.Module:
    """A model with its weights, in float32; a tiny random one for a model type."""
    if name in causal_model_types():
        return tiny_model(name)
    model: nn.Module = _read(AutoModelForCausalLM, _folder(name), dtype=torch.float32)
    return model


def _folder(name: str) -> str:
    """A config.json stands for the folder that it is in."""
    path = Path(name)
    return str(path.parent) if path.is_file() and path.name == "config.json" else name


def _read(loader: Any, name: str, **options: Any) -> Any:
    try:
        # Without an answer to whether to run the folder's own code, transformers would ask.
        return loader.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        like = get_close_matches(name, causal_model_types())
        hint = f" (did you mean {' or '.join(like)}?)" if like else ""
        raise UsageError(
            f"{name!r} is no model type of transformers{hint}, and cannot be loaded as a model: "
            f"{type(error).__name__}: {reason}"
        ) from error
