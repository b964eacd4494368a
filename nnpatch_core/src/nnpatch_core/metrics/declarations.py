"""The declarations of a metric: which logits it reads, and of whom its numbers are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import update_wrapper
from typing import Any, TypeAlias, TypeVar, cast

from torch import Tensor

from nnpatch_core.errors import MetricError
from nnpatch_core.metrics.context import MetricContext

#: Gives, for a context, the token ids `[batch, any]` whose logits a metric reads.
ColumnsRead: TypeAlias = Callable[[MetricContext], Tensor]
#: Positions, all of which a metric reads: integers and names of spans, for every prompt; a tensor
#: `[batch, positions]`; or a function that gives one, for the context of a run, whose logits are
#: nan still.
PositionsRead: TypeAlias = str | Sequence[int | str] | Tensor | Callable[[MetricContext], Tensor]
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


def reads_positions(positions: PositionsRead) -> Callable[[_Function], _Function]:
    """Declare at which positions a metric reads the logits, in place of the last token.

    It is then given the logits `[batch, positions, vocab]`, in the order declared, and so are those
    of its context, whose `positions` say where they stand. The model's output projection computes
    what some metric of the call reads, and nothing else. It goes together with the other
    declarations, in any order.

    Args:
        positions: a list of positions of every prompt, counted from the start of the left-padded
            batch or (negative) from the end; a tensor `[batch, positions]`; or a function that
            gives one for a `MetricContext` whose logits are nan still: it is called for the source
            run and for the target run, which have their own `tokens` and `mask`. What such a
            function gives may be padding in some prompts: the logits there are nan. A name is that
            of a span, whose last token is meant; `"last"` is the prompt's last token.

    Raises:
        MetricError: it is put on something that cannot be called.

    Examples:
        >>> @per_prompt
        ... @reads_positions([-2, -1])
        ... def moved(logits):
        ...     before, after = logits.softmax(-1).unbind(1)
        ...     return (before - after).abs().sum(-1)
    """

    def declared(metric: _Function) -> _Function:
        return _declare(metric, "positions_read", positions)

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


def lowest_at_source(metric: _Function) -> _Function:
    """Declare that a metric is least, with the gradient 0, where a run equals the source run."""
    return _declare(metric, "lowest_at_source", True)


def checked_by(check: Callable[[MetricContext], None]) -> Callable[[_Function], _Function]:
    """Declare a function that raises where the prompts are none that a metric can measure.

    It is given a context whose logits are nan still, before the model runs.
    """

    def declared(metric: _Function) -> _Function:
        return _declare(metric, "checked_by", check)

    return declared


def reads_activations(sites: Sequence[Any]) -> Callable[[_Function], _Function]:
    """Declare activations of the run that a metric reads beside its logits.

    It finds them in `context.activations[site]`, `[batch, positions, width]` in float32: of the
    patched run where that is measured, of the source run and the target run where they are. A
    site of one head has that head's columns; one without positions has all, and nan at padding. It
    goes together with the other declarations, in any order.

    Args:
        sites: a list of `Site`.

    Raises:
        MetricError: it is put on something that cannot be called.

    Examples:
        >>> from nnpatch_core import Site
        >>> from nnpatch_core.testing import tiny_api
        >>> written = Site.get_site(tiny_api(), "o", layer=1, head=2, seq_pos=[-1])
        >>> @per_prompt
        ... @reads_activations([written])
        ... def size(logits, context):
        ...     return context.activations[written][:, 0].norm(dim=-1)
    """

    def declared(metric: _Function) -> _Function:
        return _declare(metric, "activations_read", sites)

    return declared


def follows_answers(*names: str) -> Callable[[_Function], _Function]:
    """Declare that a metric reads the prompts with an answer appended, where it predicts that.

    It is given the logits `[batch, n, vocab]` that predict the `n` tokens of `context.appended`.
    The metric is of each prompt alone. With two answers every prompt runs with each, and its number
    is that of the first minus that of the second.

    Args:
        names: of one or two answers in `metric_data`, token ids `[batch, n]`; -1 fills.
    """

    def declared(metric: _Function) -> _Function:
        return _declare(metric, "follows_answers", names)

    return declared


def reads_answers(*names: str) -> Callable[[_Function], _Function]:
    """Declare under which names in `metric_data` a metric reads answers.

    One that appends them says so by `follows_answers`.
    """

    def declared(metric: _Function) -> _Function:
        return _declare(metric, "answers_read", names)

    return declared


def of_first_tokens(*, sets: str, whole: str) -> Callable[[_Function], _Function]:
    """Declare that a metric reads but one token of each answer, its first.

    Args:
        sets: the built-in metric that does the same by sets of answers.
        whole: the one that does it by all tokens of an answer.
    """

    def declared(metric: _Function) -> _Function:
        return _declare(metric, "first_tokens", (sets, whole))

    return declared


#: What can be declared of a metric.
_WORDS = (
    "activations_read",
    "answers_read",
    "checked_by",
    "columns",
    "compares_answers",
    "first_tokens",
    "follows_answers",
    "lowest_at_source",
    "per_prompt",
    "positions_read",
)


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
        wrapper.__name__ = name_of(metric)
        setattr(wrapper, word, value)
        return cast(_Function, declared_as(metric, wrapper))
    return metric


def declared_of(metric: Any, word: str) -> Any:
    """A declaration of a metric, on it or on the method that calls it; None if there is none."""
    places = (metric, getattr(type(metric), "__call__", None))  # noqa: B004 - the method itself
    declared = (getattr(place, word, None) for place in places)
    return next((value for value in declared if value is not None), None)


def is_per_prompt(metric: Any) -> bool:
    """Whether a metric is declared for each prompt alone; see `per_prompt`."""
    return declared_of(metric, "per_prompt") is True


def is_comparing(metric: Any) -> bool:
    """Whether a metric declares that it compares two answers; see `compares_answers`."""
    return declared_of(metric, "compares_answers") is True


def is_lowest_at_source(metric: Any) -> bool:
    """Whether a metric's gradient is 0 where a run equals the source run, as a distance's is."""
    return declared_of(metric, "lowest_at_source") is True


def reads_some(metric: Any) -> bool:
    """Whether a metric declares which tokens' logits it reads; see `reads_tokens`."""
    return declared_of(metric, "columns") is not None


def answers_followed(metric: Any) -> tuple[str, ...]:
    """The names of the answers that a metric appends; none for most. See `follows_answers`."""
    return declared_of(metric, "follows_answers") or ()


def activations_read(metric: Any) -> Any:
    """The sites whose activations a metric reads, unchecked; none for most."""
    return declared_of(metric, "activations_read") or ()


def answers_known(metric: Any) -> tuple[str, ...]:
    """The names in `metric_data` under which a built-in metric reads answers; none for most."""
    return answers_followed(metric) or declared_of(metric, "answers_read") or ()


def first_tokens_read(metric: Any) -> tuple[str, str] | None:
    """The metrics to take in place of one that reads but the first token of each answer.

    One for sets of answers, and one for all tokens of an answer; None where it is no such metric.
    """
    found = declared_of(metric, "first_tokens")
    if found is None and is_comparing(metric) and not answers_known(metric):
        return "answer_set_difference", "sequence_log_probability_difference"
    return cast("tuple[str, str] | None", found)


def name_of(metric: Any) -> str:
    """The name by which a metric goes that is given none."""
    if isinstance(metric, str):
        return metric
    return str(getattr(metric, "__name__", type(metric).__name__))


def declared_as(metric: Any, wrapper: _Function) -> _Function:
    """`wrapper`, with what is declared of `metric` and not of itself."""
    for word in _WORDS:
        value = declared_of(metric, word)
        if value is not None and declared_of(wrapper, word) is None:
            setattr(wrapper, word, value)
    return wrapper
