"""`nnpatch check`: the conformance kit, outside pytest."""

from __future__ import annotations

from typing import Annotated

import typer

from nnpatch_core.cli.arguments import AsJson
from nnpatch_core.cli.models import MODEL_HELP, find_api, loaded
from nnpatch_core.cli.output import UsageError, say, say_json, say_table
from nnpatch_core.conformance import Result, run_checks


def check(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="A registered name, or module:attribute.")
    ],
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    *,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="CHECK", help="Run this check alone; may be repeated."),
    ] = None,
    known_failure: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CHECK",
            help="A check that is known to fail; it is an error if it does not; may be repeated.",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="N,N", help="Look at these layers alone, such as 0,15: a big model takes long."
        ),
    ] = None,
    as_json: AsJson = False,
) -> bool:
    """Put an adapter through the conformance kit.

    On a model, by default on a tiny random one of each of its model types. Exit code 1 if a check
    fails.
    """
    numbers = None if layers is None else _numbers(layers)
    api = find_api(adapter)
    names = api.model_types if model is None else (model,)
    if not names:
        raise UsageError(f"adapter {api.name!r} names no model type: name a model")
    by_model = {}
    for name in names:
        by_model[name] = run_checks(
            api,
            loaded(name),
            only=only,
            layers=numbers,
            known_failures=dict.fromkeys(known_failure or [], "declared to fail"),
        )
        if not as_json:
            _print(api.name, name, by_model[name])
    ok = all(result.ok for results in by_model.values() for result in results)
    if as_json:
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


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not numbers with commas between", param_hint="--layers"
        ) from None


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
