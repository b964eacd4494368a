"""An outcome as a study."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nnpatch_core.report import LEVEL, WIDTH, Drawing, Study, Table
from nnpatch_core.results.pictures import draw_outcome, kind_of
from nnpatch_core.results.reported.call import call_of, question_of, scale_of
from nnpatch_core.results.reported.facts import facts_of
from nnpatch_core.results.reported.prompts import prompt_tables, prompts_in_words
from nnpatch_core.results.top import Top, bars_told, make_top, written
from nnpatch_core.results.words import cell_name, in_digits, model_name

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome

#: So near to 1 is an interval that holds no other number.
_ONE = 1e-5
#: Rows of the table of the strongest, and of them those that are seen at once.
_ROWS, _SHOWN = 20, 10
#: Rows of the tables of further metrics.
_FURTHER = 5
#: So many metrics have pictures and tables.
_METRICS = 6
#: Columns that hold texts.
_TEXTS = ("site", "label", "circuit", "sender", "receiver", "layers", "token", "span", "exact")
#: The words of `info` that are for machines.
_HIDDEN = ("nodes",)
_CAPTIONS = {
    "heatmap": "All values by {metric}: blue is above 0, red below, and darker grey was not swept. "
    "Frames are around the strongest three. "
    "Printed without colours blue and red look alike, and the numbers below have the signs.",
    "lines": "All values by {metric}.",
    "bars": "The strongest by {metric}.",
}
#: What `plot` takes, as it is by itself.
_PLAIN: dict[str, Any] = dict.fromkeys(
    ("kind", "title", "limit", "crop", "layers", "positions", "size", "values", "ax")
)


def study_of(
    outcome: Outcome, *, level: float = LEVEL, distinct: bool = True, **pictures: Any
) -> Study:
    """All that an outcome of a sweep has to tell.

    Args:
        outcome: the outcome.
        level: of the intervals.
        distinct: whether neighbouring layers of almost one value are one row.
        pictures: arguments of `plot`.
    """
    views = [outcome.for_metric(name) for name in _ordered(outcome)[:_METRICS]]
    tops = [
        make_top(view, _FURTHER if number else _ROWS, None, distinct, level=level)
        for number, view in enumerate(views)
    ]
    return Study(
        title=_title(outcome),
        question=question_of(outcome),
        answer=[
            *(_found(*each, level) for each in zip(views, tops, strict=True)),
            *_found_of_each(views[0], distinct),
            scale_of(outcome),
        ],
        drawings=[
            _drawing(view, top, pictures, level) for view, top in zip(views, tops, strict=True)
        ],
        tables=[table_of_top(top) for top in tops],
        bounds=[*_bounds(outcome)],
        prompts=prompt_tables(outcome),
        prompts_in_words=prompts_in_words(outcome),
        info={name: text for name, text in outcome.info.items() if name not in _HIDDEN},
        call=call_of(outcome),
        facts=facts_of(outcome, WIDTH, level, distinct=distinct),
    )


def table_of_top(top: Top) -> Table:
    """The table of the strongest."""
    columns = top.columns
    return Table(
        top.title,
        columns,
        tuple(tuple(written(row, columns)) for row in top.rows),
        frozenset(name for name in columns if name not in _TEXTS),
        _SHOWN,
        (*bars_told(top), *top.notes),
    )


def _ordered(outcome: Outcome) -> list[str]:
    """The metrics, the one that the outcome shows first."""
    return [outcome.metric, *(name for name in outcome.metrics if name != outcome.metric)]


def _title(outcome: Outcome) -> str:
    model = model_name(outcome.info.get("model", ""))
    return f"{model}: {outcome.kind}" if model else outcome.kind


def _found(outcome: Outcome, top: Top, level: float) -> str:
    """The strongest, in a sentence."""
    if not top.rows:
        return f"Nothing was swept, so that there is nothing to see by {outcome.metric}."
    row = top.rows[0]
    layers = row.get("layers", "")
    others = f" (layers {layers})" if layers and str(row.get("layer")) != layers else ""
    sure = ""
    if "low" in row:
        sure = f", {100 * level:g} % interval {in_digits(row['low'])} to {in_digits(row['high'])}"
    told = "" if row.get("exact", True) else ", an estimate"
    # As of the stream at the last token after the last layer, whatever the prompts are.
    ends = [row[name] for name in ("low", "high") if name in row]
    if outcome.scale == "restored" and ends and all(abs(end - 1) < _ONE for end in ends):
        told += "; it is 1 for any prompts, as all of the answer passes there"
    return (
        f"By {outcome.metric} the strongest is {cell_name(row)}{others}: "
        f"{in_digits(row['value'])}{sure}{told}."
    )


def _found_of_each(outcome: Outcome, distinct: bool) -> Iterator[str]:
    """The strongest of each site name, where there are several: the stream alone says little."""
    if len(outcome.cells) < 2:
        return
    tops = [make_top(outcome, 1, name, distinct, flips=0) for name in outcome.cells]
    told = [
        f"{cell_name(top.rows[0])} {in_digits(top.rows[0]['value'])}" for top in tops if top.rows
    ]
    yield f"The strongest of each site: {', '.join(told)}."


def _drawing(outcome: Outcome, top: Top, asked: dict[str, Any], level: float) -> Drawing:
    options = {**_PLAIN, "interactive": False, "mark": 3, "mute": level, **asked}

    def draw() -> Any:
        return draw_outcome(outcome, sites=None, metrics=None, **options)

    kind = kind_of(outcome, tuple(outcome.cells), options["kind"])
    caption = _CAPTIONS[kind].format(metric=outcome.metric)
    label = f"Picture of {', '.join(outcome.cells)}. {_found(outcome, top, level)}"
    return Drawing(caption, label, draw)


def _bounds(outcome: Outcome) -> Iterator[str]:
    """Sentences on what was not measured, and how large it may be."""
    screening = outcome.screening
    if screening is None:
        return
    yield (
        f"{screening.by} put {screening.chosen:,} cells first, and these were measured. Of the "
        f"other {screening.rest:,} a random {screening.checked:,} were measured too, as a check."
    )
    if screening.checked:
        yield (
            f"The largest value among those checked is {in_digits(screening.largest)}: with 95 "
            f"percent confidence at most {screening.missed_at_most():,} cells that were not "
            "measured exceed it."
        )
