"""Rooms are entered by their faces alone, and no import runs upwards."""

from __future__ import annotations

import ast
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
    ("scaffold",),
    ("infer", "testing"),
    ("conformance",),
    ("patching",),
    ("interventions",),
    ("sweep",),
    ("results",),
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
    ("_", "batch", "components", "errors"),
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
        f"{file.relative_to(PACKAGE)}:{getattr(node, 'lineno', 1)}"
        for file in PACKAGE.rglob("*.py")
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
