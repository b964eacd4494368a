"""The words that tables, pictures and notebooks share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nnpatch_core.metrics import METRIC_UNITS
from nnpatch_core.results.parts import Scale

if TYPE_CHECKING:
    from nnpatch_core.results.statistics import Figured


def legend(scale: Scale, magnitude: bool, metric: str | None = None) -> str:
    """The unit of an outcome's values, with what 0 and 1 mean.

    Args:
        scale: of the outcome.
        magnitude: whether the values are sizes.
        metric: the name of the metric, if it is to be said whose change it is.

    Examples:
        >>> legend("restored", False), legend("change", True)
        ('restored (0 target, 1 source)', 'size of the change')
        >>> legend("change", False, "logit_difference")
        'change of logit_difference (logits)'
    """
    of = ""
    if metric is not None and scale == "change":
        unit = METRIC_UNITS.get(metric)
        of = f" of {metric}" + (f" ({unit})" if unit else "")
    if magnitude:
        return "size of the change" + (of or " (1: source - target)" * (scale == "restored"))
    return "restored (0 target, 1 source)" if scale == "restored" else f"change{of}"


def unit_of(figured: Figured) -> str:
    """The unit of the values of an outcome, or of a combination; of this also their kinds."""
    words = legend(figured.scale, figured.magnitude, figured.metric)
    first, *others = figured.terms
    if not others and first.weight == 1:
        return words
    # 0 and 1 are no runs there.
    return f"{figured.kind}, {'restored' if figured.scale == 'restored' else words}"


def in_digits(value: float) -> str:
    """A value in words and tables: three digits after the point, or as many as it needs.

    Examples:
        >>> [in_digits(value) for value in (0.9471, -7.6e-06, -1e30, -0.0)]
        ['0.947', '-7.6e-06', '-1.0e+30', '0.000']
    """
    size = abs(value)
    written = f"{value:.1e}" if 0 < size < 0.001 or 1e6 <= size < math.inf else f"{value:.3f}"
    return written if value else "0.000"


def model_name(model: str) -> str:
    """A model's name; one that was loaded from a folder is named by its path.

    Examples:
        >>> model_name("somewhere/on/disk/my-model/")
        'my-model'
    """
    return model.rstrip("/").rpartition("/")[2]


def cell_name(row: Mapping[str, Any]) -> str:
    """The name of a table row's cell, for a picture.

    Examples:
        >>> cell_name({"site": "q", "layer": 3, "position": 5, "token": " Mary", "head": 2})
        "q L3 H2 [5] ' Mary'"
        >>> cell_name({"site": "resid", "layer": 3, "span": "S2"})
        "resid L3 'S2'"
        >>> cell_name({"site": "edge", "sender": "a0.h1", "receiver": "m3"})
        'edge a0.h1->m3'
    """
    if "label" in row:
        return str(row["label"])
    words = [row["site"], *([row["circuit"]] if "circuit" in row else [])]
    nodes = [row[key] for key in ("sender", "receiver") if key in row]
    words += ["->".join(nodes)] if nodes else []
    words += [f"{sign}{row[key]}" for key, sign in (("layer", "L"), ("head", "H")) if key in row]
    if "position" in row:
        words += [f"[{row['position']}]", f"'{row['token']}'"]
    if "span" in row:
        words.append(repr(row["span"]))
    if "column" in row:
        words.append(f"column {row['column']}")
    return " ".join(words)
