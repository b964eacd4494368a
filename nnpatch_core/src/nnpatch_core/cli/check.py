"""`nnpatch check`: the conformance kit, outside pytest."""

from __future__ import annotations

import argparse
from typing import Any

from nnpatch_core.cli.models import MODEL_HELP, find_api, loaded
from nnpatch_core.cli.output import UsageError, say, say_json, say_table
from nnpatch_core.conformance import Result, run_checks


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "check",
        help="put an adapter through the conformance kit",
        description="Put an adapter through the conformance kit on a model, by default on a tiny "
        "random one of each of its model types. Exit code 1 if a check fails.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="a registered name, or module:attribute")
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument(
        "--only", metavar="CHECK", action="append", help="run this check alone; may be repeated"
    )
    parser.add_argument(
        "--known-failure",
        metavar="CHECK",
        action="append",
        default=[],
        help="a check that is known to fail; it is an error if it does not; may be repeated",
    )
    parser.add_argument(
        "--layers",
        metavar="N,N",
        type=_numbers,
        help="look at these layers alone, such as 0,15: a big model takes long",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between") from None


def run(arguments: argparse.Namespace) -> bool:
    """Print the result of each check; whether all are as they should be."""
    api = find_api(arguments.adapter)
    names = api.model_types if arguments.model is None else (arguments.model,)
    if not names:
        raise UsageError(f"adapter {api.name!r} names no model type: name a model")
    by_model = {}
    for name in names:
        by_model[name] = run_checks(
            api,
            loaded(name),
            only=arguments.only,
            layers=arguments.layers,
            known_failures=dict.fromkeys(arguments.known_failure, "declared to fail"),
        )
        if not arguments.json:
            _print(api.name, name, by_model[name])
    ok = all(result.ok for results in by_model.values() for result in results)
    if arguments.json:
        say_json(
            {
                "adapter": api.name,
                "ok": ok,
                "models": {
                    name: [
                        {"check": result.check, "status": result.status, "reason": result.reason}
                        for result in results
                    ]
                    for name, results in by_model.items()
                },
            }
        )
    return ok


def _print(adapter: str, model: str, results: list[Result]) -> None:
    say(f"adapter {adapter} on {model}")
    say_table(
        ("check", "status", "reason"),
        [(result.check, result.status, result.reason.partition("\n")[0]) for result in results],
        "  ",
    )
    counts = {
        status: sum(result.status == status for result in results)
        for status in dict.fromkeys(result.status for result in results)
    }
    say("  " + ", ".join(f"{count} {status}" for status, count in counts.items()))
