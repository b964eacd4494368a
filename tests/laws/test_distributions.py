"""What the four distributions share is said once, and what repeats it agrees."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import nnpatch_core

ROOT = Path(__file__).resolve().parents[2]
VERSION_FILE = ROOT / "nnpatch_core" / "src" / "nnpatch_core" / "_version.py"
CORE = "nnpatch_core"
PLUGINS = ["nnpatch_gemma", "nnpatch_llama", "nnpatch_mistral"]
#: A third party's; it has a version of its own.
EXAMPLE = "docs/examples/nnpatch-gpt2"


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def pyproject(folder: str) -> dict[str, Any]:
    return tomllib.loads(text_of(f"{folder}/pyproject.toml"))


# The version --------------------------------------------------------------------------------------


def test_all_distributions_are_looked_at() -> None:
    assert sorted(path.parent.name for path in ROOT.glob("*/pyproject.toml")) == [CORE, *PLUGINS]


@pytest.mark.parametrize("folder", [CORE, *PLUGINS])
def test_the_version_is_read_from_one_file(folder: str) -> None:
    found = pyproject(folder)
    assert "version" not in found["project"]
    assert found["project"]["dynamic"] == ["version"]
    assert (ROOT / folder / found["tool"]["hatch"]["version"]["path"]).resolve() == VERSION_FILE


@pytest.mark.parametrize("folder", [CORE, *PLUGINS])
def test_the_version_is_the_installed_one(folder: str) -> None:
    """After a change of it the checkout has to be installed anew."""
    assert metadata.version(folder.replace("_", "-")) == nnpatch_core.__version__


@pytest.mark.parametrize("folder", [*PLUGINS, EXAMPLE])
def test_plugins_need_the_core_of_their_minor_release(folder: str) -> None:
    [requirement] = map(Requirement, pyproject(folder)["project"]["dependencies"])
    major, minor = Version(nnpatch_core.__version__).release[:2]
    assert requirement.name == "nnpatch-core"
    assert requirement.specifier.contains(nnpatch_core.__version__, prereleases=True)
    assert {str(bound) for bound in requirement.specifier} == {
        f">={major}.{minor}",
        f"<{major}.{minor + 1}",
    }


def test_the_citation_is_of_this_version() -> None:
    found = dict(re.findall(r"^([a-z-]+): (\S.*)$", text_of("CITATION.cff"), re.MULTILINE))
    assert found["version"].strip('"') == nnpatch_core.__version__
    assert found["license"] == pyproject(CORE)["project"]["license"]


# What they ship ----------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [CORE, *PLUGINS])
def test_every_package_of_a_folder_is_shipped_with_its_types(folder: str) -> None:
    packages = sorted(path.parent for path in (ROOT / folder / "src").glob("*/__init__.py"))
    shipped = pyproject(folder)["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert shipped == [f"src/{path.name}" for path in packages]
    assert all((path / "py.typed").is_file() for path in packages)


def test_core_ships_the_older_names() -> None:
    assert (ROOT / CORE / "src" / "nnpatch" / "api" / "llama.py").is_file()


# Where they live ----------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", PLUGINS)
def test_all_name_the_same_pages(folder: str) -> None:
    urls = pyproject(CORE)["project"]["urls"]
    assert {"Homepage", "Documentation", "Source", "Issues", "Changelog"} <= set(urls)
    assert pyproject(folder)["project"]["urls"] == urls


@pytest.mark.parametrize("folder", [CORE, *PLUGINS])
def test_links_of_a_readme_work_on_an_index(folder: str) -> None:
    """Each is absolute, and what it names in this repository is there."""
    home = pyproject(CORE)["project"]["urls"]["Homepage"]
    links = re.findall(r"\]\(([^)]*)\)", text_of(f"{folder}/README.md"))
    assert home in {link.partition("#")[0] for link in links}
    assert [link for link in links if not link.startswith("https://")] == []
    inside = [link.removeprefix(f"{home}/blob/main/") for link in links if "/blob/main/" in link]
    assert [path for path in inside if not (ROOT / path.partition("#")[0]).is_file()] == []


# What repeats the lock ----------------------------------------------------------------------------


def test_commits_are_checked_by_the_locked_ruff() -> None:
    [locked] = re.findall(r"^ruff==(\S+)$", text_of("constraints.txt"), re.MULTILINE)
    config = text_of(".pre-commit-config.yaml")
    [found] = re.findall(r"/ruff-pre-commit\n(?: +#.*\n)* +rev: v(\S+)\n", config)
    assert found == locked
