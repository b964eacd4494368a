"""Circuits as JSON: an object with `cfg`, `nodes` and `edges`, as EAP-IG writes it.

`cfg` has the sizes of the model, `nodes` which nodes are in the circuit, and `edges` for each edge
its `score` and whether it is `in_graph`. Files of MIB may lack the scores. What we add, EAP-IG does
not look at: `scored` and `exact` of an edge, and the entry `nnpatch`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
import torch

from nnpatch_core._files import check_file, reason, write_whole
from nnpatch_core._integers import strict_int
from nnpatch_core._printable import named, shown
from nnpatch_core.circuits.connected import feeds
from nnpatch_core.circuits.files import heads
from nnpatch_core.circuits.files.content import Content
from nnpatch_core.edges import ARROW, Nodes
from nnpatch_core.errors import EdgeError

#: Of the entry `nnpatch`.
_FORMAT = 1
_KEYS = ("cfg", "nodes", "edges")


def write_json(path: str | os.PathLike[str], content: Content, width: int | None) -> None:
    """Write a circuit; see `Circuit.to_json`.

    Raises:
        EdgeError: it cannot be written.
    """
    text = json.dumps(_written(content, _width(width, content.info)))
    write_whole(path, lambda part: part.write_text(text, "utf-8", newline="\n"), EdgeError)


def read_json(path: str | os.PathLike[str], nodes: Nodes | None) -> Content:
    """Read a circuit; see `Circuit.from_json`.

    Raises:
        EdgeError: it holds none, or one of other nodes.
    """
    target = check_file(path, EdgeError)
    if not target.exists():
        raise EdgeError(f"{named(path)} holds no circuit: there is no such file")
    try:
        text = target.read_text("utf-8")
        found = json.loads(text, object_pairs_hook=_once)
        return _content(found, nodes)
    except EdgeError as error:
        raise EdgeError(f"{named(path)} holds no circuit that can be read: {error}") from error
    except (OSError, ValueError, RecursionError) as cause:
        raise EdgeError(f"{named(path)} is not JSON: {reason(cause)}") from cause


def _written(content: Content, width: int) -> dict[str, Any]:
    nodes, kept = content.nodes, content.kept.numpy()
    config = heads.config_of(nodes, width)
    names, index = heads.spread(nodes), heads.copies(nodes)
    marks = kept[:, index]
    scores = None if content.scores is None else content.scores.numpy()[:, index]
    exact = None if content.exact is None else content.exact.numpy()[:, index]
    edges: dict[str, dict[str, Any]] = {}
    for sender, receiver in zip(*names.mask.nonzero(), strict=True):
        score = math.nan if scores is None else float(scores[sender, receiver])
        entry: dict[str, Any] = {"score": score, "in_graph": bool(marks[sender, receiver])}
        if math.isnan(score):
            # EAP-IG reads a number, and sorts nan before all others.
            entry |= {"score": 0.0, "scored": False}
        if exact is not None:
            entry["exact"] = bool(exact[sender, receiver])
        edges[f"{names.sender_names[sender]}{ARROW}{names.receiver_names[receiver]}"] = entry
    fed = marks.any(0) @ feeds(names)
    fed[0] = True
    inside = zip(names.sender_names, fed & marks.any(1), strict=True)
    return {
        "cfg": config,
        "nodes": {
            **{name: {"in_graph": bool(mark)} for name, mark in inside},
            "logits": {"in_graph": True},
        },
        "edges": edges,
        "nnpatch": {
            "format": _FORMAT,
            "key_value": list(nodes.key_value),
            "scores": scores is not None,
            "info": dict(content.info),
        },
    }


def _width(width: Any, info: Mapping[str, str]) -> int:
    if width is not None:
        found = strict_int(width, "width", EdgeError)
        if found < 1:
            raise EdgeError(f"width must be at least 1, got {found}")
        return found
    told = info.get("width", "")
    return int(told) if told.isascii() and told.isdigit() and len(told) < 9 else 0


def _content(found: Any, asked: Nodes | None) -> Content:
    if not isinstance(found, Mapping) or not all(key in found for key in _KEYS):
        has = sorted(found) if isinstance(found, Mapping) else found
        raise EdgeError(f"it must have the entries {', '.join(_KEYS)}, got {shown(has)}")
    of_file = heads.nodes_of(found["cfg"])
    ours = _ours(found.get("nnpatch"), of_file, heads.width_in(found["cfg"]))
    nodes = ours.nodes if asked is None else heads.check_nodes(of_file, asked)
    _check_neurons(found["nodes"])
    if not isinstance(found["edges"], Mapping):
        raise EdgeError(f"edges must be an object, got {shown(found['edges'])}")
    marks = np.zeros(of_file.mask.shape, bool)
    scores = np.full(marks.shape, math.nan)
    exact = np.zeros(marks.shape, bool)
    senders, receivers = _numbers(of_file.sender_names), _numbers(of_file.receiver_names)
    mask = of_file.mask
    says_exact = False
    for name, entry in found["edges"].items():
        first, _, second = name.partition(ARROW)
        place = senders.get(first, -1), receivers.get(second, -1)
        if min(place) < 0 or not mask[place]:
            place = of_file.place(name)
        mark, score, measured = _entry(name, entry)
        marks[place], scores[place] = mark, score
        if measured is not None:
            exact[place], says_exact = measured, True
    has_scores = bool((~np.isnan(scores)).any()) if ours.scores is None else ours.scores
    return Content(
        nodes,
        heads.joined(nodes, torch.from_numpy(marks), "marks"),
        heads.joined(nodes, torch.from_numpy(scores), "scores") if has_scores else None,
        heads.joined(nodes, torch.from_numpy(exact), "words on exactness") if says_exact else None,
        ours.info,
    )


@attrs.frozen
class _Ours:
    """The entry `nnpatch`, or what stands for it in files of others."""

    nodes: Nodes
    scores: bool | None
    info: Mapping[str, str]


def _ours(given: Any, of_file: Nodes, told: Mapping[str, str]) -> _Ours:
    if given is None:
        return _Ours(of_file, None, told)
    if not isinstance(given, Mapping) or given.get("format") != _FORMAT:
        form = given.get("format") if isinstance(given, Mapping) else given
        raise EdgeError(
            f"its entry 'nnpatch' has the format {shown(form)}, and this version reads {_FORMAT}"
        )
    shared, scores, info = given.get("key_value"), given.get("scores"), given.get("info")
    if not isinstance(shared, list) or len(shared) != of_file.n_layers:
        raise EdgeError(f"key_value of 'nnpatch' must have a number a layer, got {shown(shared)}")
    if not isinstance(scores, bool):
        raise EdgeError(f"scores of 'nnpatch' must be true or false, got {shown(scores)}")
    if not isinstance(info, dict) or not all(isinstance(text, str) for text in info.values()):
        raise EdgeError(f"info of 'nnpatch' must be texts by name, got {shown(info)}")
    return _Ours(Nodes(of_file.query, shared, of_file.parallel), scores, info)


def _check_neurons(nodes: Any) -> None:
    """Raise `EdgeError` for a circuit of parts of nodes, which ours are not."""
    if not isinstance(nodes, Mapping):
        raise EdgeError(f"nodes must be an object, got {shown(nodes)}")
    for name, entry in nodes.items():
        neurons = entry.get("neurons") if isinstance(entry, Mapping) else None
        if neurons is not None and not (isinstance(neurons, list) and all(neurons)):
            raise EdgeError(f"it is a circuit of neurons: node {shown(name)} has some of its own")


def _entry(name: str, entry: Any) -> tuple[bool, float, bool | None]:
    """Of an edge: whether it is in the circuit, its score, and whether that is exact."""
    if not isinstance(entry, Mapping) or not ("in_graph" in entry or "score" in entry):
        raise EdgeError(f"edge {shown(name)} must have in_graph or score, got {shown(entry)}")
    marks = {key: entry.get(key) for key in ("in_graph", "scored", "exact") if key in entry}
    for key, mark in marks.items():
        if mark not in (0, 1):
            raise EdgeError(f"{key} of edge {shown(name)} must be true or false, got {shown(mark)}")
    score = entry.get("score")
    if score is None or not marks.get("scored", True):
        score = math.nan
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise EdgeError(f"the score of edge {shown(name)} must be a number, got {shown(score)}")
    try:
        number = float(score)
    except OverflowError as cause:
        raise EdgeError(f"the score of edge {shown(name)} is too large for a number") from cause
    exact = marks.get("exact")
    return bool(marks.get("in_graph", False)), number, None if exact is None else bool(exact)


def _numbers(names: tuple[str, ...]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise EdgeError(f"it has {shown(twice)} twice in one object")
    return found
