"""Rooms are entered by their faces alone, and no import runs upwards."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import nnpatch_core

PACKAGE = Path(nnpatch_core.__file__).parent
#: From the top down; a room imports from the floors below, and on the last one from each other.
#: The room `_` is every module whose name begins so and that has no floor of its own.
FLOORS = (
    ("__init__",),
    ("_selfcheck",),
    ("cli",),
    ("run",),
    ("scaffold",),
    ("infer", "testing"),
    ("conformance",),
    ("subspace",),
    ("circuits",),
    ("steering",),
    ("scale",),
    ("patching",),
    ("paths",),
    ("edges",),
    ("interventions",),
    ("sweep",),
    ("results",),
    ("report",),
    ("engine", "gradients"),
    ("memory",),
    ("sites",),
    ("site",),
    ("tracing",),
    ("plugins",),
    ("adapters",),
    ("prompts",),
    ("metrics",),
    ("seq_pos",),
    ("spaces",),
    ("_", "batch", "components", "errors", "names"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: tuple[str, ...]) -> str:
    return "_" if module[0].startswith("_") and module[0] not in FLOOR else module[0]


def imports(file: Path) -> Iterator[tuple[str, ...]]:
    """The modules of ours that a file imports, at its head, in functions or for types alone."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{file} has a relative import"
            parts = node.module.split(".")
            folder = PACKAGE.joinpath(*parts[1:])
            exported = (folder / "__init__.py").read_text("utf-8") if folder.is_dir() else ""
            modules = {path.stem for path in folder.glob("*")}
            # A name in quotes is one that the face exports, even if a module has it too.
            inside = [
                a.name for a in node.names if a.name in modules and f'"{a.name}"' not in exported
            ]
            targets = [[*parts, name] for name in inside] or [parts]
        else:
            continue
        yield from (tuple(rest) or ("__init__",) for own, *rest in targets if own == PACKAGE.name)


def violations() -> Iterator[str]:
    for file in sorted(PACKAGE.rglob("*.py")):
        module = file.relative_to(PACKAGE).with_suffix("").parts
        here = FLOOR[room_of(module)]
        for target in imports(file):
            own, entered, there = list(module[:-1]), list(target), FLOOR[room_of(target)]
            while own and own[:1] == entered[:1]:
                own, entered = own[1:], entered[1:]
            if len(entered) > 1:
                yield f"{'.'.join(module)} enters {'.'.join(target)} past its face"
            ground = here == there == len(FLOORS) - 1
            if there <= here and module[0] != target[0] and not ground:
                yield f"{'.'.join(module)} imports {'.'.join(target)}, which stands no lower"


#: The older library's names, in the same distribution: a package that stands on top of all rooms.
OLDER = PACKAGE.with_name("nnpatch")


def imported(file: Path) -> Iterator[tuple[str, str]]:
    """Each module that a file imports, and each name that it takes from it; "" for the whole."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{file} has a relative import"
            yield from ((node.module, alias.name) for alias in node.names)


#: The modules whose names are public, besides the package itself.
PUBLIC = ("names", "errors", "subspace")


def test_the_older_names_stand_on_public_ones() -> None:
    """A plugin's package is imported as well, for its adapters."""
    files = sorted(OLDER.rglob("*.py"))
    assert {path.name for path in files} >= {"__init__.py", "llama.py", "mistral.py", "gemma.py"}
    for file in files:
        for module, name in imported(file):
            if module.partition(".")[0] == PACKAGE.name:
                public = module in (PACKAGE.name, *(f"{PACKAGE.name}.{each}" for each in PUBLIC))
                assert public, f"{file.name} imports {module}"
                known = getattr(importlib.import_module(module), "__all__", None)
                # Of names and errors all are public that have no underscore.
                shown = name in known if known is not None else not name.startswith("_")
                assert not name or shown, f"{file.name} imports {name}"
        # `nnpatch_core.name`, where the whole is imported.
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == PACKAGE.name:
                assert node.attr in nnpatch_core.__all__, f"{file.name} reads {node.attr}"


def test_no_room_knows_the_older_names() -> None:
    for file in sorted(PACKAGE.rglob("*.py")):
        roots = {module.partition(".")[0] for module, _ in imported(file)}
        assert OLDER.name not in roots, file


#: The page that shows them to people.
PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"


def test_the_page_shows_the_floors() -> None:
    table = PAGE.read_text("utf-8").split("## The floors")[1].split("## ")[0]
    rows = re.findall(r"^\| \d+ \| (.*?) \|", table, re.MULTILINE)
    shown = [set(re.findall(r"`(.*?)`", row)) for row in rows]
    first, second, *others = ({*floor} for floor in FLOORS)
    expected = [first | second, *({*floor} for floor in others)]
    assert shown == [{"_*" if room == "_" else room for room in floor} for floor in expected]


def test_the_page_names_what_there_is() -> None:
    table = PAGE.read_text("utf-8").split("## To change something")[1].split("## ")[0]
    paths = re.findall(r"`([\w/]+(?:\.py|/))`", table)
    assert len(paths) > 20
    assert [path for path in paths if not (PACKAGE / path).exists()] == []


def test_docstrings_say_what_things_are() -> None:
    """None begins with "What", which makes its reader look for the noun."""
    found = [
        f"{file.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 1)}"
        for file in [*PACKAGE.rglob("*.py"), *OLDER.rglob("*.py")]
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and (ast.get_docstring(node) or "").startswith("What ")
    ]
    assert found == []


def test_every_room_has_a_floor() -> None:
    rooms = {room_of((path.parent.name,)) for path in PACKAGE.glob("*/__init__.py")}
    rooms |= {room_of((path.stem,)) for path in PACKAGE.glob("*.py")}
    assert rooms <= set(FLOOR)


def test_rooms_are_entered_by_their_faces_and_from_above() -> None:
    broken = list(dict.fromkeys(violations()))
    assert not broken, f"{len(broken)} imports:\n" + "\n".join(broken)
