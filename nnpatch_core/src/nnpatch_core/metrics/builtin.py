"""The built-in metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from nnpatch_core._printable import shown
from nnpatch_core.errors import MetricError, UnknownNameError
from nnpatch_core.metrics.context import MetricContext
from nnpatch_core.metrics.declarations import (
    checked_by,
    compares_answers,
    follows_answers,
    lowest_at_source,
    of_first_tokens,
    per_prompt,
    reads_answers,
    reads_positions,
    reads_tokens,
)
from nnpatch_core.metrics.naming import Metric


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


@of_first_tokens(sets="answer_set_difference", whole="sequence_log_probability")
@per_prompt
def answer_probability(logits: Tensor, context: MetricContext) -> Tensor:
    """Probability of the source answer, `[batch]`, between 0 and 1."""
    return _at(logits.softmax(-1), context.source_answer_index)


@of_first_tokens(sets="answer_set_difference", whole="sequence_log_probability")
@per_prompt
def answer_log_probability(logits: Tensor, context: MetricContext) -> Tensor:
    """Natural logarithm of the source answer's probability, `[batch]`, in nats."""
    return _at(logits.log_softmax(-1), context.source_answer_index)


@lowest_at_source
@per_prompt
def kl_divergence(logits: Tensor, context: MetricContext) -> Tensor:
    """KL divergence from the source run, `KL(source || this run)`, `[batch]`, in nats."""
    source, this = context.source_logits.log_softmax(-1), logits.log_softmax(-1)
    return kl_div(this, source, reduction="none", log_target=True).sum(-1)


def answer_sets(
    how: Literal["logsumexp", "mean"] = "logsumexp",
    *,
    right: str = "source_answers",
    wrong: str = "target_answers",
) -> Metric:
    """A metric that compares two sets of answers: the right ones' logits minus the wrong ones'.

    Args:
        how: how the logits of a set become one number: `"logsumexp"`, so that the difference is
            the logarithm of the odds that the next token is a right one and not a wrong one; or
            their `"mean"`.
        right: the name in `metric_data` of the right answers, `[batch, any]` token ids; -1 fills
            the row of a prompt that has fewer.
        wrong: the same of the wrong answers.

    Raises:
        UnknownNameError: `how` is neither.

    Examples:
        >>> import torch
        >>> metric = answer_sets("mean")
        >>> logits, answers = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([0])
        >>> data = {"source_answers": torch.tensor([[1, 2]]),
        ...         "target_answers": torch.tensor([[0, -1]])}
        >>> metric(logits, MetricContext(answers, None, logits, logits, data=data))
        tensor([2.])
    """
    if how not in _OF_A_SET:
        raise UnknownNameError(f"unknown how {shown(how)}; there are {', '.join(_OF_A_SET)}")

    def ids(context: MetricContext) -> Tensor:
        both = [_answer_set(context, name) for name in (right, wrong)]
        return torch.cat([each[each >= 0] for each in both])

    def check(context: MetricContext) -> None:
        ids(context)

    @checked_by(check)
    @reads_answers(right, wrong)
    @per_prompt
    @reads_tokens(ids)
    def answer_set_difference(logits: Tensor, context: MetricContext) -> Tensor:
        """Logits of the right answers minus those of the wrong ones, `[batch]`."""
        of_right, of_wrong = (
            _OF_A_SET[how](logits, _answer_set(context, name)) for name in (right, wrong)
        )
        return of_right - of_wrong

    return answer_set_difference


def _answer_set(context: MetricContext, name: str) -> Tensor:
    """Token ids `[batch, any]`, each row with at least one; -1 fills."""
    metric = "answer_set_difference"
    ids = token_data(context, metric, name)
    empty = (ids < 0).all(1).nonzero().flatten().tolist()
    if empty:
        raise MetricError(
            f"metric {metric!r} compares sets of answers, and metric_data[{name!r}] has none for "
            f"prompt {empty[0]}"
        )
    return ids


#: The names under which a `PromptPairs` brings answers, and when it does.
_BROUGHT = {
    **dict.fromkeys(("source_answers", "target_answers"), "has lists of answers"),
    **dict.fromkeys(
        ("source_answer_tokens", "target_answer_tokens"), "was made with multi_token='all'"
    ),
}


def token_data(context: MetricContext, metric: str, name: str) -> Tensor:
    """Token ids `[batch, any]` of `metric_data`, where -1 fills.

    Raises:
        MetricError: there are none, or something else.
    """
    if name not in context.data:
        remedy = _BROUGHT.get(name)
        raise MetricError(
            f"metric {metric!r} reads metric_data[{name!r}], token ids [batch, any], and "
            f"metric_data has {', '.join(map(repr, context.data)) or 'nothing'}"
            + ("" if remedy is None else f"; a PromptPairs brings it that {remedy}")
        )
    ids = context.data[name]
    whole = ids.dtype in (torch.int16, torch.int32, torch.int64, torch.uint8)
    if not whole or ids.ndim != 2:
        raise MetricError(
            f"metric {metric!r} reads metric_data[{name!r}] as token ids [batch, any], and it is "
            f"{list(ids.shape)} of {ids.dtype}"
        )
    low = ids[ids < -1]
    if low.numel():
        raise MetricError(
            f"metric_data[{name!r}] holds the id {int(low[0])}: ids are at least 0, and -1 fills "
            "a row that has fewer than others"
        )
    vocab = context.target_logits.shape[-1]
    high = ids[ids >= vocab]
    if high.numel() and vocab:
        raise MetricError(
            f"metric_data[{name!r}] holds the id {int(high[0])}; the model's vocabulary is 0 to "
            f"{vocab - 1}"
        )
    return ids.long()


def _logsumexp(logits: Tensor, ids: Tensor) -> Tensor:
    found = logits.gather(-1, ids.clamp(min=0).to(logits.device))
    return found.masked_fill((ids < 0).to(logits.device), -torch.inf).logsumexp(-1)


def _mean(logits: Tensor, ids: Tensor) -> Tensor:
    found = logits.gather(-1, ids.clamp(min=0).to(logits.device))
    there = (ids >= 0).to(logits.device)
    return torch.where(there, found, 0.0).sum(-1) / there.sum(-1)


_OF_A_SET = {"logsumexp": _logsumexp, "mean": _mean}
#: Of the sets `source_answers` and `target_answers` of `metric_data`, by log-sum-exp.
answer_set_difference = answer_sets()


def _all_but_last(context: MetricContext) -> Tensor:
    """The position before each token, that is all but the last."""
    assert context.tokens is not None
    batch, seq_len = context.tokens.shape
    return torch.arange(seq_len - 1, device="cpu").repeat(batch, 1)


def _check_lengths(context: MetricContext) -> None:
    assert context.mask is not None
    short = (context.mask.sum(1) < 2).nonzero().flatten().tolist()
    if short:
        raise MetricError(
            f"metric 'loss' is the mean over a prompt's tokens after the first, and prompt "
            f"{short[0]} has but one token"
        )


@checked_by(_check_lengths)
@per_prompt
@reads_positions(_all_but_last)
def loss(logits: Tensor, context: MetricContext) -> Tensor:
    """Mean of -log p(token | those before it), over the run's own tokens after the first.

    `[batch]`, in nats a token. Padding does not count.
    """
    own, real, at = context.tokens, context.mask, context.positions
    assert own is not None
    assert real is not None
    assert at is not None
    log_probabilities = _at(logits.log_softmax(-1), own.gather(1, at + 1))
    there = (real.gather(1, at) == 1).to(logits.device)
    # Chosen, not multiplied: there are no logits at padding, which is nan.
    return -torch.where(there, log_probabilities, 0.0).sum(-1) / there.sum(-1)


def _check_sequences(*names: str) -> Callable[[MetricContext], None]:
    def check(context: MetricContext) -> None:
        for name in names:
            ids = token_data(context, "sequence_log_probability", name)
            empty = (ids < 0).all(1).nonzero().flatten().tolist()
            if empty:
                raise MetricError(
                    f"{name} has no token for prompt {empty[0]}, whose answer is to be appended"
                )
            # Packed to the left, as tokens follow one another.
            if ((ids[:, :-1] < 0) & (ids[:, 1:] >= 0)).any():
                raise MetricError(f"{name} has a token behind a fill of -1: fill on the right")

    return check


def _of_appended(logits: Tensor, context: MetricContext) -> Tensor:
    ids = context.appended
    assert ids is not None
    found = _at(logits.log_softmax(-1), ids.clamp(min=0))
    return torch.where((ids >= 0).to(logits.device), found, 0.0).sum(-1)


@checked_by(_check_sequences("source_answer_tokens"))
@per_prompt
@follows_answers("source_answer_tokens")
def sequence_log_probability(logits: Tensor, context: MetricContext) -> Tensor:
    """Sum of log p(token | prompt, answer before it) over the source answer's tokens, `[batch]`.

    In nats. The answer, `source_answer_tokens`, is appended to the source prompt and to the target
    prompt alike; it is never patched, and no column of the outcome.
    """
    return _of_appended(logits, context)


@checked_by(_check_sequences("source_answer_tokens", "target_answer_tokens"))
@per_prompt
@follows_answers("source_answer_tokens", "target_answer_tokens")
def sequence_log_probability_difference(logits: Tensor, context: MetricContext) -> Tensor:
    """`sequence_log_probability` of the source answer minus that of the target answer, `[batch]`.

    Each prompt runs with each of the answers; called, it gives the one that is appended.
    """
    return _of_appended(logits, context)


BUILTIN_METRICS: Mapping[str, Metric] = {
    "answer_log_probability": answer_log_probability,
    "answer_probability": answer_probability,
    "answer_set_difference": answer_set_difference,
    "kl_divergence": kl_divergence,
    "logit_difference": logit_difference,
    "loss": loss,
    "sequence_log_probability": sequence_log_probability,
    "sequence_log_probability_difference": sequence_log_probability_difference,
}
#: The units of those that have one.
METRIC_UNITS: Mapping[str, str] = {
    "answer_log_probability": "nats",
    "answer_set_difference": "logits",
    "kl_divergence": "nats",
    "logit_difference": "logits",
    "loss": "nats",
    "sequence_log_probability": "nats",
    "sequence_log_probability_difference": "nats",
}
