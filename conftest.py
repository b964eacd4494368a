"""Doctests of the methods of outcomes go on where the example of their class ends."""

from __future__ import annotations

import doctest
import functools
from typing import Any

import pytest

_ROOM = "nnpatch_core.results."


@functools.cache
def example() -> dict[str, Any]:
    """The names that the example of `Outcome` defines."""
    from nnpatch_core import Outcome

    names: dict[str, Any] = {}
    for each in doctest.DocTestParser().get_examples(Outcome.__doc__ or ""):
        exec(compile(each.source, "<example>", "single"), names)
    return {name: names[name] for name in ("out", "estimate")}


@pytest.fixture(autouse=True)
def _names_of_the_example(
    request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]
) -> None:
    if request.node.name.startswith(_ROOM):
        doctest_namespace.update(example())
