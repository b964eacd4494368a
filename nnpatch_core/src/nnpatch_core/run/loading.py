"""The model and the tokenizer that a run names."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from nnpatch_core._pretrained import read_pretrained
from nnpatch_core._printable import shown
from nnpatch_core._upstream import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from nnpatch_core.errors import SettingsError
from nnpatch_core.run.settings import Settings

#: Words of every error about files of a model that are not there, or are none.
UNLOADED = "cannot be loaded"
#: Settings to the library without which they do nothing.
_NEEDS = {"device_map": "accelerate", "quantize": "bitsandbytes", "peft": "peft"}


def check_libraries(settings: Settings) -> None:
    """Raise `SettingsError` where a setting needs a library that is not installed."""
    needed = [library for name, library in _NEEDS.items() if getattr(settings, name) is not None]
    if _gguf(settings) is not None:
        needed += ["gguf", "accelerate"]
    missing = [each for each in dict.fromkeys(needed) if importlib.util.find_spec(each) is None]
    if missing:
        raise SettingsError(
            f"loading {settings.model} this way needs {' and '.join(missing)}: "
            f"pip install {' '.join(missing)}"
        )


def load_tokenizer(settings: Settings) -> Any:
    """The tokenizer of a run.

    Raises:
        SettingsError: it cannot be loaded.
    """
    if settings.tokenizer is not None:
        return _read(AutoTokenizer, "tokenizer", settings.tokenizer)
    return _read(AutoTokenizer, "tokenizer", **_source(settings))


def load_config(settings: Settings) -> Any:
    """The config of the model, by which it is known before its weights are read.

    Raises:
        SettingsError: there is none.
    """
    return _read(AutoConfig, "model", **_source(settings))


def load_model(settings: Settings) -> Any:
    """The model of a run, in evaluation mode, where it is to run.

    Raises:
        SettingsError: it cannot be loaded.
    """
    options: dict[str, Any] = {"dtype": _dtype(settings), **_source(settings)}
    if settings.attention is not None:
        options["attn_implementation"] = settings.attention
    if settings.device_map is not None:
        options["device_map"] = settings.device_map
    if settings.quantize is not None:
        bits: Any = BitsAndBytesConfig
        options["quantization_config"] = bits(**{f"load_in_{settings.quantize}": True})
    model = _read(AutoModelForCausalLM, "model", **options)
    if settings.peft is not None:
        peft: Any = importlib.import_module("peft")
        try:
            model = peft.PeftModel.from_pretrained(model, settings.peft)
        except Exception as error:
            raise SettingsError(
                f"peft: {shown(settings.peft)} {UNLOADED} on {settings.model}: "
                f"{type(error).__name__}: {_first(error)}"
            ) from error
    model.eval()
    if settings.device_map is None and settings.quantize is None:
        model = _moved(model, settings)
    for weight in model.parameters():
        weight.requires_grad_(False)
    return model


def device_of(settings: Settings) -> str:
    """The device that a model is put on, where no map says otherwise."""
    if settings.device is not None:
        return settings.device
    here = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if here is None else here.type


def _moved(model: Any, settings: Settings) -> Any:
    device = device_of(settings)
    try:
        return model.to(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise SettingsError(
            f"device: the model cannot be put on {shown(device)}: {_first(error)}"
        ) from error


def _dtype(settings: Settings) -> Any:
    return "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)


def _gguf(settings: Settings) -> str | None:
    """The GGUF file of the model, if it is one."""
    path = Path(settings.model)
    if settings.gguf_file is None and path.suffix.lower() == ".gguf":
        return path.name
    return settings.gguf_file


def _source(settings: Settings) -> dict[str, Any]:
    """Where the files of the model are, as transformers takes it."""
    path, options = Path(settings.model), {}
    name, gguf = settings.model, _gguf(settings)
    if gguf is not None:
        options["gguf_file"] = gguf
        name = str(path.parent) if path.suffix.lower() == ".gguf" else name
    if settings.revision is not None:
        options["revision"] = settings.revision
    return {"name": name, **options}


def _read(loader: Any, what: str, name: str, **options: Any) -> Any:
    path = Path(name)
    if (path.is_absolute() or name.startswith((".", "~"))) and not path.expanduser().exists():
        raise SettingsError(f"{what}: there is no {name}")
    name = str(path.expanduser()) if name.startswith("~") else name
    try:
        return read_pretrained(loader, name, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise SettingsError(
            f"{what}: {shown(name)} {UNLOADED}: {type(error).__name__}: {_first(error)}"
        ) from error


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
