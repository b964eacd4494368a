"""`nnpatch new-adapter`: a package for a family that no plugin knows, filled as far as may be."""

from __future__ import annotations

import argparse
import json
import keyword
import shlex
from pathlib import Path
from typing import Any

from nnpatch_core.adapters import component_names
from nnpatch_core.cli.models import tiny
from nnpatch_core.cli.output import UsageError, say, say_json
from nnpatch_core.infer import put_to_test, read_model
from nnpatch_core.scaffold import package_names, write_package


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "new-adapter",
        help="write a package with an adapter for a model type",
        description="Write a complete package for a model family: pyproject, adapter, tests, "
        "README. The adapter is read off a tiny random model of that type and put through the "
        "conformance kit. Exit code 1 if a check fails.",
    )
    parser.add_argument("name", metavar="NAME", help="of the package, without nnpatch-")
    parser.add_argument(
        "--model-type", metavar="TYPE", required=True, help="the config's model_type, such as gpt2"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", type=Path, help="by default nnpatch-NAME, which must be new"
    )
    parser.add_argument(
        "--config",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        type=_setting,
        help="a setting of the tiny model, its value as JSON; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def _setting(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier() or keyword.iskeyword(name):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return name, json.loads(value, parse_constant=_no_number)
    except json.JSONDecodeError:
        return name, value


def _no_number(text: str) -> float:
    raise argparse.ArgumentTypeError(f"{text} is no value of JSON")


def run(arguments: argparse.Namespace) -> bool:
    """Write the package; whether its adapter passes the checks."""
    names, settings = package_names(arguments.name), dict(arguments.config)
    folder = arguments.output or Path(names.distribution)
    if folder.exists():
        raise UsageError(f"{folder} exists already: nothing is overwritten")
    advice = "give settings that fit by --config KEY=VALUE, such as --config num_hidden_layers=2"
    model = tiny(arguments.model_type, advice, **settings)
    read = read_model(model, names.adapter)
    adapter, results = put_to_test(read.adapter, model)
    files = write_package(folder, names, adapter, read.missing, results, settings)
    failed = [result for result in results if not result.ok]
    if arguments.json:
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
