"""Each planted circuit once, with its oracle and what that says of its edges."""

from __future__ import annotations

import functools

import pytest

from tests.helpers.planted_circuits import PLANTED, Planted
from tests.helpers.planted_oracle import PlantedEdges

#: What an edge outside the circuit may be worth, and how far one of the circuit from its value.
NOTHING = 1e-4

EACH = pytest.mark.parametrize("name", PLANTED)
STEPS = 5
SHARES = tuple(step / STEPS for step in range(1, STEPS + 1))


@functools.cache
def planted(name: str) -> Planted:
    return PLANTED[name]()


@functools.cache
def oracle(name: str) -> PlantedEdges:
    return PlantedEdges(planted(name))


@functools.cache
def exact(name: str) -> dict[str, float]:
    return oracle(name).exact()


@functools.cache
def estimated(name: str, method: str) -> dict[str, float]:
    return oracle(name).estimated(method, STEPS)
