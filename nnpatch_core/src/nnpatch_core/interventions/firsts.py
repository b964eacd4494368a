"""Says where a metric sees but the first token of answers that have more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nnpatch_core._warnings import warn
from nnpatch_core.errors import AnswerWarning
from nnpatch_core.metrics import Metric, answers_known, first_tokens_read

#: By a name in `metric_data`: what such a metric sees, what there is, and which of the metrics that
#: `first_tokens_read` gives compares that.
_SETS = ("the first answer of each set", "sets of up to {} answers", 0)
_WHOLE = ("the first token of each answer", "answers of up to {} tokens", 1)
_KINDS = {
    ("source_answers", "target_answers"): _SETS,
    ("source_answer_tokens", "target_answer_tokens"): _WHOLE,
}
#: The metric that the confidence of a model is told by.
_CONFIDENT = ("answer_set_difference", "sequence_log_probability_difference")


def several_of(known: Mapping[str, Tensor] | None) -> dict[str, int]:
    """How many answers the largest set has, or tokens the longest answer, by name.

    What has no more than one is left out.

    Args:
        known: what a `PromptPairs` knows of its answers; None where there is none.
    """
    most = {name: int((ids >= 0).sum(1).max()) for name, ids in (known or {}).items()}
    return {name: count for name, count in most.items() if count > 1}


def answer_ids(
    firsts: Tensor | None, data: Mapping[str, Tensor], run: str
) -> dict[str, list[list[list[int]]]]:
    """The answers of a run as tokens, `label_prompts` has them; none where there are none.

    Args:
        firsts: `[batch]`, the first tokens.
        data: what metrics are told, in which sets and whole answers may be.
        run: `"source"` or `"target"`.
    """
    if firsts is None:
        return {}
    whole, sets = data.get(f"{run}_answer_tokens"), data.get(f"{run}_answers")
    if whole is not None and _are_ids(whole):
        return {run: [[_known(ids)] for ids in whole.tolist()]}
    if sets is not None and _are_ids(sets):
        return {run: [[[each] for each in _known(ids)] for ids in sets.tolist()]}
    return {run: [[[each]] for each in firsts.tolist()]}


def _are_ids(given: Tensor) -> bool:
    """Whether it is what a metric takes for answers: the user may have put anything there."""
    whole = given.ndim == 2 and given.dtype in (torch.int32, torch.int64)
    return whole and bool((given >= 0).any(1).all())


def _known(ids: list[int]) -> list[int]:
    return [each for each in ids if each >= 0]


def warn_of_first_tokens(
    metrics: Mapping[str, Metric], several: Mapping[str, int], *, confident: bool = False
) -> None:
    """Warn where answers have more than a first token, and nothing else of them is measured.

    Args:
        metrics: all metrics of the call, by name. Where one reads the answers whole, another one
            that does not is meant so.
        several: see `several_of`.
        confident: whether the model must prefer each run's own answer, by its first token.

    Warns:
        AnswerWarning: names the metrics, and what to take instead.
    """
    read = {name for metric in metrics.values() for name in answers_known(metric)}
    for names, (seen, there, which) in _KINDS.items():
        count = max((several.get(name, 0) for name in names), default=0)
        if not count:
            continue
        first = {name: first_tokens_read(metric) for name, metric in metrics.items()}
        short = {name: other[which] for name, other in first.items() if other is not None}
        told = f"these pairs have {there.format(count)}"
        if short and not read & set(names):
            one = len(short) == 1
            named = ", ".join(map(repr, short))
            instead = " or ".join(f"metric={name!r}" for name in dict.fromkeys(short.values()))
            warn(
                f"metric{'' if one else 's'} {named} see{'s' if one else ''} {seen} alone, and "
                f"{told}: pass {instead} to measure them whole",
                AnswerWarning,
            )
        if confident:
            warn(
                f"force_model_confidence=True sees {seen} alone, and {told}: look at the "
                f"baseline of metric={_CONFIDENT[which]!r} to judge them whole",
                AnswerWarning,
            )
