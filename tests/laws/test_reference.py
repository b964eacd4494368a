"""Every public name stands on the page of reference, and everything there exists."""

from __future__ import annotations

import importlib
import re

import nnpatch_core
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "reference.md").read_text("utf-8")
#: All errors stand there together.
TOGETHER = {"PatchingError"}


def documented() -> set[str]:
    """Dotted names; those without a dot are of the module that was named before."""
    found, module = set(), ""
    pattern = r"\.\. (currentmodule|automodule|auto\w+):: ([\w.]+)"
    for kind, name in re.findall(pattern, PAGE):
        if kind in ("currentmodule", "automodule"):
            module = name
        else:
            found.add(name if "." in name else f"{module}.{name}")
    return found


def test_every_public_name_is_there() -> None:
    names = {name.rpartition(".")[2] for name in documented()}
    assert set(nnpatch_core.__all__) - names == TOGETHER
    assert "automodule:: nnpatch_core.errors" in PAGE
    assert set(importlib.import_module("nnpatch_core.subspace").__all__) <= names


def test_everything_there_exists() -> None:
    for name in documented():
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(module), last), name
