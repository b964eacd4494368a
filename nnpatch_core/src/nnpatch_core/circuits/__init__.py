"""Circuits: some edges of a model, how they are chosen, kept, drawn and measured.

`circuit` is the set of edges; `scored` reads the numbers that it is chosen by, `choosing` chooses,
and `connected` prunes; `rows` is its table, `files` its JSON, `pictures` its graph. `areas` and
`curve` say how good circuits of growing size are.
"""

from nnpatch_core.circuits.areas import FRACTIONS, areas, auroc
from nnpatch_core.circuits.circuit import ChoosingMethod, Circuit, PrecisionRecall
from nnpatch_core.circuits.curve import CircuitCurve
from nnpatch_core.circuits.curves import circuit_curve
from nnpatch_core.circuits.evaluation import CircuitEvaluation, evaluate_circuit
from nnpatch_core.circuits.finding import FoundCircuit, find_circuit
from nnpatch_core.circuits.scored import Scored

__all__ = [
    "FRACTIONS",
    "ChoosingMethod",
    "Circuit",
    "CircuitCurve",
    "CircuitEvaluation",
    "FoundCircuit",
    "PrecisionRecall",
    "Scored",
    "areas",
    "auroc",
    "circuit_curve",
    "evaluate_circuit",
    "find_circuit",
]
