"""Writes a whole package for an adapter, for a third party to install, test and go on from."""

from __future__ import annotations

import keyword
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from textwrap import fill, indent
from typing import Any

import attrs
from jinja2 import Environment, PackageLoader, StrictUndefined

from nnpatch_core.adapters import DecoderAPI
from nnpatch_core.conformance import Result
from nnpatch_core.errors import AdapterError
from nnpatch_core.scaffold.source import adapter_source, call_source


@attrs.frozen
class Names:
    """The names of things in a package.

    Args:
        short: such as `gpt-neox`.
    """

    short: str

    @property
    def distribution(self) -> str:
        """The name that pip installs."""
        return f"nnpatch-{self.short}"

    @property
    def module(self) -> str:
        """The name that Python imports."""
        return self.distribution.replace("-", "_")

    @property
    def adapter(self) -> str:
        """The adapter's name, and the variable that holds it."""
        return "".join(part[:1].upper() + part[1:] for part in self.short.split("-"))


def package_names(name: str) -> Names:
    """The names of a package, from the name that its author gives.

    Raises:
        AdapterError: it makes no name of a Python module.

    Examples:
        >>> names = package_names("gpt_neox")
        >>> names.distribution, names.module, names.adapter
        ('nnpatch-gpt-neox', 'nnpatch_gpt_neox', 'GptNeox')
    """
    short = re.sub(r"[-_.\s]+", "-", name.strip()).removeprefix("nnpatch-").strip("-").lower()
    names = Names(short)
    if short == "core":
        raise AdapterError(f"{name!r} is the name of nnpatch's own core: choose another")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", short) or keyword.iskeyword(names.adapter):
        raise AdapterError(
            f"{name!r} makes no name of a package: use letters, digits and dashes, a letter first"
        )
    return names


def write_package(
    folder: Path,
    names: Names,
    adapter: DecoderAPI,
    missing: Mapping[str, str],
    results: Sequence[Result],
    settings: Mapping[str, Any],
) -> list[Path]:
    """Write the package into a folder that does not exist yet, all of it or nothing.

    Args:
        folder: where to.
        names: the names of things in it.
        adapter: the adapter, under its name.
        missing: component to why it could not be read off.
        results: of the checks that it was put through.
        settings: of the tiny model that it was read off, beside the generic ones.

    Returns:
        The files written.

    Raises:
        AdapterError: the folder exists, or cannot be written.
    """
    if folder.exists():
        raise AdapterError(f"{folder} exists already: nothing is overwritten")
    files = _files(names, adapter, missing, results, settings)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            root = Path(temporary) / "package"
            for path, text in files.items():
                target = root / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8")
            shutil.move(root, folder)
    except OSError as error:
        raise AdapterError(f"the package cannot be written to {folder}: {error}") from error
    return [folder / path for path in files]


def _files(
    names: Names,
    adapter: DecoderAPI,
    missing: Mapping[str, str],
    results: Sequence[Result],
    settings: Mapping[str, Any],
) -> dict[str, str]:
    """Each file of the package, and its text."""
    source, needed = adapter_source(adapter, names.adapter)
    model_type = adapter.model_types[0]
    call = call_source("tiny_model", model_type, settings, "return ") if settings else None
    known = {
        "names": names,
        "model_type": model_type,
        "core": _core(),
        "imports": _imports(sorted({*needed, "hookimpl"}, key=str.lower)),
        "source": source,
        "notes": _notes(missing),
        "call": call,
        "missing": missing,
        "failed": [result for result in results if not result.ok],
    }
    # Texts are Python, TOML and Markdown: nothing of HTML is escaped.
    environment = Environment(
        loader=PackageLoader("nnpatch_core.scaffold"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        autoescape=False,
    )
    templates = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        "LICENSE": "LICENSE",
        f"src/{names.module}/__init__.py": "__init__.py",
        f"src/{names.module}/py.typed": None,
        f"tests/test_{names.module}.py": "tests.py",
    }
    return {
        path: environment.get_template(f"{name}.j2").render(known) if name else ""
        for path, name in templates.items()
    }


def _core() -> str:
    """The releases of nnpatch-core that the package is for."""
    major, minor, *_ = metadata.version("nnpatch-core").split(".")
    return f"nnpatch-core>={major}.{minor},<{major}.{int(minor) + 1}"


def _notes(missing: Mapping[str, str]) -> str:
    """A comment on what was not read off, if anything was not."""
    if not missing:
        return ""
    lines = [f"{name}: {reason}." for name, reason in missing.items()]
    filled = [fill(line, 94, subsequent_indent="  ") for line in lines]
    return indent("\n".join(["Not read off the model:", *filled]), "# ")


def _imports(names: list[str]) -> str:
    names = sorted(names)
    line = f"from nnpatch_core import {', '.join(names)}"
    if len(line) <= 88:
        return line
    return "\n".join(["from nnpatch_core import (", *(f"    {name}," for name in names), ")"])
