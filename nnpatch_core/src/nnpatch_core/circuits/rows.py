"""The table of a circuit's edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs
import numpy as np

from nnpatch_core._html import block, heading, paragraph, table
from nnpatch_core.circuits.choosing import ranked
from nnpatch_core.results import in_digits

if TYPE_CHECKING:
    from nnpatch_core.circuits.circuit import Circuit

#: So many edges does a table that nobody has asked for show.
_SHOWN = 20
#: How `info["chosen"]` ends where pruning came last.
_PRUNED = ", then pruned"


@attrs.frozen
class Row:
    """An edge of a circuit.

    Args:
        edge, sender, receiver: their names.
        score: None if the circuit has no scores.
        exact: whether the score is no estimate; None if nothing is known of it.
    """

    edge: str
    sender: str
    receiver: str
    score: float | None
    exact: bool | None


def rows_of(circuit: Circuit, count: int | None = None) -> list[Row]:
    """The first edges of a circuit, strongest first; those without a score last, in their order."""
    names = circuit.nodes
    kept = circuit.kept.numpy()
    places = np.flatnonzero(kept)
    if circuit.scores is not None:
        scored = ranked(np.where(kept, circuit.scores.numpy(), np.nan), absolute=True)
        rest = places[~np.isin(places, scored)]
        places = np.concatenate([scored, rest])
    found = []
    for place in places[:count].tolist():
        sender, receiver = divmod(place, kept.shape[1])
        one, other = names.sender_names[sender], names.receiver_names[receiver]
        found.append(
            Row(
                circuit.name_of(sender, receiver),
                one,
                other,
                None if circuit.scores is None else float(circuit.scores[sender, receiver]),
                None if circuit.exact is None else bool(circuit.exact[sender, receiver]),
            )
        )
    return found


def title_of(circuit: Circuit) -> str:
    """How many edges and nodes there are.

    Examples:
        >>> from nnpatch_core.circuits import Circuit
        >>> from nnpatch_core.edges import Nodes
        >>> nodes = Nodes(query=(1,), key_value=(1,), parallel=(False,))
        >>> title_of(Circuit.of(nodes, ["input->m0", "m0->logits"]))
        'Circuit: 2 of the 8 edges, 3 nodes'
    """
    edges, nodes = len(circuit), len(circuit.nodes_in_it)
    return f"Circuit: {edges:,} of the {len(circuit.nodes):,} edges, {nodes:,} nodes"


def as_text(circuit: Circuit) -> str:
    """A table as a terminal shows it."""
    rows = rows_of(circuit, _SHOWN)
    head, cells = _written(rows)
    lines = [head, *cells] if cells else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    made = [
        "  ".join(
            cell.rjust(width) if name == "score" else cell.ljust(width)
            for name, cell, width in zip(head, line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([title_of(circuit), *made, *_more(circuit)])


def as_html(circuit: Circuit) -> str:
    """A table as a notebook shows it."""
    head, cells = _written(rows_of(circuit, _SHOWN))
    facts = [(name, text) for name, text in circuit.info.items()]
    parts = [heading(title_of(circuit)), table((), facts), table(head, cells) if cells else ""]
    return block(*parts, *map(paragraph, _more(circuit)))


def _written(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    head = ["edge"]
    if any(row.score is not None for row in rows):
        head.append("score")
    if any(row.exact is not None for row in rows):
        head.append("kind")
    cells = []
    for row in rows:
        known = row.score is not None and row.score == row.score
        every = {
            "edge": row.edge,
            "score": in_digits(row.score) if known and row.score is not None else "",
            "kind": ("exact" if row.exact else "estimate") if known else "",
        }
        cells.append([every[name] for name in head])
    return head, cells


def _more(circuit: Circuit) -> list[str]:
    chosen = circuit.info.get("chosen")
    if not len(circuit) and chosen is not None and chosen.endswith(_PRUNED):
        return [f"{chosen}: no way leads from the input to the logits"]
    left = len(circuit) - _SHOWN
    return [f"and {left:,} more: to_dataframe() has all"] if left > 0 else []
