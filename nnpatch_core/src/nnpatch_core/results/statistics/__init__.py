"""Statistics: functions that turn raw metrics into figures.

`values` puts the metrics of patched runs on an outcome's scale, one function for each kind of
figure of a cell. `comparison` has the figures of two lists of values, cell by cell.

How sure values are: `samples` has the prompts as numbers, `drawing` draws them again, `intervals`
and `flips` make intervals, bands and p-values of that, `ranking` ranks, `needed` counts. `faces`
puts them on the grids of outcomes.
"""

from nnpatch_core.results.statistics.comparison import recall, sign_agreement, spearman
from nnpatch_core.results.statistics.faces import (
    Draws,
    any_value,
    bands_of,
    doubts,
    ends_of,
    figures_of,
    interval_of,
    least_pvalue,
    pvalues_of,
    read_level,
    top_shares,
)
from nnpatch_core.results.statistics.intervals import Figures, redrawn, tail_of
from nnpatch_core.results.statistics.needed import prompts_needed
from nnpatch_core.results.statistics.samples import (
    Samples,
    alike,
    joined,
    orders,
    samples_of,
    shared,
)
from nnpatch_core.results.statistics.values import (
    Figured,
    Term,
    cell_values,
    flat_cells,
    prompt_values,
)

__all__ = [
    "Draws",
    "Figured",
    "Figures",
    "Samples",
    "Term",
    "alike",
    "any_value",
    "bands_of",
    "cell_values",
    "doubts",
    "ends_of",
    "figures_of",
    "flat_cells",
    "interval_of",
    "joined",
    "least_pvalue",
    "orders",
    "prompt_values",
    "prompts_needed",
    "pvalues_of",
    "read_level",
    "recall",
    "redrawn",
    "samples_of",
    "shared",
    "sign_agreement",
    "spearman",
    "tail_of",
    "top_shares",
]
