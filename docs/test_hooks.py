"""What docs/plugins.md says of the hooks and of a package is what there is."""

from __future__ import annotations

import inspect
import re
import sys
import tomllib
from pathlib import Path
from types import FunctionType

import pytest

from nnpatch_core.plugins import hookspecs, load_plugins

PAGE = Path(__file__).with_name("plugins.md").read_text(encoding="utf-8")
HOOKS = [
    value
    for value in vars(hookspecs).values()
    if isinstance(value, FunctionType) and hasattr(value, f"{hookspecs.PROJECT}_spec")
]


def section(title: str) -> str:
    """The text under a heading, up to the next one of any level."""
    _, found, text = PAGE.partition(f"# {title}\n")
    assert found, f"docs/plugins.md has no heading {title!r}"
    return re.split(r"^##+ ", text, flags=re.MULTILINE)[0]


def block(language: str, text: str) -> str:
    """The first code block of a language."""
    return text.partition(f"```{language}\n")[2].partition("\n```")[0] + "\n"


def test_there_are_hooks() -> None:
    assert HOOKS


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_hook_has_its_heading_and_signature(hook: FunctionType) -> None:
    text = section(hook.__name__)
    signature = str(inspect.signature(hook)).replace("'", "")
    written = re.sub(r",?\s+(?=\))|(?<=\()\s+", "", text)
    assert f"def {hook.__name__}{signature}" in written


def test_minimal_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = section("A minimal adapter package")
    module, toml = block("python", text), block("toml", text)
    project = tomllib.loads(toml)["project"]
    [(name, package)] = project["entry-points"]["nnpatch"].items()

    # As installed: the package, and the metadata that pip writes from the table of the project.
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(module)
    info = tmp_path / f"{package}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    (info / "entry_points.txt").write_text(f"[nnpatch]\n{name} = {package}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package, raising=False)

    registry = load_plugins()

    assert not registry.failures
    assert "Qwen2" in [adapter.name for adapter in registry.adapters]
