"""Metrics are tried out on the unpatched runs, so that what they break shows before a cell runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import attrs
import torch
from torch import Tensor
from torch.nn.functional import pad

from nnpatch_core.errors import MetricError
from nnpatch_core.metrics import (
    Metric,
    MetricContext,
    as_numbers,
    called,
    columns_read,
    is_per_prompt,
    measure,
    reads_some,
    stacked,
)
from nnpatch_core.results import Baseline

#: What two calls on the same logits may differ by, relatively and absolutely.
_SAME = {"rtol": 1e-4, "atol": 1e-6}


@attrs.frozen(eq=False)
class _Rows:
    """Runs that a metric is given, and what it must give where that is known (else nan)."""

    logits: Tensor
    context: MetricContext
    expected: Tensor

    def take(self, index: Tensor) -> _Rows:
        """Some of them, in any order."""
        return _Rows(self.logits[index], self.context.rows(index), self.expected[index])


def try_out(
    metrics: Mapping[str, Metric], context: MetricContext, baseline: Mapping[str, Baseline]
) -> None:
    """Hold each metric to what it declares, and to giving the same numbers twice.

    Args:
        metrics: by name.
        context: what the metrics compare with, for all prompts.
        baseline: what they gave for the unpatched runs.

    Raises:
        MetricError: one of them does not keep it; the message names it.
    """
    for name, metric in metrics.items():
        _try_again(name, metric, context, baseline[name])
        if is_per_prompt(metric):
            rows = _mixed(context, baseline[name])
            _try_in_company(name, metric, _companies(rows))
            everyone = _Rows(context.target_logits, context, baseline[name].target)
            _try_in_company(name, metric, _alone(everyone))
        else:
            rows = _Rows(context.target_logits, context, baseline[name].target)
        if reads_some(metric):
            _try_without(name, metric, rows, columns_read({name: metric}, context))
        _try_padding(name, metric, rows)


def _differ(numbers: Tensor, expected: Tensor) -> bool:
    known = ~expected.isnan()
    return not torch.allclose(numbers[known], expected[known], **_SAME, equal_nan=True)


def _try_again(name: str, metric: Metric, context: MetricContext, before: Baseline) -> None:
    runs = (
        (context.source_logits, context.of_source_run, before.source),
        (context.target_logits, context, before.target),
    )
    for logits, own, expected in runs:
        numbers = measure({name: metric}, logits, own)[name]
        if _differ(numbers, expected):
            raise MetricError(
                f"metric {name!r} gives another number when it is called again with the same "
                f"logits ({_first(numbers, expected)}): it keeps something between calls, or is "
                "random. What it must know of each prompt it can take from the context"
            )


def _mixed(context: MetricContext, before: Baseline) -> _Rows:
    """Some prompts of both runs, backwards, one of them once more, and a stranger between them.

    Not all of the prompts: each takes a whole vocabulary. The stranger is a run that no prompt has:
    a metric that looks at it tells itself from one that does not, even where there is but one
    prompt and one run.
    """
    batch = len(context.source_answer_index)
    some = sorted({0, batch // 2, batch - 1})
    target = torch.tensor([*reversed(some)], device="cpu")
    source = torch.tensor([*some, some[0]], device="cpu")
    nothing = before.target.new_full((1,), torch.nan)
    runs = context.target_logits[target], context.source_logits[source]
    own = context.rows(target), context.rows(target[:1]), context.of_source_run.rows(source)
    return _Rows(
        torch.cat([runs[0], -2 * runs[0][:1].flip(-1), runs[1]]),
        stacked(own),
        torch.cat([before.target[target], nothing, before.source[source]]),
    )


def _try_in_company(name: str, metric: Metric, companies: Iterable[_Rows]) -> None:
    advice = "take the declaration away, and it is given all prompts in their order"
    for company in companies:
        try:
            numbers = measure({name: metric}, company.logits, company.context)[name]
        except MetricError as error:
            raise MetricError(
                f"metric {name!r} is declared with per_prompt, but cannot be called on some of the "
                f"prompts ({error}): {advice}"
            ) from error
        if _differ(numbers, company.expected):
            raise MetricError(
                f"metric {name!r} is declared with per_prompt, but gives a prompt another number "
                f"in other company ({_first(numbers, company.expected)}): {advice}"
            )


def _companies(rows: _Rows) -> Iterator[_Rows]:
    """The rows together, each alone, and all of them in another order."""
    everyone = torch.arange(len(rows.logits), device="cpu")
    yield rows
    yield from _alone(rows)
    seeded = torch.Generator("cpu").manual_seed(0)
    yield rows.take(torch.randperm(len(everyone), generator=seeded, device="cpu"))


def _alone(rows: _Rows) -> Iterator[_Rows]:
    """Each of the rows by itself."""
    for row in torch.arange(len(rows.logits), device="cpu"):
        yield rows.take(row[None])


def _try_without(name: str, metric: Metric, rows: _Rows, columns: Tensor | None) -> None:
    """Raise if the metric reads other logits than those of `columns`, which alone are computed."""
    assert columns is not None
    unread = torch.ones(rows.logits.shape[-1], dtype=torch.bool, device="cpu")
    unread[columns] = False
    others = unread.nonzero().flatten()
    if not len(others):
        return
    read = rows.context.positions
    places = None if read is None else read.shape[1]
    for what, moved in _moved(rows.logits, others, places):
        try:
            numbers = as_numbers(called(name, metric, moved, rows.context))
        except MetricError as error:
            raise MetricError(
                f"metric {name!r} reads logits of tokens that it did not declare with reads_tokens:"
                f" where they are {what}, it cannot be called ({error})"
            ) from error
        if _differ(numbers, rows.expected):
            raise MetricError(
                f"metric {name!r} reads logits of tokens that it did not declare with reads_tokens:"
                f" where they are {what}, it gives {_first(numbers, rows.expected)}"
            )


def _try_padding(name: str, metric: Metric, rows: _Rows) -> None:
    """Raise if the metric reads logits at padding, which are nan, and makes a number of them."""
    if rows.context.positions is None:
        return
    padding = rows.context.padding
    if not padding.any():
        return
    for what, value in (("0", 0.0), ("other numbers", 3.0)):
        logits = rows.logits.clone()
        spare = logits.shape[1] - padding.shape[1]
        padding = pad(padding, (0, spare))
        steps = torch.linspace(-value, value, logits.shape[-1], dtype=logits.dtype, device="cpu")
        logits[padding] = steps
        numbers = as_numbers(called(name, metric, logits, rows.context))
        if _differ(numbers, rows.expected):
            raise MetricError(
                f"metric {name!r} reads logits at padding, of which there are none: where they are "
                f"{what} instead of nan, it gives {_first(numbers, rows.expected)}. Choose by "
                "context.mask at context.positions"
            )


def _moved(whole: Tensor, others: Tensor, places: int | None) -> Iterator[tuple[str, Tensor]]:
    """The logits with those of `others` moved: what a comparison with them would see.

    Behind the first `places` stand activations, which stay.
    """
    logits = whole if places is None else whole[:, :places]
    count, kind = len(others), logits.dtype
    steps = torch.linspace(1, 2, count, dtype=kind, device="cpu")
    seeded = torch.Generator("cpu").manual_seed(0)
    shifts = 4 * torch.randn(count, generator=seeded, dtype=kind, device="cpu")
    finite = [row[row.isfinite()] for row in logits]
    ends = [(row.min(), row.max()) if len(row) else (row.sum(), row.sum()) for row in finite]
    moves: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor | float]] = {
        "nan": lambda row, low, high: torch.nan,
        "above all others": lambda row, low, high: high + (high - low + 1) * steps,
        "below all others": lambda row, low, high: low - (high - low + 1) * steps,
        "moved at random": lambda row, low, high: (
            row[..., others].nan_to_num(0, 0, 0) + (high - low + 1) * shifts
        ),
    }
    for what, move in moves.items():
        moved = logits.clone()
        # Row by row, as a copy more of all of them may not fit in memory.
        for row, (low, high) in zip(moved, ends, strict=True):
            row[..., others] = move(row, low, high)
        yield what, moved if places is None else torch.cat([moved, whole[:, places:]], 1)


def _first(numbers: Tensor, expected: Tensor) -> str:
    """The first number that is another, and what it should be."""
    same = torch.isclose(numbers, expected, **_SAME, equal_nan=True) | expected.isnan()
    row = int((~same).nonzero()[0]) if not same.all() else 0
    return f"{float(numbers[row]):.6g} instead of {float(expected[row]):.6g}"
