"""Unsupported releases of nnsight and transformers are refused on import, with the way out."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nnpatch_core
from nnpatch_core import _versions

RANGES = ("nnsight>=0.8,<0.9", "transformers>=5,<6", "tqdm>=4.66", 'nnsight>=99; extra == "all"')


def distribution(folder: Path, name: str, version: str, requires: Any = ()) -> Path:
    """Metadata of a distribution, as an installer writes it."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {line}" for line in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return info


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which distributions are found; empty."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


@pytest.fixture
def install(site_packages: Path) -> Callable[..., Any]:
    """Installs nnpatch-core with fixed ranges, and other distributions in given versions."""

    def install(requires: Any = RANGES, **versions: Any) -> None:
        distribution(site_packages, "nnpatch-core", "0.1.0", requires)
        for name, version in versions.items():
            distribution(site_packages, name, version)

    return install


def refusal() -> str:
    with pytest.raises(ImportError) as raised:
        _versions._check(_versions._required())
    return str(raised.value)


def accept() -> None:
    _versions._check(_versions._required())


@pytest.mark.parametrize(
    ("nnsight", "transformers"),
    [
        ("0.8.0", "5.0.0"),
        ("0.8.1", "5.23.0"),
        ("0.8.99", "5.999"),
        ("0.8.2rc1", "5.24.0.dev0"),
        ("0.8.1.post1", "5.23.0+local"),
        ("0.8.0+cu128", "5.0.0.post2"),
    ],
)
def test_versions_in_range(install: Callable[..., Any], nnsight: str, transformers: str) -> None:
    install(nnsight=nnsight, transformers=transformers)
    accept()


@pytest.mark.parametrize(
    ("name", "version", "bounds"),
    [
        ("nnsight", "0.7.0", ">=0.8,<0.9"),
        ("nnsight", "0.8.0rc1", ">=0.8,<0.9"),
        ("nnsight", "0.9.0", ">=0.8,<0.9"),
        ("nnsight", "0.9.0.dev3", ">=0.8,<0.9"),
        ("nnsight", "0.10.0", ">=0.8,<0.9"),
        ("transformers", "4.57.6", ">=5,<6"),
        ("transformers", "5.0.0rc3", ">=5,<6"),
        ("transformers", "6.0.0.dev0", ">=5,<6"),
        ("transformers", "6.0.0+local", ">=5,<6"),
        ("transformers", "50.0.0", ">=5,<6"),
    ],
)
def test_version_out_of_range(
    install: Callable[..., Any], name: str, version: str, bounds: str
) -> None:
    install(**{"nnsight": "0.8.1", "transformers": "5.23.0", name: version})
    assert refusal() == (
        f"nnpatch-core needs {name} {bounds}, but {version} is installed; "
        f'mend it with: pip install "{name}{bounds}"'
    )


def test_several_out_of_range_are_told_and_mended_at_once(install: Callable[..., Any]) -> None:
    install(nnsight="0.9.0", transformers="4.57.6")
    assert refusal() == (
        "nnpatch-core needs nnsight >=0.8,<0.9, but 0.9.0 is installed "
        "and transformers >=5,<6, but 4.57.6 is installed; "
        'mend it with: pip install "nnsight>=0.8,<0.9" "transformers>=5,<6"'
    )


def test_only_nnsight_and_transformers_are_judged(install: Callable[..., Any]) -> None:
    install(nnsight="0.8.1", transformers="5.23.0", tqdm="1.0")
    accept()


def test_requirement_of_an_extra_or_of_another_python_does_not_count(
    install: Callable[..., Any],
) -> None:
    install(
        ('nnsight<0.1; extra == "all"', 'transformers<1; python_version < "3"'), nnsight="0.8.1"
    )
    accept()


def test_exclusion_is_told_too(install: Callable[..., Any]) -> None:
    install(("nnsight!=0.8.2,<0.9,>=0.8",), nnsight="0.8.2")
    assert "needs nnsight >=0.8,<0.9,!=0.8.2, but 0.8.2 is" in refusal()


def test_nnpatch_without_metadata_is_not_held_up(site_packages: Path) -> None:
    distribution(site_packages, "nnsight", "0.1.0")
    accept()


def test_nnpatch_without_requirements_is_not_held_up(install: Callable[..., Any]) -> None:
    install((), nnsight="0.1.0")
    accept()


def test_library_without_metadata_is_not_held_up(install: Callable[..., Any]) -> None:
    install(transformers="5.23.0")
    accept()


def test_library_without_metadata_hides_no_other(install: Callable[..., Any]) -> None:
    install(transformers="4.57.6")
    assert "needs transformers" in refusal()


@pytest.mark.filterwarnings("ignore:Implicit None:DeprecationWarning")  # of Python 3.12 to 3.14
def test_empty_metadata_folder_is_not_held_up(
    install: Callable[..., Any], site_packages: Path
) -> None:
    install(transformers="5.23.0")
    (site_packages / "nnsight-0.1.0.dist-info").mkdir()
    accept()


def test_version_that_is_no_version_is_not_held_up(install: Callable[..., Any]) -> None:
    install(nnsight="unknown", transformers="5.23.0")
    accept()


# On import --------------------------------------------------------------------------------------


def test_own_metadata_bounds_both_sides() -> None:
    required = {found.name: found.specifier for found in _versions._required()}
    assert sorted(required) == ["nnsight", "transformers"]
    for specifier in required.values():
        assert {bound.operator for bound in specifier} >= {">=", "<"}


def test_check_is_the_first_import() -> None:
    tree = ast.parse(Path(nnpatch_core.__file__).read_text(encoding="utf-8"))
    first = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    assert ast.unparse(first) == "from nnpatch_core import _versions"


def import_in_a_new_process(folder: Path) -> Any:
    """`import nnpatch_core`, with what is in `folder` before everything that is installed."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", "import nnpatch_core"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(("name", "version"), [("nnsight", "0.9.0"), ("transformers", "4.57.6")])
def test_import_fails_before_the_library_is_imported(
    tmp_path: Path, name: str, version: str
) -> None:
    distribution(tmp_path, name, version)
    (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported too early')\n")
    found = import_in_a_new_process(tmp_path)
    assert found.returncode == 1
    assert re.match(
        rf"ImportError: nnpatch-core needs {name} >=[\d.]+,<[\d.]+, but {re.escape(version)} is "
        rf'installed; mend it with: pip install "{name}>=[\d.]+,<[\d.]+"$',
        found.stderr.splitlines()[-1],
    )
    assert "imported too early" not in found.stderr


def test_one_module_knows_the_libraries_by_name() -> None:
    package = Path(nnpatch_core.__file__).parent
    importing = [
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"^\s*(from|import) (nnsight|transformers)\b", path.read_text("utf-8"), re.M)
    ]
    assert importing == ["_upstream.py"]
