"""Doctests of the methods of some classes go on where the example of their class ends."""

from __future__ import annotations

import doctest
import functools
import importlib
from typing import Any

import pytest

#: The class whose example others go on from, by the beginning of their names, and what it defines.
_ROOMS = {
    "nnpatch_core.results.": ("nnpatch_core", "Outcome", ("out", "estimate")),
    "nnpatch_core.circuits.curve.CircuitCurve.": (
        "nnpatch_core.circuits.curve",
        "CircuitCurve",
        ("curve",),
    ),
}


@functools.cache
def example(room: str) -> dict[str, Any]:
    """The names that the example of a room's class defines."""
    module, kind, defined = _ROOMS[room]
    names = dict(vars(importlib.import_module(module)))
    for each in doctest.DocTestParser().get_examples(names[kind].__doc__ or ""):
        exec(compile(each.source, "<example>", "single"), names)
    return {name: names[name] for name in defined}


@pytest.fixture(autouse=True)
def _names_of_the_example(
    request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]
) -> None:
    for room in _ROOMS:
        if request.node.name.startswith(room):
            doctest_namespace.update(example(room))
