"""The models and adapters that the arguments of commands name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnpatch_core._hints import did_you_mean
from nnpatch_core._pretrained import read_pretrained, skeleton_of
from nnpatch_core._tiny import causal_model_types, tiny_model
from nnpatch_core._upstream import AutoConfig, AutoModelForCausalLM
from nnpatch_core.adapters import ModelAPI
from nnpatch_core.cli.output import UsageError, first_line
from nnpatch_core.errors import AdapterError
from nnpatch_core.plugins import find_adapter

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
        adapter = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{name!r} cannot be imported: {type(error).__name__}: {error}") from error
    return find_adapter(adapter)


#: What to name in place of a type that there is no tiny model of.
INSTEAD = "name a folder with a config.json of that type, or a model on the hub"


def weightless(name: str, advice: str = INSTEAD) -> nn.Module:
    """A model without weights, on the device "meta"; a tiny one, with weights, for a type."""
    if name in causal_model_types():
        return tiny(name, advice)
    return skeleton_of(_read(AutoConfig, _folder(name)))


def loaded(name: str) -> nn.Module:
    """A model with its weights, in float32; a tiny random one for a model type."""
    if name in causal_model_types():
        return tiny(name, "name a folder with a model of that type, or one on the hub, as MODEL")
    model: nn.Module = _read(AutoModelForCausalLM, _folder(name), dtype=torch.float32)
    return model


def tiny(model_type: str, advice: str, **settings: Any) -> nn.Module:
    """A tiny random model of a type; where there is none, an error with advice for this command."""
    try:
        return tiny_model(model_type, **settings)
    except AdapterError as error:
        raise UsageError(f"{error}; {advice}") from error


def _folder(name: str) -> str:
    """A config.json stands for the folder that it is in."""
    path = Path(name)
    return str(path.parent) if path.is_file() and path.name == "config.json" else name


def _read(loader: Any, name: str, **options: Any) -> Any:
    try:
        return read_pretrained(loader, name, **options)
    except AdapterError as error:
        raise UsageError(f"{name!r} cannot be loaded as a model: {error}") from error
    except Exception as error:
        reason = first_line(str(error))
        hint = did_you_mean(name, causal_model_types())
        raise UsageError(
            f"{name!r} is no model type of transformers{hint}, and cannot be loaded as a model: "
            f"{type(error).__name__}: {reason}"
        ) from error
