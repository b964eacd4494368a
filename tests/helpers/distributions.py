"""Throw-away distributions, whose plugins are found as those of installed ones are."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

#: The fixture `install`.
Install = Callable[..., Path]


def installing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Give a function that puts distributions on the path, as an installer would."""
    modules: list[str] = []

    def install(
        distribution: str,
        code: str,
        *,
        version: str = "1.2.3",
        module: str | None = None,
        name: str | None = None,
        value: str | None = None,
    ) -> Path:
        """Each has a folder of its own, with one module and one entry point; gives its metadata."""
        module = module or distribution.replace("-", "_")
        site_packages = tmp_path / f"site-{len(modules)}"
        info = site_packages / f"{module}-{version}.dist-info"
        info.mkdir(parents=True)
        (site_packages / f"{module}.py").write_text(textwrap.dedent(code), encoding="utf-8")
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n", encoding="utf-8"
        )
        (info / "entry_points.txt").write_text(
            f"[nnpatch]\n{name or module} = {value or module}\n", encoding="utf-8"
        )
        monkeypatch.syspath_prepend(str(site_packages))
        modules.append(module)
        return info

    yield install
    for module in modules:
        sys.modules.pop(module, None)
