"""Checks that all an adapter declares is there, and is as it declares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from nnpatch_core.adapters import component_names, find_component, head_columns, table_of
from nnpatch_core.components import COMPONENT_NAMES
from nnpatch_core.conformance.needs import Needs
from nnpatch_core.conformance.subject import CheckError, Subject
from nnpatch_core.errors import HeadError, LayerError, PatchingError, UnknownNameError
from nnpatch_core.site import Site, check_site, execution_order
from nnpatch_core.sites import Sites

#: What configs call the number of layers.
_LAYER_COUNTS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers")


def check_model_type(subject: Subject) -> None:
    """The adapter claims the model's `config.model_type`."""
    model_type = getattr(getattr(subject.model, "config", None), "model_type", None)
    if model_type not in subject.api.model_types:
        raise CheckError(f"model_type {model_type!r} is not among {subject.api.model_types}")


def check_layers(subject: Subject) -> None:
    """The layers are all the model has; each runs once, and hands its output to the next one."""
    config: Any = subject.model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    counts = {getattr(config, name, None) for name in _LAYER_COUNTS} - {None}
    count = subject.n_layers
    if counts and count not in counts:
        raise CheckError(f"{subject.api.layers!r} has {count} layers, the config says {counts}")
    entered: list[tuple[int, Tensor]] = []
    left: list[tuple[int, Tensor]] = []

    def before(number: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append((number, _first([*args, *kwargs.values()])))

    def after(number: int, _: Any, args: Any, output: Any) -> None:
        left.append((number, _first(output if isinstance(output, tuple | list) else [output])))

    layers = subject.model.get_submodule(subject.api.layers)
    hooks = []
    for number, layer in enumerate(layers.children()):
        hooks.append(layer.register_forward_pre_hook(partial(before, number), with_kwargs=True))
        hooks.append(layer.register_forward_hook(partial(after, number)))
    subject.run_plain(subject.target, hooks)
    order = [number for number, _ in entered]
    if order != list(range(count)):
        raise CheckError(f"the layers run in the order {order}, not each of {count} once")
    for (number, output), (_, following) in zip(left, entered[1:], strict=False):
        if output.shape != following.shape or not output.equal(following):
            raise CheckError(f"what layer {number} gives is not what layer {number + 1} gets")


def _first(values: Any) -> Tensor:
    tensor = next((value for value in values if isinstance(value, Tensor)), None)
    if tensor is None or tensor.ndim != 3:
        shape = None if tensor is None else list(tensor.shape)
        raise CheckError(f"a layer takes and gives [batch, seq, width], got {shape}")
    return tensor


def check_components(subject: Subject) -> None:
    """Each component resolves in each layer, is `[batch, seq, width]`, and splits into its heads.

    The residual stream and what is added to it have one width; q and k, and v and o, have heads of
    one size; two parts of one projection share no column.
    """
    activations = subject.run(subject.target, subject.places).activations
    widths = {place: activation.shape[-1] for place, activation in activations.items()}
    stream = {width for (name, _), width in widths.items() if name in ("resid_pre", "resid")}
    if len(stream) > 1:
        raise CheckError(f"the residual stream is {sorted(stream)} wide")
    for name, layer in subject.places:
        width = widths[name, layer]
        if name in ("attn", "mlp") and stream and width not in stream:
            raise CheckError(
                f"{name} of layer {layer} is {width} wide, the residual stream {stream.pop()}"
            )
    for layer in subject.layers:
        table = table_of(subject.api, subject.model, layer)
        _check_columns(subject, layer, {name: widths[name, layer] for name in table})


def _check_columns(subject: Subject, layer: int, widths: dict[str, int]) -> None:
    columns = {}
    for name, width in widths.items():
        of_heads = head_columns(subject.api, subject.model, layer, name, width)
        if of_heads is not None:
            columns[name] = of_heads
    for pair in (("q", "k"), ("v", "o")):
        sizes = [columns[name].shape[1] for name in pair if name in columns]
        if len(set(sizes)) > 1:
            raise CheckError(
                f"a head of {pair[0]} has {sizes[0]} columns in layer {layer}, one of {pair[1]} "
                f"{sizes[1]}"
            )
    taken: dict[Any, set[int]] = {}
    for name, of_heads in columns.items():
        component = subject.component(name, layer)
        own = set(of_heads.flatten().tolist())
        shared = taken.setdefault((component.module, component.side, component.item), set())
        if shared & own:
            raise CheckError(f"{name} of layer {layer} shares columns with another component")
        shared |= own


def check_execution_order(subject: Subject) -> None:
    """A forward reaches the components in the order of the table, and each of them once."""
    reached: list[tuple[str, int, str]] = []
    hooks = []
    layers = subject.model.get_submodule(subject.api.layers)

    def note(module: str, layer: int, side: str, *_: Any) -> None:
        reached.append((module, layer, side))

    components = {place: subject.component(*place) for place in subject.places}
    for (_, layer), component in components.items():
        module = layers.get_submodule(str(layer)).get_submodule(component.module)
        visit = partial(note, component.module, layer, component.side)
        if component.side == "input":
            hooks.append(module.register_forward_pre_hook(visit))
        else:
            hooks.append(module.register_forward_hook(visit))
    subject.run_plain(subject.target, hooks)
    # Components of one module were noted once each; they are reached together.
    sites = [subject.site(name, layer) for name, layer in components]
    expected = []
    for site in execution_order(sites, subject.nnmodel):
        component = components[site.component, site.layer]
        expected.append((component.module, site.layer, component.side))
    if reached == expected:
        return
    for place in dict.fromkeys(expected):
        if reached.count(place) != expected.count(place):
            times = reached.count(place) // expected.count(place)
            raise CheckError(
                f"{place[0] or 'the layer'!r} of layer {place[1]} runs {times} times in a forward"
            )
    first = next(pair for pair in zip(expected, reached, strict=True) if pair[0] != pair[1])
    raise CheckError(
        f"by the table the {first[0][2]} of {first[0][0]!r} comes next in layer {first[0][1]}, but "
        f"the {first[1][2]} of {first[1][0]!r} does; order the table as a forward runs"
    )


def check_undeclared(subject: Subject) -> None:
    """A component, layer or head that is not there is refused, with the fitting error."""
    api, model = subject.api, subject.model
    declared = component_names(api)
    missing = [name for name in COMPONENT_NAMES if name not in declared]
    for name in [*missing, "no such component"]:
        _refuses(UnknownNameError, partial(Site.get_site, api, name, 0), f"component {name!r}")
        _refuses(
            UnknownNameError,
            partial(Sites(name).grids, subject.nnmodel, api, 4),
            f"component {name!r} of a sweep",
        )
    for name, layer in subject.places:
        outside = Site.get_site(api, name, subject.n_layers)
        _refuses(LayerError, partial(check_site, outside, model), f"layer {outside.layer}")
        component = subject.component(name, layer)
        if component.heads is None:
            _refuses(HeadError, partial(Site.get_site, api, name, layer, 0), f"a head of {name}")
        else:
            count = subject.heads(layer).count(component.heads)
            beyond = Site.get_site(api, name, layer, count)
            _refuses(HeadError, partial(check_site, beyond, model), f"head {count} of {name}")
    for layer in subject.layers:
        lacking = set(declared) - set(table_of(api, model, layer))
        for name in sorted(lacking):
            find_component(api, name)
            site = Site.get_site(api, name, layer)
            _refuses(LayerError, partial(check_site, site, model), f"{name} of layer {layer}")


def _refuses(error: type[PatchingError], call: Callable[[], Any], what: str) -> None:
    try:
        call()
    except error:
        return
    except Exception as wrong:
        raise CheckError(
            f"{what} is refused with {type(wrong).__name__}, not {error.__name__}: {wrong}"
        ) from wrong
    raise CheckError(f"{what} is not refused")


CHECKS: Needs = {
    check_model_type: (),
    check_layers: (),
    check_components: (),
    check_execution_order: (),
    check_undeclared: (),
}
