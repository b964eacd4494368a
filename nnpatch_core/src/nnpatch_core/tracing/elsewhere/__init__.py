"""Runs of a model that is in another process, which has nnsight, but not nnpatch."""

from nnpatch_core.tracing.elsewhere.body import aligned, summed, total
from nnpatch_core.tracing.elsewhere.model import model_for
from nnpatch_core.tracing.elsewhere.requests import (
    Origin,
    Sendable,
    logits_there,
    patched_there,
    tokens_there,
    totals_there,
    why_not_sent,
)

__all__ = [
    "Origin",
    "Sendable",
    "aligned",
    "logits_there",
    "model_for",
    "patched_there",
    "summed",
    "tokens_there",
    "total",
    "totals_there",
    "why_not_sent",
]
