"""A metric is called, and held to giving one number for each prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nnpatch_core.batch import has_numbers, where_of
from nnpatch_core.errors import MetricError, PatchingError
from nnpatch_core.metrics.context import MetricContext
from nnpatch_core.metrics.declarations import (
    activations_read,
    declared_of,
    is_per_prompt,
    reads_some,
)
from nnpatch_core.metrics.naming import Metric


def measure(
    metrics: Mapping[str, Metric], logits: Tensor, context: MetricContext
) -> dict[str, Tensor]:
    """Each metric's value per prompt, `[batch]` in float32 on the CPU.

    Each is given a copy of the logits: one that works in place must not change what another sees.
    Our own do not, and of a whole vocabulary a copy takes longer than they do.

    Raises:
        MetricError: a metric raised, gave something else than one number per prompt, or changed
            the context.
    """
    return {
        name: as_numbers(
            called(name, metric, logits if _is_own(metric) else logits.clone(), context)
        )
        for name, metric in metrics.items()
    }


def _is_own(metric: Metric) -> bool:
    return getattr(metric, "__module__", None) == "nnpatch_core.metrics.builtin"


def as_numbers(value: Tensor) -> Tensor:
    """The numbers of a metric, in float32 on the CPU, without a gradient."""
    return value.detach().to("cpu", torch.float32)


def called(name: str, metric: Metric, logits: Tensor, context: MetricContext) -> Tensor:
    """The value of a metric for `logits`, which it may change: one number for each prompt.

    Raises:
        MetricError: it is something else; the metric raised, or changed the context.
    """
    rows = len(logits)
    if not is_per_prompt(metric):
        # It is given each prompt once, in whatever versions they run.
        context = context.once
        logits = logits[: len(context)]
    logits, context = context.seen(name, logits)
    before = _versions(context)
    try:
        value = metric(logits, context)
    except (PatchingError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise MetricError(
            f"metric {name!r} raised {type(error).__name__} on logits {list(logits.shape)}: {error}"
        ) from error
    if _versions(context) != before:
        raise MetricError(
            f"metric {name!r} changes its context in place, which other cells are measured with: "
            "let it work on a copy, as context.source_logits.clone()"
        )
    value = one_each(name, value, len(logits))
    return value if len(value) == rows else torch.cat([value, value.new_zeros(rows - len(value))])


def _versions(context: MetricContext) -> list[int]:
    """How often each tensor was changed in place, as far as torch counts it."""
    return [0 if value.is_inference() else value._version for value in context.tensors()]


def one_each(name: str, value: Any, count: int) -> Tensor:
    """The value of a metric itself, if it is one number for each of `count` prompts.

    Raises:
        MetricError: it is something else.
    """
    if not isinstance(value, Tensor) or value.shape != (count,):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise MetricError(
            f"metric {name!r} must give a tensor of shape [batch] = [{count}], got {got}"
        )
    if value.is_complex() or value.is_meta:
        got = "on the meta device, without a value" if value.is_meta else f"of {value.dtype}"
        raise MetricError(f"metric {name!r} must give real numbers, got a tensor {got}")
    return value


def columns_read(metrics: Mapping[str, Metric], context: MetricContext) -> Tensor | None:
    """The token ids, ascending, whose logits some metric reads; None is the whole vocabulary.

    Raises:
        MetricError: a metric declares something else than ids of the vocabulary.
    """
    if not all(map(reads_some, metrics.values())):
        return None
    ids = [_columns_of(name, metric, context) for name, metric in metrics.items()]
    return torch.unique(torch.cat(ids))  # type: ignore[no-any-return]


def columns_given(metrics: Mapping[str, Metric], context: MetricContext) -> Tensor | None:
    """The token ids whose logits are computed; None is the whole vocabulary.

    Beside activations that is all of it, as each takes a place as wide.

    Raises:
        MetricError: a metric declares something else than ids of the vocabulary.
    """
    wide = any(map(activations_read, metrics.values()))
    return None if wide else columns_read(metrics, context)


def _columns_of(name: str, metric: Metric, context: MetricContext) -> Tensor:
    try:
        _, seen = context.seen(name, context.target_logits)
        ids = declared_of(metric, "columns")(seen)
    except PatchingError:
        raise
    except Exception as error:
        raise MetricError(
            f"what metric {name!r} declares with reads_tokens raised {type(error).__name__}: "
            f"{error}"
        ) from error
    vocab = context.target_logits.shape[-1]
    if isinstance(ids, Tensor) and not has_numbers(ids):
        raise MetricError(
            f"metric {name!r} declares with reads_tokens ids that have no numbers that can be "
            f"read: they are on {where_of(ids)}; make them on the CPU, as the answers of the "
            "context are"
        )
    whole = isinstance(ids, Tensor) and not (
        ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
    )
    if not whole or not ids.numel() or ids.min() < 0 or ids.max() >= vocab:
        raise MetricError(
            f"metric {name!r} declares that it reads the tokens {ids!r}: they must be a tensor of "
            f"ids from 0 to {vocab - 1}"
        )
    flat: Tensor = ids.flatten().cpu().long()
    return flat
