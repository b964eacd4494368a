"""Reads what a folder or the hub has of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nnpatch_core._sizes import bounded, check_config
from nnpatch_core._upstream import AutoModelForCausalLM, PreTrainedConfig


def read_pretrained(loader: Any, name: str, **options: Any) -> Any:
    """A config, a tokenizer or a model of transformers, without code of its own.

    Args:
        loader: the class that reads it.
        name: a folder, or a name on the hub.
        options: of the loader.

    Raises:
        AdapterError: its config asks for more layers or heads than any model has.
        Exception: transformers' own, if it cannot be read.
    """
    if "gguf_file" not in options:
        revision = {key: value for key, value in options.items() if key == "revision"}
        # Before the config's class makes lists with an entry for each layer.
        check_config(PreTrainedConfig.get_config_dict(name, **revision)[0])
    # Without an answer to whether to run the folder's own code, transformers would ask.
    return loader.from_pretrained(name, trust_remote_code=False, **options)


def skeleton_of(config: Any) -> nn.Module:
    """A model without weights, on the device "meta"."""
    with torch.device("meta"), bounded():
        # Nothing is computed; but in this type the kernels of mixtures of experts give a shape.
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    return model
