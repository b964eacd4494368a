"""Circuits as studies for the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from nnpatch_core.circuits.circuit import Circuit
from nnpatch_core.circuits.measured import CIRCUIT
from nnpatch_core.circuits.names import RANDOM, WITHOUT
from nnpatch_core.circuits.rows import rows_of
from nnpatch_core.report import WIDTH, Drawing, Facts, Study, Table, Width
from nnpatch_core.results import facts_of, in_digits, model_name, study_of

if TYPE_CHECKING:
    from nnpatch_core.circuits.evaluation import CircuitEvaluation
    from nnpatch_core.circuits.finding import FoundCircuit
    from nnpatch_core.results import Outcome

#: So many edges are listed, and drawn, at most.
_EDGES, _DRAWN = 100, 60
_SCALE = (
    "Faithfulness is (mean of the circuit - mean of the run without edges) / (mean of all edges - "
    "mean of the run without edges): 1 is the whole model, 0 the run without edges."
)


def study_of_evaluation(evaluation: CircuitEvaluation, level: float) -> Study:
    """The measurement of circuits."""
    outcome, own = evaluation.outcome, _own(evaluation)
    values, doubts = evaluation.in_words(level)
    told = dict(zip(evaluation.names, values, strict=True))
    study = study_of(outcome, level=level, kind="bars", mark=0)
    return attrs.evolve(
        study,
        question=(
            f"How much of {_model(outcome.info)}'s {outcome.metric} over {outcome.count} pairs of "
            f"prompts do {_counted(own)} keep alone, with all other edges {_other(outcome)}?"
        ),
        answer=[
            *(
                f"{name} ({len(circuit):,} of {len(circuit.nodes):,} edges): {told[name]}."
                for name, circuit in [*own.items()][:3]
            ),
            _SCALE,
        ],
        drawings=[*_graphs(own), *(study.drawings[:1] if len(told) > 1 else [])],
        tables=[_faithfulness(evaluation, values, doubts, level), *map(_edges, own.items())],
        facts=facts_of_evaluation(evaluation, WIDTH, level),
    )


def facts_of_evaluation(evaluation: CircuitEvaluation, width: float, level: float) -> Facts:
    """The facts about a measurement of circuits."""
    outcome, names = evaluation.outcome, evaluation.names
    first = names[0]
    controls = {
        "complement": any(name.startswith(WITHOUT) for name in names),
        "random": any(name.startswith(RANDOM) for name in names),
        "minimality": any(name.startswith(f"{first} without ") for name in names),
    }
    found = facts_of(outcome, width, level)
    return attrs.evolve(
        found,
        circuit=True,
        controls=tuple(name for name, there in controls.items() if there),
        one_way=not controls["complement"],
        # Circuits that are run beside one another are no rivals, and none is run at a position.
        race=None,
        mixed="",
        width=_width(outcome, first, width, level) if found.width is not None else None,
    )


def study_of_found(found: FoundCircuit, level: float) -> Study:
    """A circuit that was found."""
    study = study_of_evaluation(found.evaluation, level)
    outcome, circuit = found.evaluation.outcome, found.circuit
    lines = [line.split(maxsplit=1) for line in str(found).splitlines()]
    steps = tuple(
        (each.stage, f"{each.edges:,}", in_digits(each.faithfulness)) for each in found.steps
    )
    reached = "" if found.reached else " No circuit that was run is faithful enough."
    (value, *_), _ = found.evaluation.in_words(level)
    return attrs.evolve(
        study,
        title=f"{_model(outcome.info)}: a circuit of {len(circuit):,} edges",
        question=(
            f"Which small circuit of {_model(outcome.info)} keeps {in_digits(found.goal)} of its "
            f"{outcome.metric} over {outcome.count} pairs of prompts alone?"
        ),
        answer=[
            f"{len(circuit):,} of {len(circuit.nodes):,} edges between "
            f"{len(circuit.nodes_in_it):,} nodes have a faithfulness of {value}.{reached}",
            _SCALE,
        ],
        drawings=[*_graphs({CIRCUIT: circuit}), *study.drawings[1:]],
        tables=[
            study.tables[0],
            _edges((CIRCUIT, circuit)),
            Table(
                "The circuits that were run on the way",
                ("stage", "edges", "faithfulness"),
                steps,
                frozenset(["edges", "faithfulness"]),
            ),
        ],
        info={**study.info, **_cost(lines)},
        call=(
            f"find_circuit(\n    model,  # {_model(outcome.info)}\n    None,\n"
            f"    pairs,  # the {outcome.count} above\n    faithfulness={found.goal:g},\n"
            f"    metric={outcome.metric!r},\n    evaluations={found.evaluations},\n)"
        ),
        facts=facts_of_found(found, WIDTH, level),
    )


def facts_of_found(found: FoundCircuit, width: float, level: float) -> Facts:
    """The facts about a circuit that was found by the prompts that it is measured on."""
    return attrs.evolve(facts_of_evaluation(found.evaluation, width, level), chosen_here=True)


def _own(evaluation: CircuitEvaluation) -> dict[str, Circuit]:
    """The circuits that were given, and none that was made of them."""
    made = [f"{name} without " for name in evaluation.names]
    found = {
        name: circuit
        for name, circuit in evaluation.circuits.items()
        if not name.startswith((WITHOUT, RANDOM, *made))
    }
    return found or dict([*evaluation.circuits.items()][:1])


def _counted(circuits: Mapping[str, Circuit]) -> str:
    if len(circuits) > 1:
        return f"{len(circuits)} circuits"
    (circuit,) = circuits.values()
    return f"{len(circuit):,} edges"


def _other(outcome: Outcome) -> str:
    method = outcome.info.get("ablation")
    return "as in the target run" if method is None else f"ablated ({method})"


def _model(info: Mapping[str, str]) -> str:
    return model_name(info.get("model", "")) or "the model"


def _graphs(circuits: Mapping[str, Circuit]) -> Iterator[Drawing]:
    for name, circuit in [*circuits.items()][:3]:
        if not len(circuit):
            continue
        left_out = len(circuit) - _DRAWN
        more = f" The {left_out:,} weakest edges are left out." if left_out > 0 else ""
        yield Drawing(
            f"{name}: its edges lead upwards; blue is a positive, orange a negative score.{more}",
            f"The graph of {name}: {len(circuit):,} edges between {len(circuit.nodes_in_it):,} "
            "nodes.",
            _drawing(circuit),
        )


def _drawing(circuit: Circuit) -> Any:
    return lambda: circuit.plot(edges=_DRAWN)


def _faithfulness(
    evaluation: CircuitEvaluation, values: Sequence[str], doubts: Sequence[str], level: float
) -> Table:
    rows = tuple(
        (name, f"{len(circuit):,}", value)
        for value, (name, circuit) in zip(values, evaluation.circuits.items(), strict=True)
    )
    alone = evaluation.outcome.count == 1
    what = "faithfulness" if alone else f"faithfulness [{100 * level:g} % interval]"
    return Table(
        f"Circuits by {evaluation.outcome.metric}",
        ("circuit", "edges", what),
        rows,
        frozenset(["edges", what]),
        12,
        tuple(doubts),
    )


def _edges(given: tuple[str, Circuit]) -> Table:
    name, circuit = given
    rows = rows_of(circuit, _EDGES)
    head = ["edge"]
    head += ["score"] if any(row.score is not None for row in rows) else []
    head += ["kind"] if any(row.exact is not None for row in rows) else []
    cells = []
    for row in rows:
        known = row.score is not None and row.score == row.score
        score = in_digits(row.score) if row.score is not None and known else ""
        kind = ("exact" if row.exact else "estimate") if known else ""
        every = {"edge": row.edge, "score": score, "kind": kind}
        cells.append(tuple(every[column] for column in head))
    left_out = len(circuit) - len(rows)
    notes = (f"{left_out:,} more are not shown.",) if left_out > 0 else ()
    what = f"The strongest edges of {name}" if left_out > 0 else f"The edges of {name}"
    return Table(what, tuple(head), tuple(cells), frozenset(["score"]), 12, notes)


def _cost(lines: Sequence[Sequence[str]]) -> dict[str, str]:
    """The words of a search on its runs and its time."""
    told = {line[0]: line[1] for line in lines if len(line) > 1}
    names = {"edges": "edges", "runs": "search", "seconds": "seconds by stage"}
    return {name: told[word] for word, name in names.items() if word in told}


def _width(outcome: Outcome, name: str, width: float, level: float) -> Width | None:
    """How many prompts the interval of the first circuit needs."""
    needed = float(outcome.prompts_needed(CIRCUIT, width, level)[0])
    return None if needed != needed else Width(name, width, needed, outcome.count)
