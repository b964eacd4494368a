"""The labelled outcome of a sweep, and what is made of it.

Where a line belongs: a figure of the raw metrics in `statistics`, and the arguments and warnings of
those that say how sure a value is in `sureness`; a sum of outcomes in `combination`; rows, frames
and arrays in `tables`; a choice among cells in `selection`, by labels in `chosen`; the table of the
strongest in `top`, and which of them are one fact in `neighbours`; a drawing in `pictures`; a
notebook's page in `notebook`, and a report in `reported`; what is saved in the metadata of a field,
by `formats`; a check of a whole outcome in `whole`; how an axis is named and shown in `axes`; the
words of `info` that batches add up in `provenance`.
"""

from nnpatch_core.results.agreement import Agreement
from nnpatch_core.results.combination import Combination
from nnpatch_core.results.interval import Interval
from nnpatch_core.results.joined import Joined, Keep, means_of
from nnpatch_core.results.moments import Moments
from nnpatch_core.results.outcome import Outcome
from nnpatch_core.results.parts import Baseline, Cells, Prompts, Scale
from nnpatch_core.results.pictures import GUIDE, distinct, letters_of, new_picture
from nnpatch_core.results.provenance import known_in_words, runs_known
from nnpatch_core.results.redrawn import interval_of_figures
from nnpatch_core.results.reported import facts_of, study_of, table_of_top
from nnpatch_core.results.screening import Screening
from nnpatch_core.results.stability import Stability
from nnpatch_core.results.top import Top, bars_told
from nnpatch_core.results.words import in_digits, legend, model_name

__all__ = [
    "GUIDE",
    "Agreement",
    "Baseline",
    "Cells",
    "Combination",
    "Interval",
    "Joined",
    "Keep",
    "Moments",
    "Outcome",
    "Prompts",
    "Scale",
    "Screening",
    "Stability",
    "Top",
    "bars_told",
    "distinct",
    "facts_of",
    "in_digits",
    "interval_of_figures",
    "known_in_words",
    "legend",
    "letters_of",
    "means_of",
    "model_name",
    "new_picture",
    "runs_known",
    "study_of",
    "table_of_top",
]
