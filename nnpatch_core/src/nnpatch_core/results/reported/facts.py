"""Facts about an outcome, that advice goes by."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnpatch_core._templates import MOST, templates_of
from nnpatch_core.report import LEVEL, Facts, Race, Width
from nnpatch_core.results.moments import denominator_may_be_zero
from nnpatch_core.results.sureness import needed
from nnpatch_core.results.top import make_top, strongest_groups
from nnpatch_core.results.words import cell_name, in_digits

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome
    from nnpatch_core.results.parts import Prompts

#: Metrics that are above 0 where the source answer is preferred, and below 0 for the target's.
_DIFFERENCES = (
    "logit_difference",
    "answer_set_difference",
    "sequence_log_probability_difference",
)
#: A prompt's two runs differ by little below this share of the mean.
_LITTLE = 0.1


def facts_of(
    outcome: Outcome, width: float, level: float = LEVEL, *, distinct: bool = True
) -> Facts:
    """The facts that an outcome of a sweep knows of itself.

    Args:
        outcome: the outcome.
        width: how wide the interval of the strongest may be, on the scale `"restored"`.
        level: of the intervals.
        distinct: whether neighbouring layers of almost one value are one fact.
    """
    with warnings.catch_warnings():
        # They are about values; a rule says the same.
        warnings.simplefilter("ignore")
        unsure = unsure_of(outcome)
        measured = any(_measured(outcome, name) for name in outcome.cells)
        values = sum(int((~cells.exact).sum()) for cells in outcome.cells.values())
        doubt = denominator_may_be_zero(outcome, level)
        return Facts(
            metrics=outcome.metrics,
            prompts=outcome.count,
            noise=_noise(outcome.kind, outcome.info),
            ablation=ablation_of(outcome.kind, outcome.info),
            one_answer=_one_answer(outcome),
            one_way=outcome.scale == "restored" and not _both_ways(outcome),
            together=outcome.info.get("together", ""),
            # Where the denominator may be 0, that is what there is to say.
            width=None if doubt else _width(outcome, width, level),
            race=None if doubt else _race(outcome, distinct, level),
            mixed=_mixed(outcome),
            estimates=None if measured else values,
            denominator=_NEAR_ZERO.format(metric=outcome.metric) if doubt else "",
            weak=() if doubt else _weak(outcome),
            unsure=() if unsure is None else unsure,
        )


_NEAR_ZERO = "Source and target run may not differ in {metric} on average"


def unsure_of(outcome: Outcome) -> tuple[int, ...] | None:
    """The prompts whose own runs do not prefer their own answers; None if that is not known.

    A difference of the two answers tells it, if one was measured under its own name.
    """
    name = next((each for each in _DIFFERENCES if each in outcome.baselines), None)
    if name is None or outcome.moments is not None:
        return None
    baseline = outcome.baselines[name]
    source, target = baseline.source, baseline.target
    if "swapped" in outcome.info:
        source, target = target, source
    wrong = ~(source > 0)
    # An ablation has one run; what is left of a circuit without edges need not prefer anything.
    if outcome.scale == "restored" and not ablation_of(outcome.kind, outcome.info):
        wrong |= ~(target < 0)
    return tuple(wrong.nonzero().flatten().tolist())


def ablation_of(kind: str, info: Mapping[str, str]) -> str:
    """The method by which activations were taken away; "" if they were another run's."""
    told = info.get("ablation", kind)
    return next((name for name in ("zero", "mean", "resample") if name in told), "")


def _one_answer(outcome: Outcome) -> str:
    """The answer that all prompts call for, where a mean or another of them is put; "" if none."""
    if ablation_of(outcome.kind, outcome.info) not in ("mean", "resample") or outcome.count < 2:
        return ""
    answers = next(iter(outcome.prompts.answers.values()), ())
    return answers[0] if len(answers) > 1 and len(set(answers)) == 1 else ""


def _noise(kind: str, info: Mapping[str, str]) -> bool:
    return any("noise" in each.lower() for each in (kind, info.get("corruption", "")))


def _measured(outcome: Outcome, name: str) -> bool:
    """Whether some cell was measured, and did not come known or estimated."""
    cells = outcome.cells[name]
    return bool((cells.exact & ~cells.known.all(-1)).any())


def _both_ways(outcome: Outcome) -> bool:
    """Whether each pair is there the other way round as well."""
    if outcome.moments is not None:
        return False
    prompts = outcome.prompts
    source = _keys(prompts.source_tokens, prompts.source_mask)
    target = _keys(prompts.target_tokens, prompts.target_mask)
    return set(zip(source, target, strict=True)) == set(zip(target, source, strict=True))


def _keys(tokens: Tensor, mask: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row[own.bool()].tolist()) for row, own in zip(tokens, mask, strict=True)]


def _width(outcome: Outcome, width: float, level: float) -> Width | None:
    """How many prompts the interval of the strongest cell needs; None where that has no meaning."""
    if outcome.magnitude or outcome.scale != "restored" or outcome.count < 2:
        return None
    groups = strongest_groups(outcome, tuple(outcome.cells), 1, True)
    if not groups:
        return None
    name, (first, *_) = groups[0]
    found: Any = needed(outcome, name, width, level)
    number = float(found[tuple(outcome.cells[name].index[first].tolist())])
    (row,) = make_top(outcome, 1, None, True, flips=0)
    # Of nan, which a patched run gave, nothing is said.
    return None if number != number else Width(cell_name(row), width, number, outcome.count)


def _race(outcome: Outcome, distinct: bool, level: float) -> Race | None:
    """The two strongest that are not one fact, if their intervals overlap as sizes."""
    rows = [*make_top(outcome, 2, None, distinct, level=level, flips=0)]
    if len(rows) < 2 or not all(math.isfinite(row.get("high", math.nan)) for row in rows):
        return None
    ends = [_sizes(row["low"], row["high"]) for row in rows]
    if not ends[0][0] <= ends[1][1]:
        return None
    told = [f"{cell_name(row)} {in_digits(row['low'])} to {in_digits(row['high'])}" for row in rows]
    return Race(*told)


def _sizes(low: float, high: float) -> tuple[float, float]:
    """The ends of an interval of a size, given those of a value."""
    least = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    return least, max(abs(low), abs(high))


def _mixed(outcome: Outcome) -> str:
    """In words, why a position does not mean the same in all prompts, if several were swept."""
    if outcome.moments is not None or not _by_position(outcome):
        return ""
    prompts = outcome.prompts
    lengths = torch.cat([prompts.source_mask.sum(1), prompts.target_mask.sum(1)])
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest != longest:
        return f"Prompts have {shortest} to {longest} tokens"
    kinds = templates_of(prompts.target_tokens, _fixed(prompts))
    if len(kinds) == 1:
        return ""
    count = f"{len(kinds)}{' or more' if len(kinds) == MOST else ''}"
    return f"Prompts have other words at the same places, as of {count} templates"


def _by_position(outcome: Outcome) -> bool:
    for cells in outcome.cells.values():
        at = [number for number, axis in enumerate(cells.axes) if axis.name == "position"]
        if at and len(torch.unique(cells.index[:, at[0]])) > 1:
            return True
    return False


def _fixed(prompts: Prompts) -> Tensor:
    """`[batch, seq]`: where the two runs of a pair are alike, which is what it is not about."""
    same = prompts.source_tokens == prompts.target_tokens
    return same & prompts.target_mask.bool()


def _weak(outcome: Outcome) -> tuple[int, ...]:
    """The prompts whose source and target run differ by little, or the other way than the mean."""
    if outcome.scale != "restored" or outcome.moments is not None or outcome.count < 2:
        return ()
    apart = outcome.baseline.source.double() - outcome.baseline.target.double()
    mean = apart.mean()
    return tuple((~(apart / mean >= _LITTLE)).nonzero().flatten().tolist())
