"""Tests can be read: no file is too long for that, and none is a library of another one."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.helpers.paths import ROOT

TESTS = ROOT / "tests"
LONGEST = 40_000
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(TESTS.rglob("*.py"))}


def imported(source: str) -> Iterator[str]:
    """What a source imports, modules or not, and what code for another process does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            for line in node.value.splitlines():
                words = line.split()
                if len(words) > 1 and words[0] in ("from", "import"):
                    yield words[1]


def of_a_test(module: str) -> bool:
    return module.split(".")[-1].startswith("test_") and module.split(".")[0] in ("tests", module)


def test_no_file_is_too_long() -> None:
    sizes = {name: path.stat().st_size for name, path in FILES.items()}
    assert {name: size for name, size in sizes.items() if size > LONGEST} == {}


def test_no_test_module_is_imported() -> None:
    found = {
        name: [module for module in imported(path.read_text("utf-8")) if of_a_test(module)]
        for name, path in FILES.items()
    }
    assert {name: modules for name, modules in found.items() if modules} == {}


def test_what_counts_as_an_import() -> None:
    # Put together, so that this file is none that does so.
    test = "test_cone"
    for source in (
        f"from tests.engine.{test} import Pairs",
        f"import tests.engine.{test}",
        f"from tests.engine import {test}",
        f"from .{test} import Pairs",
        f"SCRIPT = '''\nimport sys\nfrom {test} import Pairs\n'''",
    ):
        assert any(map(of_a_test, imported(source))), source
    for source in ("from tests.helpers.pairs import Pairs", "'from here on: test_cone'"):
        assert not any(map(of_a_test, imported(source))), source


def test_what_is_leant_on_has_no_tests() -> None:
    """A test there would be collected by nobody who runs one room."""
    for name, path in FILES.items():
        if not path.name.startswith("test_"):
            tree = ast.parse(path.read_text("utf-8"))
            names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
            assert not [each for each in names if each.startswith("test_")], name


def test_each_folder_is_a_package() -> None:
    """So that two files may have one name, and helpers are found by theirs."""
    folders = {path.parent for path in FILES.values() if path.name.startswith("test_")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
