"""The colours of a circuit's graph, which do not depend on telling red from green."""

from nnpatch_core.results import distinct

#: Of edges that have a positive and a negative score.
POSITIVE, NEGATIVE = distinct(2)
#: Of edges without one.
PLAIN = "#555555"
#: Of letters, of quiet ones, of what is written on, and around nodes and groups.
INK, QUIET, PAPER, EDGE, FRAME = "#222222", "#666666", "#ffffff", "#444444", "#bbbbbb"
#: Of what stands behind a layer.
BAND = "#f4f4f4"
