"""From the `metric=` of a call to metrics by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from nnpatch_core._printable import shown
from nnpatch_core.errors import MetricError
from nnpatch_core.metrics.context import MetricContext
from nnpatch_core.metrics.declarations import declared_as, name_of
from nnpatch_core.names import MetricName

#: `(logits [batch, vocab] in float32, context)` to `[batch]`; see `reads_positions` for others.
Metric: TypeAlias = Callable[[Tensor, MetricContext], Tensor]

#: One metric, by name or as a callable, several in a list, or callables under names of your own.
MetricSpec: TypeAlias = (
    MetricName
    | str
    | Callable[..., Tensor]
    | Sequence[MetricName | str | Callable[..., Tensor]]
    | Mapping[str, Any]
)


def with_context(metric: Callable[..., Tensor]) -> Metric:
    """`metric` as a function of logits and context, whether or not it takes the context.

    It takes it if it has a parameter called `context`, or requires a second argument.
    """
    try:
        parameters = inspect.signature(metric).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return metric
    second = list(parameters.values())[1:2]
    if any(each.name == "context" and each.kind is not each.KEYWORD_ONLY for each in second):
        return metric
    if "context" in parameters:
        return declared_as(metric, lambda logits, context: metric(logits, context=context))
    required = [
        parameter
        for parameter in parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is parameter.empty
    ]
    starred = any(each.kind is each.VAR_POSITIONAL for each in parameters.values())
    if len(required) >= 2 or starred:
        return metric
    return declared_as(metric, lambda logits, context: metric(logits))


def name_metrics(spec: MetricSpec, find: Callable[[str], Metric]) -> dict[str, Metric]:
    """The metrics of a `metric=` argument, by name, in the order given.

    Args:
        spec: see `MetricSpec`; see `with_context` for which callables are given the context.
        find: looks up a metric by its registered name.

    Raises:
        MetricError: not a metric, none at all, or two under one name.
    """
    if isinstance(spec, Mapping):
        items = [(name, metric) for name, metric in spec.items()]
    else:
        several = [spec] if isinstance(spec, str) or callable(spec) else spec
        if not isinstance(several, Sequence):
            raise MetricError(
                f"metric must be a name, a callable or a list of them, got {shown(spec)}"
            )
        items = [(name_of(metric), metric) for metric in several]
    if not items:
        raise MetricError("metric is empty; name at least one")
    named: dict[str, Metric] = {}
    for name, metric in items:
        if not isinstance(name, str):
            raise MetricError(f"the names of metrics must be strings, got {shown(name)}")
        if not (isinstance(metric, str) or callable(metric)):
            raise MetricError(f"a metric must be a name or a callable, got {shown(metric)}")
        if name in named:
            raise MetricError(f"two metrics are called {name!r}; name them with a dict")
        named[name] = find(metric) if isinstance(metric, str) else with_context(metric)
    return named
