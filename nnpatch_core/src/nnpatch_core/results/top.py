"""The strongest cells as a table that says how sure each value is."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, overload
from unicodedata import combining, east_asian_width

import attrs

from nnpatch_core._arguments import check_flags
from nnpatch_core._extras import extra
from nnpatch_core._html import block, heading, paragraph, table
from nnpatch_core._integers import strict_int
from nnpatch_core._printable import printable
from nnpatch_core._ranges import ranges
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results import tables
from nnpatch_core.results.axes import NUMBERED
from nnpatch_core.results.columns import DRAWS, doubt_of, ends_by_means, only_means
from nnpatch_core.results.neighbours import by_strength, distinct_cells
from nnpatch_core.results.selection import find_names
from nnpatch_core.results.statistics import (
    Draws,
    Figured,
    alike,
    cell_values,
    ends_of,
    least_pvalue,
    pvalues_of,
    read_level,
)
from nnpatch_core.results.words import in_digits, unit_of

if TYPE_CHECKING:
    import pandas

LEVEL = 0.95
#: How long a line of words is in a terminal.
_WIDE = 100
#: The columns of a row, in their order; a row has those that say something of its cell.
_COLUMNS = (
    *("site", "label", "circuit", "sender", "receiver", "layer", "layers", "position", "token"),
    *("column", "span", "head"),
    *("exact", "value", "low", "high", "p_value"),
)
#: Those that stand on the left of their place in a terminal.
_TEXTS = ("site", "label", "circuit", "sender", "receiver", "layers", "token", "span")


@attrs.frozen(eq=False, repr=False)
class Top(Sequence[Mapping[str, Any]]):
    """The strongest cells of an outcome, a row each; `Outcome.top` makes it.

    It is a sequence of rows, and prints as a table, in a terminal and in a notebook.

    Args:
        rows: the rows, strongest first.
        title: the metric, the unit and the prompts.
        notes: how intervals and p-values are made, and what they assume.

    Examples:
        >>> rows = [{"site": "mlp", "layer": 3, "layers": "3-5", "value": 0.9}]
        >>> print(Top(tuple(rows), "logit_difference", ("Of one prompt.",)))
        logit_difference
        site  layer  layers  value
        mlp       3  3-5     0.900
        Of one prompt.
    """

    rows: tuple[Mapping[str, Any], ...]
    title: str
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> Top: ...

    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | Top:
        if isinstance(index, slice):
            return attrs.evolve(self, rows=self.rows[index])
        return self.rows[index]

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        notes = (line for words in self.notes for line in textwrap.wrap(words, _WIDE))
        return "\n".join([self.title, *self._lines(), *notes])

    def _repr_html_(self) -> str:
        return block(pieces(self, self.title))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that some row has, in their order.

        Examples:
            >>> Top(({"site": "mlp", "layer": 3, "value": 0.9},), "", ()).columns
            ('site', 'layer', 'value')
        """
        return tuple(name for name in _COLUMNS if any(name in row for row in self.rows))

    def to_dataframe(self) -> pandas.DataFrame:
        """The rows as a data frame.

        Raises:
            OutcomeError: pandas is not installed (`pip install nnpatch-core[pandas]`).

        Examples:
            >>> list(Top(({"site": "mlp", "layer": 3, "value": 0.9},), "", ()).to_dataframe())
            ['site', 'layer', 'value']
        """
        module = extra("pandas", "pandas")
        columns = self.columns
        made: pandas.DataFrame = module.DataFrame(list(self.rows), columns=list(columns))
        return made.astype({name: "Int64" for name in columns if name in NUMBERED})

    def _lines(self) -> list[str]:
        """The table as a terminal shows it, column under column."""
        columns = self.columns
        lines = [list(columns), *(written(row, columns) for row in self.rows)]
        widths = [max(map(width_of, cells)) for cells in zip(*lines, strict=True)]
        return [
            "  ".join(
                padded(cell, width, left=name in _TEXTS)
                for name, cell, width in zip(columns, line, widths, strict=True)
            ).rstrip()
            for line in lines
        ]


def pieces(top: Top, title: str) -> str:
    """A table of strongest cells as HTML, with its words below."""
    columns = top.columns
    cells = [written(row, columns) for row in top.rows]
    return heading(title) + table(columns, cells) + "".join(map(paragraph, top.notes))


def bars_told(top: Top) -> tuple[str, ...]:
    """The sentence that tells what a bar in a token's label is, where there is one.

    Examples:
        >>> bars_told(Top(({"token": " France| Japan"},), "", ()))
        ("A bar in a token, as in ' France| Japan', stands between tokens of different prompts.",)
    """
    label = next((row["token"] for row in top.rows if "|" in row.get("token", "")), None)
    if label is None:
        return ()
    shown = printable(label)
    return (f"A bar in a token, as in '{shown}', stands between tokens of different prompts.",)


def written(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """The cells of a printed row; "" where it has nothing."""
    return [_written(name, row[name]) if name in row else "" for name in columns]


def make_top(
    figured: Figured,
    n: Any,
    name: Any,
    distinct: Any,
    *,
    level: Any = LEVEL,
    flips: int = DRAWS.count,
) -> Top:
    """The strongest cells; see `Outcome.top`.

    Args:
        figured: an outcome, or a combination.
        n: the number of rows, at most.
        name: site names, or one; None is all.
        distinct: whether neighbouring layers of almost one value share a row.
        level: of the intervals.
        flips: of signs, for p-values, which take all cells and not the strongest alone; 0 for none.

    Raises:
        OutcomeError: see `Outcome.top`.
    """
    count = strict_int(n, "n", OutcomeError)
    if count < 0:
        raise OutcomeError(f"n must be at least 0, got {count}")
    check_flags(distinct=distinct)
    read = read_level(level)
    names = tuple(dict.fromkeys(find_names(figured.cells, name, "name")))
    groups = strongest_groups(figured, names, count, bool(distinct))
    rows = _labelled(figured, groups, bool(distinct))
    notes: list[str] = []
    if rows:
        columns, notes = _how_sure(figured, names, groups, read, flips)
        for column, values in columns.items():
            for row, value in zip(rows, values, strict=True):
                row[column] = value
    return Top(tuple(rows), _title(figured, names), tuple(notes))


#: A site name, and the numbers of some of its cells, of which the first is the strongest.
_Group: TypeAlias = tuple[str, list[int]]


def _title(figured: Figured, names: Sequence[str]) -> str:
    cells = sum(len(figured.cells[name].index) for name in names)
    prompts = "1 prompt" if figured.count == 1 else f"{figured.count} prompts"
    words = [figured.metric, unit_of(figured), prompts]
    if len(figured.terms) == 1:
        words = [figured.kind, *words]
    return printable(f"The strongest of {cells} cells: {', '.join(words)}")


def strongest_groups(
    figured: Figured, names: Sequence[str], count: int, distinct: bool
) -> list[tuple[str, list[int]]]:
    """The strongest cells, each with those that say the same: a site name, and cells by number.

    The first of these is the strongest.
    """
    values: list[float] = []
    owners: list[tuple[str, int]] = []
    layers: list[int | None] = []
    others: list[tuple[Any, ...]] = []
    for name in names:
        cells = figured.cells[name]
        values += cell_values(figured, name).tolist()
        owners += [(name, number) for number in range(len(cells.index))]
        layered = distinct and cells.axes[0].name == "layer"
        for place in cells.index.tolist():
            layers.append(place[0] if layered else None)
            others.append((name, *(place[1:] if layered else place)))
    if distinct:
        groups = distinct_cells(values, layers, others, count)
    else:
        groups = [[number] for number in by_strength(values)[:count]]
    return [
        (owners[numbers[0]][0], [owners[number][1] for number in numbers]) for numbers in groups
    ]


def _labelled(figured: Figured, groups: Sequence[_Group], distinct: bool) -> list[dict[str, Any]]:
    """A row for each group, with the labels and the value of its strongest cell."""
    found = []
    tokens, estimated = figured.tokens, figured.estimated
    values = {name: cell_values(figured, name).tolist() for name in {name for name, _ in groups}}
    for name, numbers in groups:
        cells, first = figured.cells[name], numbers[0]
        columns: dict[str, list[Any]] = {"value": [values[name][first]]}
        if estimated:
            columns["exact"] = [bool(cells.exact[first])]
        place = tables.Block(name, cells.axes, [cells.index[first].tolist()], columns)
        row = next(tables.rows([place], tokens))
        if distinct and "layer" in row:
            row["layers"] = ranges(sorted(cells.index[numbers, 0].tolist()))
        found.append({column: row[column] for column in _COLUMNS if column in row})
    return found


def _how_sure(
    figured: Figured, names: Sequence[str], groups: Sequence[_Group], level: float, flips: int
) -> tuple[dict[str, list[float]], list[str]]:
    """The columns that say how sure a row's value is, and the words that say what they are."""
    if figured.count < 2:
        return {}, ["Of one prompt: nothing tells how much other prompts would change a value."]
    what = f"{100 * level:g} % interval of the value for prompts like these {figured.count}"
    if only_means(figured):
        return _by_means(figured, groups, what, level)
    notes = [
        f"low to high: {what}, each row by itself, from drawing "
        "the prompts again and again (BCa bootstrap)."
    ]
    columns = _resampled(figured, groups, level)
    if flips:
        p_values, said = _p_values(figured, names, groups, flips)
        columns |= p_values
        notes += [*said, *_disagreement(columns)]
    if figured.estimated:
        notes.append(
            "Where exact is False the value is an estimate, and the interval is of that estimate, "
            "which may be off in every prompt."
        )
    which = "Both take" if "p_value" in columns else "It takes"
    notes.append(f"{which} the prompts to be drawn independently of one another.")
    doubt = doubt_of(figured, level)
    return columns, [*notes, *([f"Beware: {doubt}."] if doubt else [])]


def _by_means(
    figured: Figured, groups: Sequence[_Group], what: str, level: float
) -> tuple[dict[str, list[float]], list[str]]:
    found = {name: ends_by_means(figured, name, level) for name in {name for name, _ in groups}}
    columns: dict[str, list[float]] = {"low": [], "high": []}
    doubt = doubt_of(figured, level)
    for name, (first, *_) in groups:
        ends = found[name]
        if ends is None:
            return {}, ["Only means were kept: there are no intervals and no p-values."]
        for column, end in zip(columns.values(), ends, strict=True):
            column.append(float(end[first]))
    return columns, [
        f"low to high: {what}, each row by itself, from its standard error by Student's t. Only "
        "means were kept: there are no p-values.",
        "It takes the prompts to be drawn independently of one another.",
        *([f"Beware: {doubt}."] if doubt else []),
    ]


def _resampled(figured: Figured, groups: Sequence[_Group], level: float) -> dict[str, list[float]]:
    """The intervals of the cells that are shown: those of the others would cost as much each."""
    rows: dict[str, list[int]] = {}
    for number, (name, _) in enumerate(groups):
        rows.setdefault(name, []).append(number)
    low, high = [math.nan] * len(groups), [math.nan] * len(groups)
    for name, numbers in rows.items():
        firsts = [groups[number][1][0] for number in numbers]
        for found, ends in zip(
            (low, high), ends_of(figured, name, firsts, level, DRAWS), strict=True
        ):
            for number, end in zip(numbers, ends.tolist(), strict=True):
                found[number] = end
    return {"low": low, "high": high}


def _p_values(
    figured: Figured, names: Sequence[str], groups: Sequence[_Group], flips: int
) -> tuple[dict[str, list[float]], list[str]]:
    """The column of p-values, if there are any, and the words about them."""
    if len(alike([term.outcome for term in figured.terms])) > 1:
        return {}, [
            "There are no p-values: the sides have different prompts, whose signs cannot be "
            "flipped together. For the intervals the prompts of each side are drawn by themselves."
        ]
    draws = Draws(flips, 0)
    try:
        found = pvalues_of(figured, names, "max_t", draws)
    except OutcomeError as error:
        return {}, [f"There are no p-values: {error}."]
    family = sum(int(values.isfinite().sum()) for values in found.values())
    if not family:
        ran = any(not bool(figured.cells[name].known.all(-1).all()) for name in names)
        why = "runs gave nan or inf" if ran else "no patch put something else anywhere"
        return {}, [f"There are no p-values: {why}."]
    column = [
        found[name][tuple(figured.cells[name].index[first].tolist())].item()
        for name, (first, *_) in groups
    ]
    notes = [
        "p_value: how often chance alone would give a value as clear as this one to any of the "
        f"{family} cells that ran, if no patch did anything on average (max-T over flips of the "
        "prompts' signs)."
    ]
    least = least_pvalue(family, figured.count, "max_t", draws)
    if least > 1 - LEVEL:
        notes.append(
            f"With {figured.count} prompts no p-value can be below {least:.2g}, whatever the "
            "effect: take 6 or more."
        )
    return {"p_value": column}, notes


def _disagreement(columns: Mapping[str, Sequence[float]]) -> list[str]:
    """Say in which rows the interval and the p-value do not tell the same."""
    if "p_value" not in columns:
        return []
    apart, rare = [], []
    rows = zip(columns["low"], columns["high"], columns["p_value"], strict=True)
    for row, (low, high, p_value) in enumerate(rows, 1):
        clear, certain = low > 0 or high < 0, p_value <= 1 - LEVEL
        if clear and p_value > 1 - LEVEL:
            apart.append(row)
        elif certain and -math.inf < low <= 0 <= high < math.inf:
            rare.append(row)
    notes = []
    if apart:
        notes.append(
            f"{_rows(apart)}: the interval leaves 0 out, though the p-value is above "
            f"{1 - LEVEL:.2g}. The interval is of one cell alone and the p-value of the search "
            "among all: go by the p-value, or take more prompts."
        )
    if rare:
        notes.append(
            f"{_rows(rare)}: the interval has 0 in it, though the p-value is at most "
            f"{1 - LEVEL:.2g}. They are made in two ways, which few prompts or rare large values "
            "set apart: take more prompts."
        )
    return notes


def _rows(numbers: Sequence[int]) -> str:
    """Rows by their numbers, counted from 1."""
    return f"Row{'s' * (len(numbers) > 1)} {ranges(numbers)}"


def _written(column: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        text = printable(str(value))
        return f"'{text}'" if column == "token" else text
    if column == "p_value":
        return "" if value != value else f"{value:.4f}"
    return in_digits(value)


def width_of(text: str) -> int:
    """The columns of a terminal that a text takes."""
    return sum(
        0 if combining(letter) else 2 if east_asian_width(letter) in "WF" else 1 for letter in text
    )


def padded(text: str, width: int, *, left: bool) -> str:
    """A text with spaces to so many columns of a terminal."""
    space = " " * (width - width_of(text))
    return text + space if left else space + text
