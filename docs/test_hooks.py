"""docs/hooks.md has every hook, as it is, and each has a test."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import FunctionType

import pytest

from nnpatch_core.metrics import BUILTIN_METRICS
from nnpatch_core.plugins import hookspecs
from nnpatch_core.seq_pos import BUILTIN_SEQ_POS

PAGE = Path(__file__).with_name("hooks.md").read_text(encoding="utf-8")
#: Where each hook has the test that is called by its name.
TESTS = Path(__file__).resolve().parents[1] / "tests" / "plugins" / "test_plugins.py"
HOOKS = [
    value
    for value in vars(hookspecs).values()
    if isinstance(value, FunctionType) and hasattr(value, f"{hookspecs.PROJECT}_spec")
]


def section(title: str) -> str:
    """The text under a heading, up to the next one of any level."""
    _, found, text = PAGE.partition(f"\n## {title}\n")
    assert found, f"docs/hooks.md has no heading {title!r}"
    return re.split(r"^##+ ", text, flags=re.MULTILINE)[0]


def test_there_are_hooks() -> None:
    assert HOOKS


def test_there_are_no_other_headings() -> None:
    headings = re.findall(r"^##+ (.*)$", PAGE, re.MULTILINE)
    assert headings == [hook.__name__ for hook in HOOKS]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_hook_has_its_heading_and_signature(hook: FunctionType) -> None:
    text = section(hook.__name__)
    signature = str(inspect.signature(hook)).replace("'", "")
    written = re.sub(r",?\s+(?=\))|(?<=\()\s+", "", text)
    assert f"def {hook.__name__}{signature}: ..." in written


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_hook_says_what_is_refused_and_has_an_example(hook: FunctionType) -> None:
    text = section(hook.__name__)
    assert "\nRefused: " in text
    arguments = ", ".join(inspect.signature(hook).parameters)
    assert f"@hookimpl\ndef {hook.__name__}({arguments}):\n    " in text


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_hook_has_its_test(hook: FunctionType) -> None:
    tests = ast.parse(TESTS.read_text(encoding="utf-8")).body
    names = [each.name for each in tests if isinstance(each, ast.FunctionDef)]
    assert f"test_{hook.__name__}" in names


@pytest.mark.parametrize(
    ("hook", "names"),
    [("register_seq_pos", BUILTIN_SEQ_POS), ("register_metrics", BUILTIN_METRICS)],
)
def test_names_that_are_refused(hook: str, names: dict[str, object]) -> None:
    text = " ".join(section(hook).split())
    assert ", ".join(f"`{name}`" for name in sorted(names)) in text
