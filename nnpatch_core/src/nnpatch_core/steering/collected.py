"""Coordinates of a data set, as rows with labels, and their pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._extras import extra
from nnpatch_core._printable import named, shown
from nnpatch_core.errors import OutcomeError, UnknownNameError
from nnpatch_core.results import GUIDE, distinct, new_picture

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

#: Columns that every row has; labels are called otherwise.
OWN = ("prompt", "run", "position", "token")
#: So many groups can be told apart in a picture.
_MOST = 12
_BINS, _LABEL = 40, 40


def column_of(number: int) -> str:
    """The name of a coordinate's column."""
    return f"c{number}"


@attrs.frozen(eq=False, repr=False)
class Collected:
    """Coordinates of tokens in a subspace, a row for each token; `collect` makes it.

    Args:
        values: `[rows, rank]`, float32 on the CPU.
        prompts: for each row the number of its prompt; of a pair that of the pair.
        runs: for each row `"source"` or `"target"`; None without pairs.
        positions: for each row its position, counted from the end of its prompt: -1 is the last
            token.
        tokens: for each row its token's text; its id where there was no tokenizer.
        labels: what was said of the prompts, by name: one value for each row.
        site: the label of the site.
    """

    values: Tensor
    prompts: tuple[int, ...]
    runs: tuple[str, ...] | None
    positions: tuple[int, ...]
    tokens: tuple[Any, ...]
    labels: Mapping[str, tuple[Any, ...]]
    site: str

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        rows, rank = self.values.shape
        labels = f", labelled by {', '.join(map(named, self.labels))}" if self.labels else ""
        return f"Collected({rows} rows of {rank} coordinates at {self.site}{labels})"

    @property
    def columns(self) -> dict[str, tuple[Any, ...]]:
        """The labels of the rows, by name: prompt, run, position and token, and yours."""
        runs = {} if self.runs is None else {"run": self.runs}
        return {
            "prompt": self.prompts,
            **runs,
            "position": self.positions,
            "token": self.tokens,
            **self.labels,
        }

    def to_dataframe(self) -> pandas.DataFrame:
        """A row for each token: what it is, its labels, and its coordinates `c0`, `c1`, ...

        Raises:
            OutcomeError: pandas is not installed.
        """
        module = extra("pandas", "pandas")
        values = self.values.double().numpy()
        coordinates = {column_of(number): values[:, number] for number in range(values.shape[1])}
        frame: pandas.DataFrame = module.DataFrame(
            {**{name: list(each) for name, each in self.columns.items()}, **coordinates}
        )
        return frame

    def plot(self, by: str | None = None) -> Figure:
        """Draw the coordinates.

        Of rank 1 a histogram, or, with `by`, the points of each group above one another, with their
        mean; of a higher rank the points in the first two coordinates.

        Args:
            by: the name of a label, or `"run"`, `"position"`, `"token"` or `"prompt"`, by whose
                values the rows are told apart; None is all alike.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            UnknownNameError: there is no such label.
            OutcomeError: it has too many values to be told apart; or matplotlib is not installed
                (`pip install 'nnpatch-core[plot]'`).
        """
        groups = self._groups(by)
        if self.values.shape[1] > 1:
            return self._scatter(groups, by)
        return self._histogram() if by is None else self._strip(groups, by)

    def _groups(self, by: Any) -> dict[str, list[int]]:
        """The rows of each group, by what it is called, as they come first."""
        if by is None:
            return {"": list(range(len(self)))}
        columns = self.columns
        if not isinstance(by, str) or by not in columns:
            raise UnknownNameError(f"no label {shown(by)}; there are {', '.join(columns)}")
        groups: dict[str, list[int]] = {}
        for row, value in enumerate(columns[by]):
            groups.setdefault(_word(value), []).append(row)
        if len(groups) > _MOST:
            raise OutcomeError(
                f"label {by!r} has {len(groups)} values, and a picture tells {_MOST} apart: take "
                "another label, or draw to_dataframe() yourself"
            )
        return groups

    def _histogram(self) -> Figure:
        figure: Figure = new_picture(6.4, 3.6)
        axis = figure.subplots()
        values = self.values[:, 0].numpy()
        axis.hist(values, bins=min(_BINS, max(10, len(values) // 5)), color=distinct(1)[0])
        axis.set_ylabel("tokens", fontsize=9)
        return self._finished(figure, axis)

    def _strip(self, groups: Mapping[str, Sequence[int]], by: str) -> Figure:
        figure: Figure = new_picture(6.4, 1.5 + 0.5 * len(groups))
        axis = figure.subplots()
        colours = distinct(len(groups))
        for height, (colour, rows) in enumerate(zip(colours, groups.values(), strict=True)):
            values = self.values[list(rows), 0].numpy()
            # Spread by their number, so that the picture is the same each time.
            spread = (np.arange(len(values)) * 0.618034 % 1 - 0.5) * 0.56
            axis.scatter(values, height + spread, s=14, c=colour, alpha=0.6, linewidths=0)
            axis.plot([values.mean()] * 2, [height - 0.38, height + 0.38], color="black", lw=1.4)
        axis.set_yticks(range(len(groups)), list(groups))
        for label in axis.get_yticklabels():
            label.set_parse_math(False)
        axis.set_ylim(len(groups) - 0.5, -0.5)
        axis.set_ylabel(by, fontsize=9).set_parse_math(False)
        return self._finished(figure, axis)

    def _scatter(self, groups: Mapping[str, Sequence[int]], by: str | None) -> Figure:
        figure: Figure = new_picture(6.4, 4.8)
        axis = figure.subplots()
        for colour, (name, rows) in zip(distinct(len(groups)), groups.items(), strict=True):
            points = self.values[list(rows), :2].numpy()
            axis.scatter(
                points[:, 0], points[:, 1], s=16, c=colour, alpha=0.65, linewidths=0, label=name
            )
        axis.set_ylabel("coordinate c1", fontsize=9)
        if by is not None:
            legend = figure.legend(
                loc="outside right upper", title=by, fontsize=8, title_fontsize=9, frameon=False
            )
            for text in (*legend.get_texts(), legend.get_title()):
                text.set_parse_math(False)
        if _holds_zero(self.values[:, 1]):
            axis.axhline(0, color=GUIDE, linewidth=0.6, zorder=0)
        return self._finished(figure, axis)

    def _finished(self, figure: Figure, axis: Any) -> Figure:
        one = self.values.shape[1] == 1
        # A guide elsewhere would press the points together.
        if _holds_zero(self.values[:, 0]):
            axis.axvline(0, color=GUIDE, linewidth=0.6, zorder=0)
        axis.set_xlabel("coordinate" if one else "coordinate c0", fontsize=9)
        axis.set_title(self.site, fontsize=10).set_parse_math(False)
        axis.tick_params(labelsize=8, length=2)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        return figure


def _holds_zero(values: Tensor) -> bool:
    return bool(values.min() <= 0 <= values.max())


def _word(value: Any) -> str:
    """A label's value in a picture."""
    word = named(value.item() if isinstance(value, Tensor) and value.ndim == 0 else value)
    return word if len(word) <= _LABEL else f"{word[: _LABEL - 1]}…"


def joined(parts: Sequence[Collected]) -> Collected:
    """Rows of several batches, below one another; they have the same labels."""
    first = parts[0]

    def every(name: str) -> tuple[Any, ...]:
        return tuple(each for part in parts for each in getattr(part, name))

    labels = {name: sum((part.labels[name] for part in parts), ()) for name in first.labels}
    return Collected(
        torch.cat([part.values for part in parts]),
        every("prompts"),
        None if first.runs is None else every("runs"),
        every("positions"),
        every("tokens"),
        labels,
        first.site,
    )
