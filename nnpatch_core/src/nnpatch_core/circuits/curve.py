"""How faithful circuits of growing size are."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan, nan
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arguments import check_flags, listed
from nnpatch_core._extras import extra
from nnpatch_core._html import block, preformatted
from nnpatch_core._integers import strict_int
from nnpatch_core._printable import shown
from nnpatch_core.circuits.areas import as_numbers
from nnpatch_core.circuits.circuit import Circuit
from nnpatch_core.circuits.scored import as_info
from nnpatch_core.errors import EdgeError
from nnpatch_core.results import GUIDE, distinct, in_digits, letters_of, model_name, new_picture

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


def _values(given: Any) -> Tensor:
    return torch.from_numpy(as_numbers(given, "each of faithfulness, low and high"))


def _fractions(given: Any) -> tuple[float, ...]:
    return tuple(as_numbers(given, "fractions").tolist())


def _sizes(given: Any) -> tuple[int, ...]:
    found = listed(given)
    if found is None or isinstance(given, str | bytes):
        raise EdgeError(f"sizes must be numbers of edges, got {shown(given)}")
    return tuple(strict_int(each, "each of sizes", EdgeError) for each in found)


def _area(given: Any) -> float:
    (found,) = as_numbers([given], "each of cpr and cmd")
    return float(found)


def _ends(given: Any) -> tuple[float, float]:
    ends = as_numbers(given, "each of cpr_interval and cmd_interval").tolist()
    if len(ends) != 2:
        raise EdgeError(f"an interval has two ends, got {shown(ends)}")
    return ends[0], ends[1]


def _circuits(given: Any) -> tuple[Circuit, ...]:
    found = listed(given)
    if found is None or not all(isinstance(each, Circuit) for each in found):
        raise EdgeError(f"circuits must be a list of them, got {shown(given)}")
    return found


@attrs.frozen(eq=False, repr=False)
class CircuitCurve:
    """The faithfulness of circuits of growing size; `circuit_curve` makes it.

    Args:
        fractions: for each circuit which share of all edges it was to have.
        sizes: for each circuit how many edges it has, pruned.
        faithfulness: `[points]`, float64: 0 is the run without edges, 1 that with all.
        low, high: `[points]`, float64: the ends of its interval over prompts; nan if there is none.
        circuits: the circuits, pruned.
        cpr: MIB's area under the faithfulness; see `areas`.
        cmd: MIB's area between the faithfulness and 1.
        absolute: whether edges were chosen by size, or by value.
        info: what else is known of it, such as the model's name, as texts.
        cpr_interval: the ends of the interval of `cpr` over prompts; nan if there is none.
        cmd_interval: the same of `cmd`.

    Raises:
        EdgeError: there are not as many of each.

    Examples:
        >>> from nnpatch_core.edges import Nodes
        >>> nodes = Nodes(query=(1,), key_value=(1,), parallel=(False,))
        >>> circuits = [Circuit.of(nodes, []), Circuit.of(nodes, list(nodes))]
        >>> nan = [float("nan")] * 2
        >>> curve = CircuitCurve(
        ...     fractions=(0.1, 1.0), sizes=(0, 8), faithfulness=[0.0, 1.0], low=nan, high=nan,
        ...     circuits=circuits, cpr=0.45, cmd=0.45, absolute=True, info={},
        ... )
        >>> print(curve)
        2 circuits, edges chosen by size: CPR 0.450, CMD 0.450
        fraction  edges  faithfulness
           0.100      0         0.000
           1.000      8         1.000
    """

    fractions: tuple[float, ...] = attrs.field(converter=_fractions)
    sizes: tuple[int, ...] = attrs.field(converter=_sizes)
    faithfulness: Tensor = attrs.field(converter=_values)
    low: Tensor = attrs.field(converter=_values)
    high: Tensor = attrs.field(converter=_values)
    circuits: tuple[Circuit, ...] = attrs.field(converter=_circuits)
    cpr: float = attrs.field(converter=_area)
    cmd: float = attrs.field(converter=_area)
    absolute: bool
    info: Mapping[str, str] = attrs.field(converter=as_info)
    cpr_interval: tuple[float, float] = attrs.field(converter=_ends, default=(nan, nan))
    cmd_interval: tuple[float, float] = attrs.field(converter=_ends, default=(nan, nan))

    def __attrs_post_init__(self) -> None:
        check_flags(absolute=self.absolute)
        parts = {
            name: len(getattr(self, name))
            for name in ("fractions", "sizes", "faithfulness", "low", "high", "circuits")
        }
        if len(set(parts.values())) > 1:
            told = ", ".join(f"{count} {name}" for name, count in parts.items())
            raise EdgeError(f"a curve has as many of each as there are circuits, got {told}")

    def __len__(self) -> int:
        return len(self.fractions)

    def __repr__(self) -> str:
        return f"CircuitCurve({self._title(ends=True)})"

    def __str__(self) -> str:
        heads = ["fraction", "edges", "faithfulness"]
        known = self._has_intervals()
        heads += ["low", "high"] if known else []
        lines = [heads]
        for number, fraction in enumerate(self.fractions):
            values = [self.faithfulness, self.low, self.high][: 3 if known else 1]
            cells = [in_digits(float(each[number])) for each in values]
            lines.append([f"{fraction:.3f}", f"{self.sizes[number]:,}", *cells])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ("  ".join(map(str.rjust, line, widths)) for line in lines)
        return "\n".join([self._title(ends=True), *rows])

    def _repr_html_(self) -> str:
        return block(preformatted(str(self)))

    def to_dataframe(self) -> pandas.DataFrame:
        """A row for each circuit: fraction, edges, faithfulness, low, high.

        Raises:
            OutcomeError: pandas is not installed (`pip install nnpatch-core[pandas]`).

        Examples:
            >>> list(curve.to_dataframe())
            ['fraction', 'edges', 'faithfulness', 'low', 'high']
        """
        module = extra("pandas", "pandas")
        frame: pandas.DataFrame = module.DataFrame(
            {
                "fraction": list(self.fractions),
                "edges": list(self.sizes),
                "faithfulness": self.faithfulness.tolist(),
                "low": self.low.tolist(),
                "high": self.high.tolist(),
            }
        )
        return frame

    def plot(self) -> Figure:
        """Draw the faithfulness over the share of the edges, which grows by factors.

        Shaded is its interval over prompts, if there is one; the line at 1 is all edges, the one at
        0 none.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            OutcomeError: matplotlib is not installed (`pip install 'nnpatch-core[plot]'`).

        Examples:
            >>> curve.plot().axes[0].get_ylabel()
            'faithfulness (0 no edges, 1 all)'
        """
        figure = new_picture(6.6, 4.0)
        axis = figure.subplots()
        (colour,) = distinct(1)
        across = 100 * np.array(self.fractions)
        values = self.faithfulness.numpy()
        for height in (0, 1):
            axis.axhline(height, color=GUIDE, linewidth=0.8, linestyle="--", zorder=0)
        if self._has_intervals():
            # Matplotlib draws no end that is infinite.
            ends = np.clip(np.stack([self.low.numpy(), self.high.numpy()]), *_around(values))
            axis.fill_between(across, *ends, color=colour, alpha=0.18, linewidth=0)
        axis.plot(across, values, color=colour, marker="o", markersize=4, linewidth=1.4)
        axis.set_xscale("log")
        axis.set_xticks(across, [f"{each:g}" for each in across], fontsize=8)
        axis.minorticks_off()
        axis.tick_params(labelsize=8, length=2)
        for place, value, size in zip(across, values, self.sizes, strict=True):
            axis.annotate(
                f"{size:,}", (place, value), xytext=(0, 7), textcoords="offset points",
                ha="center", fontsize=7, color="#555555",
            )  # fmt: skip
        axis.margins(y=0.12)
        axis.set_xlabel(
            "share of all edges, in % (at each point: how many after pruning)", fontsize=9
        )
        axis.set_ylabel("faithfulness (0 no edges, 1 all)", fontsize=9)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        model = model_name(self.info.get("model", ""))
        title = f"{model}: {self._title()}" if model else self._title()
        letters = letters_of([title])
        figure.say("suptitle", letters.shown(title), 10, family=letters.families)
        made: Figure = figure
        return made

    def _has_intervals(self) -> bool:
        return bool((~self.low.isnan() & ~self.high.isnan()).any())

    def _title(self, *, ends: bool = False) -> str:
        """In a line; `ends` adds the intervals, if there are any."""
        by = "size" if self.absolute else "value"
        cpr, cmd = (
            in_digits(value) + (_in_words(interval) if ends else "")
            for value, interval in (
                (self.cpr, self.cpr_interval),
                (self.cmd, self.cmd_interval),
            )
        )
        return f"{len(self)} circuits, edges chosen by {by}: CPR {cpr}, CMD {cmd}"


def _in_words(interval: tuple[float, float]) -> str:
    if any(map(isnan, interval)):
        return ""
    low, high = map(in_digits, interval)
    return f" [{low}, {high}]"


def _around(values: Any) -> tuple[float, float]:
    """Ends between which shading is drawn: the values, and as far again to either side."""
    known = values[np.isfinite(values)]
    low, high = min([0.0, *known]), max([1.0, *known])
    room = high - low
    return low - room, high + room
