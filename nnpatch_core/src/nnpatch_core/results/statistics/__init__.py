"""Statistics: functions that turn raw metrics into figures.

`values` puts the metrics of patched runs on an outcome's scale, one function for each kind of
figure of a cell. `comparison` has the figures of two lists of values, cell by cell.
"""

from nnpatch_core.results.statistics.comparison import recall, sign_agreement, spearman
from nnpatch_core.results.statistics.values import cell_values, flat_cells, prompt_values

__all__ = [
    "cell_values",
    "flat_cells",
    "prompt_values",
    "recall",
    "sign_agreement",
    "spearman",
]
