"""Circuits that torch has saved: a dict of sizes, names and matrices, as EAP-IG writes it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nnpatch_core._files import check_file, reason
from nnpatch_core._printable import named, shown
from nnpatch_core.circuits.files import heads
from nnpatch_core.circuits.files.content import Content
from nnpatch_core.circuits.scored import is_plain
from nnpatch_core.edges import Nodes
from nnpatch_core.errors import EdgeError

#: EAP-IG asks for these, and for `nodes_in_graph`, which says nothing that edges do not.
_KEYS = ("cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph")


def read_pt(path: str | os.PathLike[str], nodes: Nodes | None) -> Content:
    """Read a circuit; see `Circuit.from_pt`.

    Raises:
        EdgeError: it holds none, or one of other nodes.
    """
    target = check_file(path, EdgeError)
    if not target.exists():
        raise EdgeError(f"{named(path)} holds no circuit: there is no such file")
    try:
        found = torch.load(target, map_location="cpu", weights_only=True)
    # Anybody may have written the file.
    except Exception as cause:
        raise EdgeError(
            f"{named(path)} is no file of torch that can be read without running code of it: "
            f"{reason(cause)}"
        ) from cause
    try:
        return _content(found, nodes)
    except EdgeError as error:
        raise EdgeError(f"{named(path)} holds no circuit that can be read: {error}") from error


def _content(found: Any, asked: Nodes | None) -> Content:
    if not isinstance(found, Mapping) or not all(key in found for key in _KEYS):
        has = sorted(map(str, found)) if isinstance(found, Mapping) else found
        raise EdgeError(f"it must have the entries {', '.join(_KEYS)}, got {shown(has)}")
    of_file = heads.nodes_of(found["cfg"])
    nodes = of_file if asked is None else heads.check_nodes(of_file, asked)
    for key, names in (
        ("src_nodes", of_file.sender_names),
        ("dst_nodes", of_file.receiver_names),
    ):
        _check_names(found[key], names, key)
    neurons = found.get("neurons_in_graph")
    if neurons is not None and not (isinstance(neurons, Tensor) and is_plain(neurons) and
                                    bool((neurons != 0).all())):  # fmt: skip
        raise EdgeError("it is a circuit of neurons: neurons_in_graph has some of a node's own")
    marks = _matrix(found["edges_in_graph"], of_file, "edges_in_graph")
    if not ((marks == 0) | (marks == 1)).all():
        raise EdgeError("edges_in_graph must have marks alone, and it has other numbers")
    scores = _matrix(found["edges_scores"], of_file, "edges_scores").double()
    # Where there is no edge, EAP-IG has 0, or a mark for a whole node.
    is_edge = torch.from_numpy(of_file.mask)
    scores = scores.masked_fill(~is_edge, math.nan)
    return Content(
        nodes,
        heads.joined(nodes, (marks != 0) & is_edge, "marks"),
        heads.joined(nodes, scores, "scores"),
        None,
        heads.width_in(found["cfg"]),
    )


def _check_names(given: Any, names: tuple[str, ...], key: str) -> None:
    # A list, or the keys of a dict.
    found = list(given) if isinstance(given, list | tuple | Mapping) else given
    if found == list(names):
        return
    if isinstance(found, list):
        for number, name in enumerate(names):
            if number >= len(found) or found[number] != name:
                other = shown(found[number]) if number < len(found) else "nothing"
                raise EdgeError(f"{key} has {other} at place {number}, where {name!r} belongs")
        raise EdgeError(f"{key} has {len(found)} names, and the model of cfg has {len(names)}")
    raise EdgeError(f"{key} must be names of nodes, got {shown(given)}")


def _matrix(given: Any, nodes: Nodes, key: str) -> Tensor:
    shape = list(nodes.mask.shape)
    if not isinstance(given, Tensor) or not is_plain(given) or list(given.shape) != shape:
        got = list(given.shape) if isinstance(given, Tensor) else shown(given)
        raise EdgeError(f"{key} must be a tensor {shape} of the senders and receivers, got {got}")
    return given.detach()
