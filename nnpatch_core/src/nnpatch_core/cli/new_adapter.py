"""`nnpatch new-adapter`: a package for a family that no plugin knows, filled as far as may be."""

from __future__ import annotations

import json
import keyword
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from nnpatch_core.adapters import component_names
from nnpatch_core.cli.arguments import AsJson
from nnpatch_core.cli.models import tiny
from nnpatch_core.cli.output import UsageError, say, say_json
from nnpatch_core.infer import put_to_test, read_model
from nnpatch_core.scaffold import package_names, write_package


def new_adapter(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the package, without nnpatch-.")],
    *,
    model_type: Annotated[
        str, typer.Option(metavar="TYPE", help="The config's model_type, such as gpt2.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="By default nnpatch-NAME, which must be new."),
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="A setting of the tiny model, its value as JSON; may be repeated.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> bool:
    """Write a package with an adapter for a model type.

    A complete one: pyproject, adapter, tests, README. The adapter is read off a tiny random model
    of that type and put through the conformance kit. Exit code 1 if a check fails.
    """
    settings = dict(map(_setting, config or []))
    names = package_names(name)
    folder = output or Path(names.distribution)
    if folder.exists():
        raise UsageError(f"{folder} exists already: nothing is overwritten")
    advice = "give settings that fit by --config KEY=VALUE, such as --config num_hidden_layers=2"
    model = tiny(model_type, advice, **settings)
    read = read_model(model, names.adapter)
    adapter, results = put_to_test(read.adapter, model)
    files = write_package(folder, names, adapter, read.missing, results, settings)
    failed = [result for result in results if not result.ok]
    if as_json:
        say_json(
            {
                "distribution": names.distribution,
                "adapter": names.adapter,
                "files": [str(path) for path in files],
                "components": component_names(adapter),
                "missing": dict(read.missing),
                "failed": {result.check: result.reason for result in failed},
            }
        )
        return not failed
    say(
        f"{names.distribution}, with the adapter {names.adapter} for model type "
        f"{adapter.model_types[0]}:"
    )
    for path in files:
        say(f"  {path}")
    say(f"Read off the model: {', '.join(component_names(adapter))}.")
    for name, reason in read.missing.items():
        say(f"Not read off: {name}: {reason}.")
    for result in failed:
        say(f"Fails: {result.check}: {result.reason}")
    if not failed:
        passed = sum(result.status == "passed" for result in results)
        say(f"It passes the {passed} checks of the kit that apply to it.")
    package, place = shlex.quote(f"{folder}[test]"), shlex.quote(str(folder))
    say(f"Next: pip install -e {package} && pytest {place}")
    return not failed


def _setting(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier() or keyword.iskeyword(name):
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--config")
    try:
        return name, json.loads(value, parse_constant=_no_number)
    except json.JSONDecodeError:
        return name, value


def _no_number(text: str) -> float:
    raise typer.BadParameter(f"{text} is no value of JSON", param_hint="--config")
