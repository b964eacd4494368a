"""Metrics: the logits at a prompt's last token, to one number per prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from nnpatch_core.errors import AnswerError, MetricError


@attrs.frozen(eq=False)
class MetricContext:
    """What a metric may look at besides the logits it is given.

    Args:
        source_answer_index: `[batch]`, the token that the source prompt calls for.
        target_answer_index: `[batch]`, the token that the target prompt calls for, or None.
        source_logits: `[batch, vocab]` of the source run; of the unablated run in an ablation.
        target_logits: `[batch, vocab]` of the target run; of the unablated run in an ablation.
    """

    source_answer_index: Tensor
    target_answer_index: Tensor | None
    source_logits: Tensor
    target_logits: Tensor

    def other_answer(self, metric: str) -> Tensor:
        """`target_answer_index`, or `AnswerError` naming the metric that needs it."""
        if self.target_answer_index is None:
            raise AnswerError(f"metric {metric!r} compares two answers, but only one was given")
        return self.target_answer_index


#: `(logits [batch, vocab] in float32, context)` to `[batch]`.
Metric: TypeAlias = Callable[[Tensor, MetricContext], Tensor]

#: One metric, by name or as a callable, several in a list, or callables under names of your own.
MetricSpec: TypeAlias = (
    str | Callable[..., Tensor] | Sequence[str | Callable[..., Tensor]] | Mapping[str, Any]
)


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index.to(values.device).unsqueeze(-1)).squeeze(-1)


def logit_difference(logits: Tensor, context: MetricContext) -> Tensor:
    """Logit of the source answer minus logit of the target answer, `[batch]`.

    The metric of Wang et al., "Interpretability in the Wild" (2022).
    """
    target = context.other_answer("logit_difference")
    return _at(logits, context.source_answer_index) - _at(logits, target)


def answer_probability(logits: Tensor, context: MetricContext) -> Tensor:
    """Probability of the source answer, `[batch]`, between 0 and 1."""
    return _at(logits.softmax(-1), context.source_answer_index)


def answer_log_probability(logits: Tensor, context: MetricContext) -> Tensor:
    """Natural logarithm of the source answer's probability, `[batch]`, in nats."""
    return _at(logits.log_softmax(-1), context.source_answer_index)


def kl_divergence(logits: Tensor, context: MetricContext) -> Tensor:
    """KL divergence from the source run, `KL(source || this run)`, `[batch]`, in nats."""
    source, this = context.source_logits.log_softmax(-1), logits.log_softmax(-1)
    return kl_div(this, source, reduction="none", log_target=True).sum(-1)


BUILTIN_METRICS: Mapping[str, Metric] = {
    "answer_log_probability": answer_log_probability,
    "answer_probability": answer_probability,
    "kl_divergence": kl_divergence,
    "logit_difference": logit_difference,
}


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
        return lambda logits, context: metric(logits, context=context)
    required = [
        parameter
        for parameter in parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is parameter.empty
    ]
    starred = any(each.kind is each.VAR_POSITIONAL for each in parameters.values())
    if len(required) >= 2 or starred:
        return metric
    return lambda logits, context: metric(logits)


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
            raise MetricError(f"metric must be a name, a callable or a list of them, got {spec!r}")
        items = [(_name_of(metric), metric) for metric in several]
    if not items:
        raise MetricError("metric is empty; name at least one")
    found: dict[str, Metric] = {}
    for name, metric in items:
        if not isinstance(name, str):
            raise MetricError(f"the names of metrics must be strings, got {name!r}")
        if not (isinstance(metric, str) or callable(metric)):
            raise MetricError(f"a metric must be a name or a callable, got {metric!r}")
        if name in found:
            raise MetricError(f"two metrics are called {name!r}; name them with a dict")
        found[name] = find(metric) if isinstance(metric, str) else with_context(metric)
    return found


def _name_of(metric: Any) -> str:
    if isinstance(metric, str):
        return metric
    return str(getattr(metric, "__name__", type(metric).__name__))


def measure(
    metrics: Mapping[str, Metric], logits: Tensor, context: MetricContext
) -> dict[str, Tensor]:
    """Each metric's value per prompt, `[batch]` in float32 on the CPU.

    Raises:
        MetricError: a metric gave something else than one number per prompt.
    """
    values = {}
    for name, metric in metrics.items():
        # A copy each: one that works in place must not change what the next one sees.
        value = metric(logits.clone(), context)
        if not isinstance(value, Tensor) or value.shape != logits.shape[:1]:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise MetricError(
                f"metric {name!r} must give a tensor of shape [batch] = [{len(logits)}], got {got}"
            )
        values[name] = value.detach().to("cpu", torch.float32)
    return values
