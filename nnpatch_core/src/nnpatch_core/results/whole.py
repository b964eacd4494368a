"""Whether what a file holds is an outcome: each part of its type, and all of them fitting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._arguments import shown
from nnpatch_core._bytes import bytes_of
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.parts import PROMPT_TENSORS, check_size
from nnpatch_core.results.screening import Screening

#: The axes that an outcome may have, in their order; an axis of sites stands alone.
_AXES = (
    ("site",),
    ("layer",),
    ("layer", "position"),
    ("layer", "head"),
    ("layer", "kv_head"),
    ("layer", "position", "head"),
    ("layer", "position", "kv_head"),
)
_NUMBERS = (torch.float32, torch.float64)
_IDS = (torch.int32, torch.int64)


def check_header(header: Mapping[str, Any]) -> None:
    """Raise `OutcomeError` for a header that `write` does not write."""
    _same_names("its header", header, {"format", *_HEADER})
    for name, is_right in _HEADER.items():
        if not is_right(header[name]):
            raise OutcomeError(f"its {name} is {shown(header[name])}")
    if header["metric"] not in header["metrics"]:
        raise OutcomeError(f"its metric {shown(header['metric'])} was not measured")


def check_tensors(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise `OutcomeError` for tensors that do not fit a header that is right, or each other."""
    axes, metrics = list(header["axes"].values()), range(len(header["metrics"]))
    names = {f"prompts/{field}" for field in PROMPT_TENSORS}
    names |= {f"{run}/{number}" for run in ("source", "target") for number in metrics}
    for place in range(len(axes)):
        names |= {f"{kind}/{place}" for kind in ("cells", "present", "elided", "exact")}
        names |= {f"raw/{number}/{place}" for number in metrics}
    _same_names("it", tensors, names)
    batch, seq_len = _check_prompts(header["strings"], tensors)
    for number in metrics:
        _check_baselines(header["scale"], number, batch, tensors)
    for place, given in enumerate(axes):
        shape = [len(labels) for _, labels in given]
        if any(axis == "position" and len(labels) != seq_len for axis, labels in given):
            raise OutcomeError(f"its prompts have {seq_len} tokens, and its axes {shape} places")
        cells = len(tensors[f"cells/{place}"])
        _check_index(f"cells/{place}", tensors[f"cells/{place}"], shape)
        check_size(tuple(shape), cells)
        for kind in ("present", "elided"):
            _check_flags(f"{kind}/{place}", tensors, [cells, batch])
        _check_flags(f"exact/{place}", tensors, [cells])
        for number in metrics:
            _check_tensor(f"raw/{number}/{place}", tensors, _NUMBERS, [cells, batch])


def _check_prompts(strings: Mapping[str, str], tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many prompts there are, and of how many tokens."""
    shape = list(tensors["prompts/target_tokens"].shape)
    if len(shape) != 2 or 0 in shape:
        raise OutcomeError(f"its prompts have the shape {shape}")
    for run in ("source", "target"):
        tokens = _check_tensor(f"prompts/{run}_tokens", tensors, _IDS, shape)
        mask = _check_tensor(f"prompts/{run}_mask", tensors, (torch.int64,), shape)
        if int(tokens.min()) < 0:
            raise OutcomeError(f"prompts/{run}_tokens hold the id {int(tokens.min())}")
        packed = bool((mask[:, 1:] >= mask[:, :-1]).all()) and bool((mask[:, -1] == 1).all())
        if not packed or bool(((mask != 0) & (mask != 1)).any()):
            raise OutcomeError(f"prompts/{run}_mask is no mask of left-padded prompts")
        spelled = {int(token) for token in strings}
        if strings and not spelled.issuperset(tokens[mask.bool()].tolist()):
            raise OutcomeError("some of its tokens have no text")
    return shape[0], shape[1]


def _check_baselines(scale: str, number: int, batch: int, tensors: Mapping[str, Tensor]) -> None:
    means = []
    for run in ("source", "target"):
        value = _check_tensor(f"{run}/{number}", tensors, _NUMBERS, [batch])
        means.append(value.double().mean().item())
        if not math.isfinite(means[-1]):
            raise OutcomeError(f"{run}/{number} is {means[-1]} on average")
    if scale == "restored" and means[0] == means[1]:
        raise OutcomeError(f"metric {number} is {means[0]:g} in both of its runs")


def _check_index(name: str, index: Tensor, shape: list[int]) -> None:
    if index.dtype != torch.int64 or index.ndim != 2 or index.shape[1] != len(shape):
        raise OutcomeError(f"{name} is {index.dtype} {list(index.shape)}")
    if not len(index):
        return
    outside = (index < 0) | (index >= torch.tensor(shape, device="cpu"))
    if bool(outside.any()):
        raise OutcomeError(f"{name} names places outside of {shape}")
    if len(torch.unique(index, dim=0)) < len(index):
        raise OutcomeError(f"{name} names a place twice")


def _check_flags(name: str, tensors: Mapping[str, Tensor], shape: list[int]) -> None:
    found = _check_tensor(name, tensors, (torch.bool,), shape)
    # A file's bytes may be others than those of true and false.
    if found.numel() and int(bytes_of(found).max()) > 1:
        raise OutcomeError(f"{name} holds neither true nor false")


def _check_tensor(
    name: str, tensors: Mapping[str, Tensor], kinds: tuple[torch.dtype, ...], shape: list[int]
) -> Tensor:
    found = tensors[name]
    if found.dtype not in kinds or list(found.shape) != shape:
        raise OutcomeError(f"{name} is {found.dtype} {list(found.shape)}, and must be {shape}")
    return found


def _same_names(what: str, found: Mapping[str, Any], names: set[str]) -> None:
    lacking, unknown = sorted(names - set(found)), sorted(set(found) - names)
    if lacking:
        raise OutcomeError(f"{what} lacks {shown(', '.join(lacking))}")
    if unknown:
        raise OutcomeError(f"{what} has an unknown {shown(', '.join(unknown))}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_size(value: Any) -> bool:
    """A value as large as it may be, nan where a patched run gave that."""
    return type(value) in (int, float) and not value < 0


def _is_dict_of_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_info(value: Any) -> bool:
    return _is_dict_of_texts(value) and "model" in value


def _is_id(token: str) -> bool:
    return token.isascii() and token.isdigit() and len(token) < 20 and str(int(token)) == token


def _is_strings(value: Any) -> bool:
    return _is_dict_of_texts(value) and all(map(_is_id, value))


def _is_names(value: Any) -> bool:
    whole = isinstance(value, list) and bool(value) and all(map(_is_text, value))
    return whole and len(set(value)) == len(value)


def _is_labels(axis: str, labels: Any) -> bool:
    if not isinstance(labels, list) or not labels:
        return False
    if axis == "site":
        return all(map(_is_text, labels))
    return all(type(label) is int for label in labels) and labels == list(range(len(labels)))


def _is_axes(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    if not all(isinstance(axis, list) and len(axis) == 2 and _is_text(axis[0]) for axis in value):
        return False
    named = tuple(name for name, _ in value) in _AXES
    return named and all(_is_labels(*axis) for axis in value)


def _is_grids(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(_is_axes, value.values()))


def _is_screening(value: Any) -> bool:
    if value is None:
        return True
    fields = {field.name for field in attrs.fields(Screening)}
    if not isinstance(value, dict) or set(value) != fields or not _is_text(value["by"]):
        return False
    counts = [value[name] for name in ("chosen", "rest", "checked")]
    return all(map(_is_count, counts)) and counts[2] <= counts[1] and _is_size(value["largest"])


_HEADER: Mapping[str, Callable[[Any], bool]] = {
    "kind": _is_text,
    "scale": lambda value: value in ("restored", "change"),
    "magnitude": lambda value: type(value) is bool,
    "metric": _is_text,
    "metrics": _is_names,
    "axes": _is_grids,
    "strings": _is_strings,
    "info": _is_info,
    "screening": _is_screening,
}
