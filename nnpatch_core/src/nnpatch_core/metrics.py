"""Metrics: the logits at a prompt's last token, to one number per prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import update_wrapper
from typing import Any, TypeAlias, TypeVar, cast

import attrs
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from nnpatch_core._printable import shown
from nnpatch_core.batch import has_numbers, where_of
from nnpatch_core.errors import AnswerError, MetricError, PatchingError
from nnpatch_core.names import MetricName


@attrs.frozen(eq=False)
class MetricContext:
    """All that a metric may look at besides its logits.

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

    def rows(self, index: Tensor) -> MetricContext:
        """The context of some prompts, in any order, a prompt perhaps several times."""

        def chosen(values: Tensor) -> Tensor:
            # A view where there is one prompt: its logits need not be copied for each row.
            if len(values) == 1:
                return values.expand(len(index), *values.shape[1:])
            return values[index]

        other = self.target_answer_index
        return MetricContext(
            chosen(self.source_answer_index),
            None if other is None else chosen(other),
            chosen(self.source_logits),
            chosen(self.target_logits),
        )

    def other_answer(self, metric: str) -> Tensor:
        """`target_answer_index`, or `AnswerError` naming the metric that needs it."""
        if self.target_answer_index is None:
            raise AnswerError(f"metric {metric!r} compares two answers, but only one was given")
        return self.target_answer_index


#: `(logits [batch, vocab] in float32, context)` to `[batch]`.
Metric: TypeAlias = Callable[[Tensor, MetricContext], Tensor]

#: One metric, by name or as a callable, several in a list, or callables under names of your own.
MetricSpec: TypeAlias = (
    MetricName
    | str
    | Callable[..., Tensor]
    | Sequence[MetricName | str | Callable[..., Tensor]]
    | Mapping[str, Any]
)


#: Gives, for a context, the token ids `[batch, any]` whose logits a metric reads.
ColumnsRead: TypeAlias = Callable[[MetricContext], Tensor]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def reads_tokens(columns: ColumnsRead) -> Callable[[_Function], _Function]:
    """Declare which tokens' logits a metric reads, so that no others need be computed.

    Without it a metric is given the logits of the whole vocabulary, which is right but dearer; with
    it, all others are nan. It goes together with `per_prompt`, in either order.

    Args:
        columns: for a `MetricContext`, the token ids `[batch, any]` that the metric reads.

    Raises:
        MetricError: it is put on something that cannot be called.

    Examples:
        >>> @reads_tokens(lambda context: context.source_answer_index[:, None])
        ... def answer_logit(logits, context):
        ...     return logits.gather(1, context.source_answer_index[:, None])[:, 0]
    """

    def declared(metric: _Function) -> _Function:
        return _declare(metric, "columns", columns)

    return declared


def per_prompt(metric: _Function) -> _Function:
    """Declare that a metric gives each prompt a number of its own, whatever stands beside it.

    Such a metric may be called on some of the prompts, in any order, a prompt perhaps several
    times, beside patched runs of other cells. One that is not declared is called once for each
    cell, with the logits `[batch, vocab]` of all prompts in their order, which therefore have to
    wait for one another in memory. The built-in metrics are declared. What is declared is tried
    out before any cell runs. It goes together with `reads_tokens`, in either order.

    Args:
        metric: a function, or any other callable.

    Raises:
        MetricError: it is put on something that cannot be called.

    Examples:
        >>> @per_prompt
        ... def entropy(logits):
        ...     log_probabilities = logits.log_softmax(-1)
        ...     return -(log_probabilities.exp() * log_probabilities).sum(-1)
    """
    return _declare(metric, "per_prompt", True)


def compares_answers(metric: _Function) -> _Function:
    """Declare that a metric compares two answers, so that a call that has but one is refused.

    An ablation may leave the second answer out. A metric that is declared is then refused before
    the model runs; another one when it asks for `context.other_answer`. It goes together with
    `per_prompt` and `reads_tokens`, in any order.

    Args:
        metric: a function, or any other callable.

    Raises:
        MetricError: it is put on something that cannot be called.

    Examples:
        >>> @compares_answers
        ... def probability_difference(logits, context):
        ...     p, rows = logits.softmax(-1), range(len(logits))
        ...     other = context.other_answer("probability_difference")
        ...     return p[rows, context.source_answer_index] - p[rows, other]
    """
    return _declare(metric, "compares_answers", True)


def _lowest_at_source(metric: _Function) -> _Function:
    """Declare that a metric is least, with the gradient 0, where a run equals the source run."""
    return _declare(metric, "lowest_at_source", True)


#: What can be declared of a metric.
_WORDS = ("columns", "compares_answers", "lowest_at_source", "per_prompt")


def _declare(metric: _Function, word: str, value: Any) -> _Function:
    if not callable(metric):
        raise MetricError(f"what is declared must be a metric that can be called, got {metric!r}")
    try:
        setattr(metric, word, value)
    except (AttributeError, TypeError):
        # A bound method, a builtin or an object with slots takes no attribute: something around it.
        def around(*arguments: Any, **options: Any) -> Any:
            return metric(*arguments, **options)

        wrapper: Any = update_wrapper(around, metric)
        wrapper.__name__ = _name_of(metric)
        setattr(wrapper, word, value)
        return cast(_Function, _declared_as(metric, wrapper))
    return metric


def _declared(metric: Any, word: str) -> Any:
    """A declaration of a metric, on it or on the method that calls it; None if there is none."""
    places = (metric, getattr(type(metric), "__call__", None))  # noqa: B004 - the method itself
    declared = (getattr(place, word, None) for place in places)
    return next((value for value in declared if value is not None), None)


def is_per_prompt(metric: Any) -> bool:
    """Whether a metric is declared for each prompt alone; see `per_prompt`."""
    return _declared(metric, "per_prompt") is True


def is_comparing(metric: Any) -> bool:
    """Whether a metric declares that it compares two answers; see `compares_answers`."""
    return _declared(metric, "compares_answers") is True


def is_lowest_at_source(metric: Any) -> bool:
    """Whether a metric's gradient is 0 where a run equals the source run, as a distance's is."""
    return _declared(metric, "lowest_at_source") is True


def reads_some(metric: Any) -> bool:
    """Whether a metric declares which tokens' logits it reads; see `reads_tokens`."""
    return _declared(metric, "columns") is not None


def _two_answers(context: MetricContext) -> Tensor:
    target = context.other_answer("logit_difference")
    return torch.stack([context.source_answer_index, target], dim=-1)


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index.to(values.device).unsqueeze(-1)).squeeze(-1)


@compares_answers
@per_prompt
@reads_tokens(_two_answers)
def logit_difference(logits: Tensor, context: MetricContext) -> Tensor:
    """Logit of the source answer minus logit of the target answer, `[batch]`.

    The metric of Wang et al., "Interpretability in the Wild" (2022).
    """
    target = context.other_answer("logit_difference")
    return _at(logits, context.source_answer_index) - _at(logits, target)


@per_prompt
def answer_probability(logits: Tensor, context: MetricContext) -> Tensor:
    """Probability of the source answer, `[batch]`, between 0 and 1."""
    return _at(logits.softmax(-1), context.source_answer_index)


@per_prompt
def answer_log_probability(logits: Tensor, context: MetricContext) -> Tensor:
    """Natural logarithm of the source answer's probability, `[batch]`, in nats."""
    return _at(logits.log_softmax(-1), context.source_answer_index)


@_lowest_at_source
@per_prompt
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
        return _declared_as(metric, lambda logits, context: metric(logits, context=context))
    required = [
        parameter
        for parameter in parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is parameter.empty
    ]
    starred = any(each.kind is each.VAR_POSITIONAL for each in parameters.values())
    if len(required) >= 2 or starred:
        return metric
    return _declared_as(metric, lambda logits, context: metric(logits))


def _declared_as(metric: Any, wrapper: _Function) -> _Function:
    """`wrapper`, with what is declared of `metric` and not of itself."""
    for word in _WORDS:
        value = _declared(metric, word)
        if value is not None and _declared(wrapper, word) is None:
            setattr(wrapper, word, value)
    return wrapper


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
        items = [(_name_of(metric), metric) for metric in several]
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


def _name_of(metric: Any) -> str:
    if isinstance(metric, str):
        return metric
    return str(getattr(metric, "__name__", type(metric).__name__))


def measure(
    metrics: Mapping[str, Metric], logits: Tensor, context: MetricContext
) -> dict[str, Tensor]:
    """Each metric's value per prompt, `[batch]` in float32 on the CPU.

    Each is given a copy of the logits: one that works in place must not change what another sees.

    Raises:
        MetricError: a metric raised, gave something else than one number per prompt, or changed
            the context.
    """
    return {
        name: as_numbers(called(name, metric, logits.clone(), context))
        for name, metric in metrics.items()
    }


def as_numbers(value: Tensor) -> Tensor:
    """The numbers of a metric, in float32 on the CPU, without a gradient."""
    return value.detach().to("cpu", torch.float32)


def called(name: str, metric: Metric, logits: Tensor, context: MetricContext) -> Tensor:
    """The value of a metric for `logits`, which it may change: one number for each prompt.

    Raises:
        MetricError: it is something else; the metric raised, or changed the context.
    """
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
    return one_each(name, value, len(logits))


def _versions(context: MetricContext) -> list[int]:
    """How often each tensor was changed in place, as far as torch counts it."""
    tensors = (value for value in attrs.astuple(context, recurse=False) if value is not None)
    return [0 if value.is_inference() else value._version for value in tensors]


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


def _columns_of(name: str, metric: Metric, context: MetricContext) -> Tensor:
    try:
        ids = _declared(metric, "columns")(context)
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
