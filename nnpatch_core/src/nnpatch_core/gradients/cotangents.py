"""The gradient of metrics with respect to the logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nnpatch_core.errors import MetricError
from nnpatch_core.metrics import Metric, MetricContext, called


def cotangents(
    metrics: Mapping[str, Metric], logits: Tensor, context: MetricContext, *, flat: bool = False
) -> dict[str, Tensor]:
    """For each metric its gradient with respect to each prompt's logits, in their shape.

    Args:
        metrics: by name.
        logits: `[batch, vocab]`, or `[batch, places, vocab]`, of all metrics.
        context: what the metrics compare with.
        flat: whether the gradient may be 0 for every prompt.

    Raises:
        MetricError: a metric has no gradient, or one that is not finite.
    """
    gradients = {}
    for name, metric in metrics.items():
        leaf = logits.detach().clone().requires_grad_()
        with torch.enable_grad():
            # A copy, as a metric may work in place, which a leaf does not allow.
            value = called(name, metric, leaf.clone(), context)
            total = value.sum()
        if not value.requires_grad:
            raise MetricError(
                f"metric {name!r} is not differentiable: its value has no gradient, as after "
                "argmax, a comparison, detach() or item(); attribution needs one"
            )
        gradient = _gradient(total, leaf)
        if context.positions is not None and logits.ndim == 3:
            # There are no logits at padding, and nothing moves them.
            read = context.padding.shape[1]
            nothing = leaf.detach().isnan()
            nothing[:, :read] = context.padding[..., None]
            gradient = gradient.masked_fill(nothing, 0.0)
        if not flat and not gradient.any():
            raise MetricError(
                f"metric {name!r} has the gradient 0 for every prompt: to first order nothing "
                "changes it, so that nothing can be attributed; steps= looks further"
            )
        if not gradient.isfinite().all():
            rows = (~gradient.isfinite().flatten(1).all(-1)).nonzero().flatten().tolist()
            raise MetricError(
                f"metric {name!r} has a gradient that is not finite in prompts {rows}"
            )
        gradients[name] = gradient
    return gradients


def _gradient(value: Tensor, leaf: Tensor) -> Tensor:
    gradient: Tensor | None = torch.autograd.grad(value, leaf, allow_unused=True)[0]
    return torch.zeros_like(leaf) if gradient is None else gradient
