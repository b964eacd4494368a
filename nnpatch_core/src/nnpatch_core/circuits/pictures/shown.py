"""The edges that a picture shows, and the words that say what it does not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs

from nnpatch_core.circuits.rows import rows_of
from nnpatch_core.edges import Receiver, Sender
from nnpatch_core.results import in_digits, model_name

if TYPE_CHECKING:
    from nnpatch_core.circuits.circuit import Circuit


@attrs.frozen
class Link:
    """An edge of a picture.

    Args:
        name: of the edge.
        sender, receiver: what it goes from and into.
        score: nan if it has none.
        estimate: whether the score is an estimate; None if nothing is known of it.
    """

    name: str
    sender: Sender
    receiver: Receiver
    score: float
    estimate: bool | None


@attrs.frozen
class Shown:
    """The edges of a picture, and its words.

    Args:
        links: the edges, strongest first.
        scored: whether any has a score.
        largest: the size of the strongest; 1 if none has a finite one.
        title: of the picture.
        notes: sentences on edges that are not drawn, and on what the scores are.
        mixed: whether some scores are estimates where others are not.
    """

    links: tuple[Link, ...]
    scored: bool
    largest: float
    title: str
    notes: tuple[str, ...]
    mixed: bool


def shown_of(circuit: Circuit, most: int, title: str | None) -> Shown:
    """The strongest edges of a circuit, so many at most.

    Args:
        circuit: which has edges.
        most: how many.
        title: None is the model, and how many edges there are.
    """
    nodes = circuit.nodes
    links = []
    for row in rows_of(circuit, most):
        sender, receiver = nodes.place(row.edge)
        has_score = row.score is not None and not math.isnan(row.score)
        score = row.score if row.score is not None else math.nan
        estimate = None if row.exact is None or not has_score else not row.exact
        links.append(
            Link(row.edge, nodes.senders[sender], nodes.receivers[receiver], score, estimate)
        )
    scores = [link.score for link in links if not math.isnan(link.score)]
    finite = [abs(score) for score in scores if math.isfinite(score)]
    estimates = {link.estimate for link in links if link.estimate is not None}
    mixed = len(estimates) > 1
    kind = {
        frozenset(): "",
        frozenset({True}): "All values are estimates.",
        frozenset({False}): "All values are exact.",
    }.get(frozenset(estimates), "Dashed: an estimate, where others are exact.")
    return Shown(
        links=tuple(links),
        scored=bool(scores),
        largest=max(finite, default=0.0) or 1.0,
        title=_title(circuit) if title is None else title,
        notes=tuple(note for note in (_left_out(circuit, links), kind) if note),
        mixed=mixed,
    )


def _title(circuit: Circuit) -> str:
    model = model_name(circuit.info.get("model", ""))
    words = f"circuit of {_edges(len(circuit))}"
    return f"{model}: {words}" if model else words


def _left_out(circuit: Circuit, links: list[Link]) -> str:
    left = len(circuit) - len(links)
    if not left:
        return ""
    if math.isnan(links[-1].score):
        return f"Only {len(links):,} edges are drawn. Not drawn: {_edges(left)}."
    return (
        f"Only the {len(links):,} strongest edges are drawn. Not drawn: {_edges(left)} of size "
        f"{in_digits(abs(links[-1].score))} or less."
    )


def _edges(count: int) -> str:
    return "1 edge" if count == 1 else f"{count:,} edges"
