"""A curve over values to steer with: how likely the answers become."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit
from torch import Tensor

from nnpatch_core._extras import extra
from nnpatch_core.results import GUIDE, distinct, new_picture

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_Floats = NDArray[np.float64]
#: What an answer's curves are called in a picture.
_ANSWERS = ("source", "target")


@attrs.frozen(eq=False)
class Answered:
    """How likely one of the answers is in some runs of the prompts.

    Args:
        probability: `[values, batch]`, or `[batch]` of the unsteered run: of the answer (of any of
            an answer set), float64.
        first: of the same shape, bool: whether no token is likelier.
    """

    probability: Tensor
    first: Tensor


@attrs.frozen(eq=False, repr=False)
class SteeringCurve:
    """The effect of steering values on the answers of some prompts; `sweep_steering` makes it.

    Args:
        values: the steering values, in the order in which they were given.
        source: of the source answers, for each value and prompt.
        target: of the target answers.
        unsteered_source, unsteered_target: the same of the run that is not steered.
        how: how the values were put: `"set"`, `"add"` or `"scale"`.
        site: the label of the site.
        level: of the intervals.
    """

    values: tuple[float, ...]
    source: Answered
    target: Answered
    unsteered_source: Answered
    unsteered_target: Answered
    how: str
    site: str
    level: float

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        ends = f"{min(self.values):g} to {max(self.values):g}"
        count = self.source.probability.shape[1]
        prompts = "prompt" if count == 1 else "prompts"
        return (
            f"SteeringCurve({len(self)} values from {ends}, {count} {prompts}, {self.how} at "
            f"{self.site})"
        )

    def to_dataframe(self, *, per_prompt: bool = False) -> pandas.DataFrame:
        """The curves as a table; the unsteered run has no value (nan).

        The interval of a mean probability is Student's t of the prompts, cut to 0 and 1; that of a
        share of prompts is Wilson's. Both are about other prompts like these, and nan where there
        is but one.

        Args:
            per_prompt: a row for each value, answer and prompt, with `probability` and `first`;
                otherwise for each value and answer, with `probability` and `share`, each with the
                ends of its interval, `*_low` and `*_high`.

        Raises:
            OutcomeError: pandas is not installed.
        """
        module = extra("pandas", "pandas")
        rows: list[dict[str, Any]] = []
        numbers: list[int | None] = [None, *range(len(self))]
        for number in numbers:
            value = float("nan") if number is None else self.values[number]
            for answer in _ANSWERS:
                probability, first = self._of(answer, number)
                row: dict[str, Any] = {"value": value, "answer": answer}
                if per_prompt:
                    rows += [
                        {**row, "prompt": prompt, "probability": each, "first": bool(own)}
                        for prompt, (each, own) in enumerate(zip(probability, first, strict=True))
                    ]
                    continue
                for name, each, ends in (
                    ("probability", probability, mean_interval(probability, self.level)),
                    ("share", first, share_interval(first, self.level)),
                ):
                    row |= {
                        name: float(each.mean()),
                        f"{name}_low": ends[0],
                        f"{name}_high": ends[1],
                    }
                rows.append(row)
        frame: pandas.DataFrame = module.DataFrame(rows)
        return frame

    def plot(self) -> Figure:
        """Draw both answers' mean probability, and the share of prompts where each comes first.

        Shaded are the intervals of `to_dataframe`; dashed lines are the levels without steering.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            OutcomeError: matplotlib is not installed (`pip install 'nnpatch-core[plot]'`).
        """
        figure: Figure = new_picture(8.6, 3.7)
        panels = figure.subplots(1, 2, sharey=True)
        order = np.argsort(self.values, kind="stable")
        at = np.array(self.values)[order]
        titles = ("mean probability", "share of prompts where it comes first")
        for part, (axis, title) in enumerate(zip(panels, titles, strict=True)):
            for answer, colour in zip(_ANSWERS, distinct(2), strict=True):
                interval = (mean_interval, share_interval)[part]
                numbers = [self._of(answer, number)[part] for number in order]
                means = np.array([each.mean() for each in numbers])
                ends = np.array([interval(each, self.level) for each in numbers])
                axis.fill_between(at, ends[:, 0], ends[:, 1], color=colour, alpha=0.18, linewidth=0)
                axis.plot(
                    at, means, color=colour, marker="o", markersize=3.5, linewidth=1.4,
                    label=f"{answer} answer",
                )  # fmt: skip
                axis.axhline(
                    self._of(answer, None)[part].mean(), color=colour, linewidth=1,
                    linestyle="--", zorder=1, label=f"{answer} answer, unsteered",
                )  # fmt: skip
            axis.set_title(title, fontsize=10)
            axis.set_xlabel(_AXES[self.how], fontsize=9)
            axis.set_ylim(-0.03, 1.03)
            axis.axhline(0, color=GUIDE, linewidth=0.5, zorder=0)
            axis.tick_params(labelsize=8, length=2)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
        count = self.source.probability.shape[1]
        shaded = f"{count} prompts, intervals of {100 * self.level:g} % shaded"
        words = f"steered at {self.site}: {'1 prompt' if count == 1 else shaded}"
        figure.suptitle(words, fontsize=10).set_parse_math(False)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False
        )
        return figure

    def _of(self, answer: str, number: Any) -> tuple[_Floats, _Floats]:
        """`[batch]` twice, of one value or (None) of the unsteered run."""
        if number is None:
            own = self.unsteered_source if answer == "source" else self.unsteered_target
            return own.probability.numpy(), own.first.double().numpy()
        own = self.source if answer == "source" else self.target
        return own.probability[number].numpy(), own.first[number].double().numpy()


_AXES = {
    "set": "the coordinate is set to",
    "add": "added to the coordinate",
    "scale": "the coordinate is multiplied by",
}


def mean_interval(values: _Floats, level: float) -> tuple[float, float]:
    """The ends of the interval of a mean of probabilities, by Student's t; nan of one.

    Examples:
        >>> low, high = mean_interval(np.array([0.4, 0.5, 0.6]), level=0.95)
        >>> round(low, 3), round(high, 3)
        (0.252, 0.748)
    """
    count = len(values)
    if count < 2:
        return float("nan"), float("nan")
    half = stdtrit(count - 1, (1 + level) / 2) * values.std(ddof=1) / count**0.5
    mean = values.mean()
    return max(0.0, float(mean - half)), min(1.0, float(mean + half))


def share_interval(hits: _Floats, level: float) -> tuple[float, float]:
    """The ends of the interval of a share, by Wilson; nan of one.

    Wilson, "Probable inference, the law of succession, and statistical inference" (1927).

    Examples:
        >>> low, high = share_interval(np.array([1.0, 1.0, 0.0, 1.0]), level=0.95)
        >>> round(low, 3), round(high, 3)
        (0.301, 0.954)
    """
    count = len(hits)
    if count < 2:
        return float("nan"), float("nan")
    share, square = float(hits.mean()), float(ndtri((1 + level) / 2)) ** 2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = (square * (share * (1 - share) + square / (4 * count)) / count) ** 0.5
    half /= 1 + square / count
    # Of none and of all it ends there, but for rounding.
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return 0.0 if share == 0 else low, 1.0 if share == 1 else high
