"""The labelled outcome of a sweep."""

from nnpatch_core.results.outcome import Outcome
from nnpatch_core.results.parts import Baseline, Cells, Prompts, Scale

__all__ = ["Baseline", "Cells", "Outcome", "Prompts", "Scale"]
