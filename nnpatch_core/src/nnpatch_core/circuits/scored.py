"""Edges with scores, of which circuits are made: an outcome, or numbers by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._printable import shown
from nnpatch_core.edges import ARROW, Nodes
from nnpatch_core.errors import EdgeError


class Scored(Protocol):
    """Edges of a model with a number each, as `edge_patching` gives them."""

    @property
    def nodes(self) -> Nodes:
        """The model's nodes."""

    @property
    def matrix(self) -> Tensor:
        """`[senders, receivers]`: the numbers, nan where there is no edge, or it has none."""

    @property
    def exact(self) -> Tensor | None:
        """`[senders, receivers]`, bool: which are no estimates; None if nothing is known of it."""


@attrs.frozen(eq=False)
class Scores:
    """The scores of edges, checked.

    Args:
        nodes: of the model.
        matrix: `[senders, receivers]`, float64, nan where there is no edge, or it has no score.
        exact: of the same shape, bool; None if nothing is known of it.
        info: what else is known of them, as texts.
    """

    nodes: Nodes
    matrix: Tensor
    exact: Tensor | None
    info: Mapping[str, str]


def read_scores(edges: Any, nodes: Any = None) -> Scores:
    """The scores that somebody gave.

    Args:
        edges: something `Scored`, or a mapping from edge names to numbers.
        nodes: of the model; None if `edges` has them.

    Raises:
        EdgeError: they are none, or not of these nodes.
    """
    if nodes is not None and not isinstance(nodes, Nodes):
        raise EdgeError(f"nodes must be the Nodes of a model, got {shown(nodes)}")
    matrix = getattr(edges, "matrix", None)
    if matrix is None:
        # A circuit has them under another name.
        matrix = getattr(edges, "scores", None)
    if matrix is not None and isinstance(getattr(edges, "nodes", None), Nodes):
        if nodes is not None and nodes != edges.nodes:
            raise EdgeError("nodes= are others than those of the edges: leave nodes= out")
        given = getattr(edges, "info", None)
        info = dict(given) if isinstance(given, Mapping) else {}
        exact = getattr(edges, "exact", None)
        return Scores(
            edges.nodes,
            check_scores(edges.nodes, matrix, "matrix"),
            None if exact is None else check_marks(edges.nodes, exact, "exact"),
            {key: text for key, text in info.items() if isinstance(text, str)},
        )
    if not isinstance(edges, Mapping):
        raise EdgeError(
            "a circuit is made of the outcome of edge_patching, or of a mapping from edge names to "
            f"numbers, got {shown(edges)}"
        )
    if nodes is None:
        raise EdgeError("numbers by name need nodes=, the Nodes of the model")
    matrix = torch.full(nodes.mask.shape, math.nan, dtype=torch.float64, device="cpu")
    named: dict[tuple[int, int], str] = {}
    for name, value in edges.items():
        place = nodes.place(name)
        if place in named:
            raise EdgeError(f"{named[place]!r} and {name!r} are one edge, with a score each")
        named[place] = name
        matrix[place] = _number(name, value)
    return Scores(nodes, matrix, None, {})


def check_scores(nodes: Nodes, given: Any, what: str) -> Tensor:
    """A matrix of scores as float64 on the CPU.

    Raises:
        EdgeError: it is none, has another shape than the nodes, or a number where there is no edge.
    """
    found = _shaped(nodes, given, what)
    if found.dtype == torch.bool:
        raise EdgeError(f"{what} must have numbers, got {found.dtype}")
    found = found.double()
    _check_none_outside(nodes, ~found.isnan(), what, "a number")
    return found


def check_marks(nodes: Nodes, given: Any, what: str) -> Tensor:
    """A matrix of marks as bool on the CPU.

    Raises:
        EdgeError: it is none, has another shape than the nodes, or a mark where there is no edge.
    """
    found = _shaped(nodes, given, what)
    if found.dtype != torch.bool:
        raise EdgeError(f"{what} must be a tensor of bool, got {found.dtype}")
    _check_none_outside(nodes, found, what, "True")
    return found


def as_info(given: Any) -> dict[str, str]:
    """Texts by name.

    Raises:
        EdgeError: they are none.
    """
    if not isinstance(given, Mapping) or not all(
        isinstance(part, str) for entry in given.items() for part in entry
    ):
        raise EdgeError(f"info must be texts by name, got {shown(given)}")
    return dict(given)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has a number, or a truth value, at each place."""
    strided = tensor.layout == torch.strided and not tensor.is_quantized
    return strided and not tensor.is_meta and not tensor.dtype.is_complex


def _shaped(nodes: Nodes, given: Any, what: str) -> Tensor:
    if isinstance(given, np.ndarray) and given.dtype.kind in "biuf":
        given = torch.from_numpy(np.ascontiguousarray(given))
    if not isinstance(given, Tensor):
        raise EdgeError(f"{what} must be a tensor [senders, receivers], got {shown(given)}")
    shape = list(nodes.mask.shape)
    if list(given.shape) != shape:
        raise EdgeError(
            f"{what} must have the shape {shape}, of the senders and receivers, got "
            f"{list(given.shape)}"
        )
    if not is_plain(given):
        raise EdgeError(f"{what} must have real numbers, and neither be sparse nor quantised")
    return given.detach().cpu().clone()


def _check_none_outside(nodes: Nodes, marks: Tensor, what: str, has: str) -> None:
    outside = (marks & ~torch.from_numpy(nodes.mask)).nonzero().tolist()
    if outside:
        sender, receiver = outside[0]
        name = f"{nodes.sender_names[sender]}{ARROW}{nodes.receiver_names[receiver]}"
        raise EdgeError(f"{what} has {has} at {name}, which is no edge")


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        raise EdgeError(f"the score of {name} must be a number, got {shown(value)}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as cause:
        raise EdgeError(f"the score of {name} must be a number, got {shown(value)}") from cause
