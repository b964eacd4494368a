"""`nnpatch components`: the table of an adapter, laid on a model."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from nnpatch_core._models import input_device
from nnpatch_core._ranges import ranges
from nnpatch_core._tiny import tiny_model
from nnpatch_core.adapters import (
    ModelAPI,
    check_fits,
    heads_of,
    n_layers,
    of_other_type,
    table_of,
)
from nnpatch_core.cli.arguments import AsJson
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


def components(
    name: Annotated[str, typer.Argument(metavar="MODEL_OR_CONFIG", help=MODEL_HELP)],
    *,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="An adapter's name or module:attribute; by default that of the model's type.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> bool:
    """Show where the components of a model are.

    The table of an adapter on it: module paths, shapes and heads of each component. No weights are
    loaded. Where no plugin claims the model's type, the adapter is inferred from a tiny random
    model of that type.
    """
    registry = load_plugins(report=False)
    model = weightless(name, _instead(name, adapter, registry))
    api, inferred = _adapter(adapter, model, registry)
    check_fits(api, model)
    doubt = of_other_type(api, model)
    if doubt:
        say_aside(doubt)
    kinds = _kinds(api, model)
    config: Any = model.config
    if as_json:
        say_json(
            {
                "adapter": api.name,
                "model_type": config.model_type,
                "path": api.layers,
                "layers": n_layers(api, model),
                "kinds": [
                    {"layers": layers, "components": _records(api, model, layers[0])}
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
                record["component"],
                record["module"] or "(the layer)",
                record["side"],
                f"[batch, seq, {'?' if record['width'] is None else record['width']}]",
                _heads(record),
            )
            for record in _records(api, model, layers[0])
        ]
        say_table(("component", "module", "side", "shape", "heads"), rows, "  ")
    if inferred is not None:
        _say_how(inferred, config.model_type)
    return True


def _instead(name: str, adapter: str | None, registry: Registry) -> str:
    """Say what to do about a type that there is no tiny model of."""
    types = [own for entry in registry.adapters for own in entry.value.model_types]
    if adapter is not None or name in types:
        return INSTEAD
    return f"{INSTEAD}; and its adapter with --adapter, as no plugin has one"


def _adapter(
    name: str | None, model: nn.Module, registry: Registry
) -> tuple[ModelAPI, Inferred | None]:
    """Find the adapter by its name or the model's type; say how it was inferred, if it was."""
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
    """Put layers together that have the same table and as many heads."""
    kinds: dict[Any, list[int]] = {}
    for layer in range(n_layers(api, model)):
        heads = heads_of(api, model, layer) if _has_heads(api, model, layer) else None
        counts = None if heads is None else (heads.query, heads.key_value)
        kinds.setdefault((id(table_of(api, model, layer)), counts), []).append(layer)
    return list(kinds.values())


def _has_heads(api: ModelAPI, model: nn.Module, layer: int) -> bool:
    return any(component.heads is not None for component in table_of(api, model, layer).values())


def _records(api: ModelAPI, model: nn.Module, layer: int) -> list[dict[str, Any]]:
    """Describe each component of a layer, as JSON has it."""
    widths = _widths(api, model, layer)
    return [
        {
            "component": name,
            "module": component.module,
            "side": component.side,
            "width": widths.get(name),
            "heads": component.heads and heads_of(api, model, layer).count(component.heads),
            "kind": component.heads,
            "columns": component.columns and repr(component.columns),
        }
        for name, component in table_of(api, model, layer).items()
    ]


def _widths(api: ModelAPI, model: nn.Module, layer: int) -> dict[str, int]:
    """Read the widths off a forward without weights, as far as the model can run so."""
    widths: dict[str, int] = {}
    module = model.get_submodule(api.layers).get_submodule(str(layer))
    hooks = []
    for name, component in table_of(api, model, layer).items():
        place = module.get_submodule(component.module)
        if component.side == "input":
            note = partial(_entered, widths, name)
            hooks.append(place.register_forward_pre_hook(note, with_kwargs=True))
        else:
            hooks.append(place.register_forward_hook(partial(_left, widths, name, component.item)))
    try:
        _run_two_tokens(model)
    finally:
        for hook in hooks:
            hook.remove()
    return widths


def _run_two_tokens(model: nn.Module) -> None:
    """Show the shapes to hooks; without weights not every family gets to the end."""
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


def _entered(widths: dict[str, int], name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
    _left(widths, name, 0, _, args, (*args, *kwargs.values()))


def _left(
    widths: dict[str, int], name: str, item: int, _: nn.Module, args: Any, output: Any
) -> None:
    value = output[item] if isinstance(output, tuple | list) and output else output
    if isinstance(value, Tensor):
        widths[name] = value.shape[-1]


def _heads(record: dict[str, Any]) -> str:
    if record["heads"] is None:
        return "-"
    kind = record["kind"].replace("_", "/")
    layout = "" if record["columns"] is None else f", {record['columns']}"
    return f"{record['heads']} {kind}{layout}"
