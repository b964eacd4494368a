"""Writes a whole package for an adapter, for a third party to install, test and go on from."""

from __future__ import annotations

import keyword
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from textwrap import dedent, fill, indent
from typing import Any

import attrs

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
    files = {
        "pyproject.toml": _pyproject(names, adapter),
        "README.md": _readme(names, adapter, missing, results),
        f"src/{names.module}/__init__.py": _module(names, adapter, missing),
        f"src/{names.module}/py.typed": "",
        f"tests/test_{names.module}.py": _tests(names, adapter, settings),
    }
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


def _pyproject(names: Names, adapter: DecoderAPI) -> str:
    major, minor, *_ = metadata.version("nnpatch-core").split(".")
    core = f"nnpatch-core>={major}.{minor},<{major}.{int(minor) + 1}"
    return dedent(f"""\
        [build-system]
        requires = ["hatchling>=1.27"]
        build-backend = "hatchling.build"

        [project]
        name = "{names.distribution}"
        version = "0.1.0"
        description = "nnpatch plugin: an adapter for {adapter.model_types[0]} models"
        readme = "README.md"
        requires-python = ">=3.11"
        dependencies = ["{core}"]

        [project.optional-dependencies]
        test = ["nnpatch-core[testing]"]

        [project.entry-points.nnpatch]
        {names.short.replace("-", "_")} = "{names.module}"

        [tool.hatch.build.targets.wheel]
        packages = ["src/{names.module}"]
        """)


def _module(names: Names, adapter: DecoderAPI, missing: Mapping[str, str]) -> str:
    source, needed = adapter_source(adapter, names.adapter)
    imports = _imports(sorted({*needed, "hookimpl"}, key=str.lower))
    notes = ""
    if missing:
        lines = [f"{name}: {reason}." for name, reason in missing.items()]
        filled = [fill(line, 94, subsequent_indent="  ") for line in lines]
        notes = indent("\n".join(["Not read off the model:", *filled]), "# ") + "\n"
    return f'''\
"""nnpatch plugin: the adapter for {adapter.model_types[0]} models."""

{imports}

__all__ = ["{names.adapter}"]

{notes}{source}


@hookimpl
def register_model_apis(register):
    """Register `{names.adapter}`."""
    register({names.adapter})
'''


def _imports(names: list[str]) -> str:
    names = sorted(names)
    line = f"from nnpatch_core import {', '.join(names)}"
    if len(line) <= 88:
        return line
    return "\n".join(["from nnpatch_core import (", *(f"    {name}," for name in names), ")"])


def _tests(names: Names, adapter: DecoderAPI, settings: Mapping[str, Any]) -> str:
    model_type = adapter.model_types[0]
    made, argument, function = f'tiny_model("{model_type}")', "", ""
    if settings:
        call = call_source("tiny_model", model_type, settings, "return ")
        made, argument = "model()", ', {"tiny": model}'
        function = f"\n\n\ndef model():\n    return {call}"
    return f'''\
"""The adapter keeps what every adapter must: the checks of nnpatch's conformance kit."""

from nnpatch_core.plugins import find_adapter
from nnpatch_core.testing import parametrize_with_checks, tiny_model

from {names.module} import {names.adapter}{function}


@parametrize_with_checks({names.adapter}{argument})
def test_conformance(check):
    check()


def test_found_by_the_type_of_a_model():
    assert find_adapter(None, {made}) is {names.adapter}
'''


def _readme(
    names: Names, adapter: DecoderAPI, missing: Mapping[str, str], results: Sequence[Result]
) -> str:
    failed = [result for result in results if not result.ok]
    reasons = "".join(f"- `{name}`: {reason}.\n" for name, reason in missing.items())
    lacking = f"\nNot read off the model, and so not in the table:\n\n{reasons}" if missing else ""
    faults = "".join(f"- `{result.check}`: {result.reason}\n" for result in failed)
    broken = f"\nChecks that fail, to be mended before use:\n\n{faults}" if failed else ""
    return f"""\
# {names.distribution}

The adapter `{names.adapter}` for models of type `{adapter.model_types[0]}`, for
[nnpatch](https://pypi.org/project/nnpatch-core/): activation patching on Hugging Face models.

```console
$ pip install {names.distribution}
```

Once it is installed, nnpatch finds the adapter by the model's type, or by its name,
`api="{names.adapter}"`. The table was read off a tiny random model, by what its modules do.
{lacking}{broken}
## Tests

```console
$ pip install -e ".[test]"
$ pytest
```

They are nnpatch's conformance kit, on a tiny random model. What a tiny model cannot show is
whether the layout holds at the size of a real one:

```console
$ nnpatch check {names.adapter} path/to/a/real/model
```
"""
