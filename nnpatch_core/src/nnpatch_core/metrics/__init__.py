"""Metrics: from the logits of a run to one number for each prompt."""

from nnpatch_core.metrics.builtin import (
    BUILTIN_METRICS,
    answer_log_probability,
    answer_probability,
    answer_set_difference,
    answer_sets,
    kl_divergence,
    logit_difference,
    loss,
)
from nnpatch_core.metrics.calling import as_numbers, called, columns_read, measure, one_each
from nnpatch_core.metrics.context import MetricContext, RunSeen, SweepContext, stacked
from nnpatch_core.metrics.declarations import (
    ColumnsRead,
    PositionsRead,
    compares_answers,
    is_comparing,
    is_lowest_at_source,
    is_per_prompt,
    per_prompt,
    reads_positions,
    reads_some,
    reads_tokens,
)
from nnpatch_core.metrics.naming import Metric, MetricSpec, name_metrics, with_context
from nnpatch_core.metrics.positions import Reading, SpanFinder, check_metrics, reading_of

__all__ = [
    "BUILTIN_METRICS",
    "ColumnsRead",
    "Metric",
    "MetricContext",
    "MetricSpec",
    "PositionsRead",
    "Reading",
    "RunSeen",
    "SpanFinder",
    "SweepContext",
    "answer_log_probability",
    "answer_probability",
    "answer_set_difference",
    "answer_sets",
    "as_numbers",
    "called",
    "check_metrics",
    "columns_read",
    "compares_answers",
    "is_comparing",
    "is_lowest_at_source",
    "is_per_prompt",
    "kl_divergence",
    "logit_difference",
    "loss",
    "measure",
    "name_metrics",
    "one_each",
    "per_prompt",
    "reading_of",
    "reads_positions",
    "reads_some",
    "reads_tokens",
    "stacked",
    "with_context",
]
