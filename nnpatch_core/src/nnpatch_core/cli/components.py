"""`nnpatch components`: the table of an adapter, laid on a model."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nnpatch_core._models import input_device
from nnpatch_core._ranges import ranges
from nnpatch_core._tiny import tiny_model
from nnpatch_core.adapters import (
    Component,
    ModelAPI,
    check_fits,
    heads_of,
    n_layers,
    of_other_type,
    table_of,
)
from nnpatch_core.cli.models import INSTEAD, MODEL_HELP, find_api, weightless
from nnpatch_core.cli.output import UsageError, say, say_aside, say_json, say_table
from nnpatch_core.errors import PatchingError
from nnpatch_core.plugins import (
    Inferred,
    Registry,
    claimed,
    infer_unclaimed,
    load_plugins,
    not_read_off,
    package_command,
    why_unclaimed,
)


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "components",
        help="show where the components of a model are",
        description="Show the table of an adapter on a model: module paths, shapes and heads of "
        "each component. No weights are loaded. Where no plugin claims the model's type, the "
        "adapter is inferred from a tiny random model of that type.",
    )
    parser.add_argument("model", metavar="MODEL_OR_CONFIG", help=MODEL_HELP)
    parser.add_argument(
        "--adapter",
        metavar="NAME",
        help="an adapter's name or module:attribute; by default that of the model's type",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> bool:
    """Print the table."""
    registry = load_plugins(report=False)
    model = weightless(arguments.model, _instead(arguments, registry))
    api, inferred = _adapter(arguments.adapter, model, registry)
    check_fits(api, model)
    doubt = of_other_type(api, model)
    if doubt:
        say_aside(doubt)
    kinds = _kinds(api, model)
    config: Any = model.config
    if arguments.json:
        say_json(
            {
                "adapter": api.name,
                "model_type": config.model_type,
                "path": api.layers,
                "layers": n_layers(api, model),
                "kinds": [
                    {"layers": layers, "components": _rows(api, model, layers[0])}
                    for layers in kinds
                ],
                "inferred": inferred is not None,
                "missing": {} if inferred is None else dict(inferred.missing),
            }
        )
        return True
    say(f"adapter {api.name}, model type {config.model_type}")
    for layers in kinds:
        say()
        say(f"{api.layers}.N, layer{'s' * (len(layers) > 1)} {ranges(layers)}")
        rows = [
            (
                row["component"],
                row["module"] or "(the layer)",
                row["side"],
                _shape(row["width"]),
                _heads(row),
            )
            for row in _rows(api, model, layers[0])
        ]
        say_table(("component", "module", "side", "shape", "heads"), rows, "  ")
    if inferred is not None:
        _say_how(inferred, config.model_type)
    return True


def _instead(arguments: argparse.Namespace, registry: Registry) -> str:
    """What to do about a type that there is no tiny model of."""
    types = [each for found in registry.adapters for each in found.value.model_types]
    if arguments.adapter is not None or arguments.model in types:
        return INSTEAD
    return f"{INSTEAD}; and its adapter with --adapter, as no plugin has one"


def _adapter(
    name: str | None, model: nn.Module, registry: Registry
) -> tuple[ModelAPI, Inferred | None]:
    """The adapter of that name, or the one of the model's type; how it was inferred, if it was."""
    if name is not None:
        return find_api(name), None
    instead = "name an adapter with --adapter, a registered name or module:attribute"
    api = claimed(model, registry, "choose one with --adapter")
    if api is not None:
        return api, None
    if any(weight.is_meta for weight in model.parameters()):
        # What has no weights cannot be run; a tiny model of its type has the same modules.
        config: Any = model.config
        try:
            model = tiny_model(config.model_type)
        except PatchingError as error:
            why = f"{why_unclaimed(model, registry)}; and none can be inferred: {error}; {instead}"
            raise UsageError(why) from error
    inferred = infer_unclaimed(model, registry, instead)
    return inferred.adapter, inferred


def _say_how(inferred: Inferred, model_type: str) -> None:
    say()
    say(f"Inferred from a tiny random model: {inferred.unclaimed}.")
    for line in not_read_off(inferred):
        say(f"Not read off: {line}.")
    command = package_command(model_type)
    if command is not None:
        say(f"To keep it as a package: {command}")


def _kinds(api: ModelAPI, model: nn.Module) -> list[list[int]]:
    """Layers that have the same table and as many heads, together."""
    found: dict[Any, list[int]] = {}
    for layer in range(n_layers(api, model)):
        heads = heads_of(api, model, layer) if _has_heads(api, model, layer) else None
        counts = None if heads is None else (heads.query, heads.key_value)
        found.setdefault((id(table_of(api, model, layer)), counts), []).append(layer)
    return list(found.values())


def _has_heads(api: ModelAPI, model: nn.Module, layer: int) -> bool:
    return any(row.heads is not None for row in table_of(api, model, layer).values())


def _rows(api: ModelAPI, model: nn.Module, layer: int) -> list[dict[str, Any]]:
    widths = _widths(api, model, layer)
    found = []
    for name, row in table_of(api, model, layer).items():
        count = None if row.heads is None else heads_of(api, model, layer).count(row.heads)
        found.append(
            {
                "component": name,
                "module": row.module,
                "side": row.side,
                "width": widths.get(name),
                "heads": count,
                "kind": row.heads,
                "columns": None if row.columns is None else repr(row.columns),
            }
        )
    return found


def _widths(api: ModelAPI, model: nn.Module, layer: int) -> dict[str, int]:
    """What a run without weights shows of the widths; a model that cannot be run so shows none."""
    found: dict[str, int] = {}
    module = model.get_submodule(api.layers).get_submodule(str(layer))
    hooks = []
    for name, row in table_of(api, model, layer).items():
        place = module.get_submodule(row.module)
        if row.side == "input":
            note = partial(_entered, found, name)
            hooks.append(place.register_forward_pre_hook(note, with_kwargs=True))
        else:
            hooks.append(place.register_forward_hook(partial(_left, found, name, row)))
    try:
        _run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _run(model: nn.Module) -> None:
    """Run two tokens, to see shapes; without weights not every family gets to the end."""
    device = input_device(model) or torch.device("meta")
    tokens = torch.ones(1, 2, dtype=torch.int64, device=device)
    # Making a mask looks at values, which is impossible without; most take one that is made.
    made = {
        "position_ids": torch.zeros_like(tokens),
        "attention_mask": torch.zeros(1, 1, 2, 2, dtype=torch.float32, device=device),
    }
    for arguments in (made, {}) if device.type == "meta" else ({},):
        try:
            with torch.no_grad():
                model(input_ids=tokens, use_cache=False, **arguments)
        except Exception:
            continue
        return


def _entered(found: dict[str, int], name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
    _note(found, name, next(iter((*args, *kwargs.values())), None))


def _left(
    found: dict[str, int], name: str, row: Component, _: nn.Module, args: Any, output: Any
) -> None:
    _note(found, name, output[row.item] if isinstance(output, tuple | list) else output)


def _note(found: dict[str, int], name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        found[name] = value.shape[-1]


def _shape(width: int | None) -> str:
    return f"[batch, seq, {'?' if width is None else width}]"


def _heads(row: dict[str, Any]) -> str:
    if row["heads"] is None:
        return "-"
    kind = row["kind"].replace("_", "/")
    layout = "" if row["columns"] is None else f", {row['columns']}"
    return f"{row['heads']} {kind}{layout}"
