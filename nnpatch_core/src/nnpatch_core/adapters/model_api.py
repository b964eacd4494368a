"""The adapter protocol: what nnpatch must know of a model family, as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import attrs

from nnpatch_core.adapters.components import Component
from nnpatch_core.adapters.heads import HeadColumns, HeadKind, Projection
from nnpatch_core.components import canonical_name
from nnpatch_core.errors import AdapterError

#: Component name to where it lives in a layer, in execution order.
Table: TypeAlias = Mapping[str, Component]
#: Where a number of heads comes from: a config's attribute (an int, or one for each layer), the
#: number itself, or a function of the text config and the layer.
HeadCount: TypeAlias = str | int | Callable[[Any, int], int]
Residual: TypeAlias = Literal["sum", "scaled"]


@runtime_checkable
class ModelAPI(Protocol):
    """An adapter: where the components of one model family live.

    `DecoderAPI` is the table that fits most families; any object with these members will do. It
    may also have `kinds`, `residual`, `padding` and `cone`, with the meaning that `DecoderAPI`
    gives them.
    """

    @property
    def name(self) -> str:
        """The name under which the adapter is registered."""
        ...

    @property
    def model_types(self) -> tuple[str, ...]:
        """The values of a Hugging Face config's `model_type` that the adapter is for."""
        ...

    @property
    def layers(self) -> str:
        """Dotted path from the model to its list of layers."""
        ...

    @property
    def components(self) -> Table:
        """Component name to where it lives in a layer, in execution order."""
        ...

    def n_heads(self, config: Any, kind: HeadKind, layer: int) -> int:
        """How many heads of that kind a layer of a model with this config has."""
        ...


def _model_types(values: Iterable[str]) -> tuple[str, ...]:
    # A single string would be taken for its letters.
    types = () if isinstance(values, str) else tuple(values)
    if not types or not all(isinstance(value, str) for value in types):
        raise AdapterError(f"model_types must be a tuple of strings, got {values!r}")
    return types


def _table(components: Table) -> Table:
    for name, component in components.items():
        if not isinstance(name, str) or not isinstance(component, Component):
            raise AdapterError(
                f"components maps names to Component objects, got {name!r}: {component!r}"
            )
    return MappingProxyType({canonical_name(name): row for name, row in components.items()})


def _tables(kinds: Mapping[str, Table]) -> Mapping[str, Table]:
    if not isinstance(kinds, Mapping) or not all(isinstance(path, str) for path in kinds):
        raise AdapterError(f"kinds maps a module's path to a table of components, got {kinds!r}")
    return MappingProxyType({path: _table(table) for path, table in kinds.items()})


@attrs.frozen(eq=False)
class DecoderAPI:
    """An adapter as a table, for decoders whose config names the numbers of heads.

    Args:
        name: the name to register; must be unique among the installed plugins.
        model_types: which `config.model_type` values it is for.
        components: component name to `Component`, in execution order.
        layers: dotted path from the model to its list of layers.
        query_heads: the number of query heads: the config's attribute that has it (one number, or
            a list with one for each layer), the number itself, or a function of the model's text
            config and the layer.
        key_value_heads: the number of key/value heads, in the same ways; where a config lacks the
            attribute, the family has as many as query heads.
        kinds: for a family whose layers differ: the path of a module to the whole table of the
            layers that have it, in place of `components`.
        residual: `"sum"` where a layer gives `resid_pre + attn + mlp`; `"scaled"` where each of
            the three is multiplied by a number first; None where it does something else.
        padding: whether a masked token leaves the others alone. Where it does not, prompts of
            different lengths are refused.
        cone: whether the models can be run from the middle of a prompt on, given the keys and
            values of what stands before; those with a recurrent state cannot. Where it is false,
            sweeps run in the full engine.

    Examples:
        >>> api = DecoderAPI("Tiny", ("tiny",), {"mlp": Component("mlp")})
        >>> api.layers, list(api.components)
        ('model.layers', ['mlp'])
    """

    name: str = attrs.field(validator=attrs.validators.instance_of(str))
    model_types: tuple[str, ...] = attrs.field(converter=_model_types)
    components: Table = attrs.field(converter=_table)
    layers: str = "model.layers"
    query_heads: HeadCount = "num_attention_heads"
    key_value_heads: HeadCount = "num_key_value_heads"
    kinds: Mapping[str, Table] = attrs.field(factory=dict, converter=_tables, kw_only=True)
    residual: Residual | None = attrs.field(
        default="sum", kw_only=True, validator=attrs.validators.in_(("sum", "scaled", None))
    )
    padding: bool = attrs.field(
        default=True, kw_only=True, validator=attrs.validators.instance_of(bool)
    )
    cone: bool = attrs.field(
        default=True, kw_only=True, validator=attrs.validators.instance_of(bool)
    )

    @kinds.validator
    def _same_heads(self, _: Any, kinds: Mapping[str, Table]) -> None:
        # An outcome has one axis of heads for a component, whatever the layer.
        for table in kinds.values():
            for name, row in table.items():
                other = self.components.get(name, row)
                if other.heads != row.heads:
                    raise AdapterError(
                        f"component {name!r} of adapter {self.name!r} must have the same kind of "
                        f"heads in every layer, got {other.heads!r} and {row.heads!r}"
                    )

    def n_heads(self, config: Any, kind: HeadKind, layer: int = 0) -> int:
        """How many heads of that kind a layer has.

        Raises:
            AdapterError: the config does not say.
        """
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        given = self.query_heads if kind == "query" else self.key_value_heads
        if isinstance(given, str) and kind == "key_value" and getattr(config, given, None) is None:
            given = self.query_heads
        count = getattr(config, given, None) if isinstance(given, str) else given
        if isinstance(count, list | tuple):
            count = count[layer] if layer < len(count) else None
        elif callable(count):
            count = count(config, layer)
        if not isinstance(count, int) or count < 1:
            where = f"config.{given}" if isinstance(given, str) else f"{given!r}"
            raise AdapterError(
                f"adapter {self.name!r} reads the number of heads from {where}, which "
                f"is {count!r} in this model (model_type {config.model_type!r})"
            )
        return count


def separate_projections(
    attention: str = "self_attn",
    *,
    q: str = "q_proj",
    k: str = "k_proj",
    v: str = "v_proj",
    o: str = "o_proj",
) -> dict[str, Component]:
    """The rows `q`, `k`, `v` and `o` of a family with one module for each projection.

    `q`, `k`, `v` are the projections' outputs before any rotary embedding; `o` is the *input* of
    the output projection, which is what each query head hands to it.

    Args:
        attention: path of the module that has the four.
        q: its child that projects to queries.
        k: to keys.
        v: to values.
        o: from the heads back to the residual stream.

    Examples:
        >>> separate_projections(o="dense")["o"]
        Component(module='self_attn.dense', side='input', heads='query', item=0, columns=None)
    """
    return {
        "q": Component(f"{attention}.{q}", heads="query"),
        "k": Component(f"{attention}.{k}", heads="key_value"),
        "v": Component(f"{attention}.{v}", heads="key_value"),
        "o": Component(f"{attention}.{o}", "input", heads="query"),
    }


def fused_projections(
    qkv: str, o: str, layout: Callable[[Projection], HeadColumns]
) -> dict[str, Component]:
    """The rows `q`, `k`, `v` and `o` of a family with one module that projects to all three.

    Args:
        qkv: path of that module.
        o: path of the module that projects from the heads back to the residual stream.
        layout: `Fused` or `Interleaved`, or a function of yours from `"q"`, `"k"` or `"v"` to the
            columns of its heads.

    Examples:
        >>> from nnpatch_core import Fused
        >>> fused_projections("attn.c_attn", "attn.c_proj", Fused)["k"].columns
        Fused(part='k')
    """
    return {
        "q": Component(qkv, heads="query", columns=layout("q")),
        "k": Component(qkv, heads="key_value", columns=layout("k")),
        "v": Component(qkv, heads="key_value", columns=layout("v")),
        "o": Component(o, "input", heads="query"),
    }


def decoder_components(
    *, attn: str = "self_attn", mlp: str = "mlp", heads: Table | None = None
) -> dict[str, Component]:
    """The whole table of a decoder, by default one laid out like Llama.

    Args:
        attn: path of the module whose output attention adds to the residual stream.
        mlp: path of the module whose output the MLP adds to the residual stream. A family with
            norms after its blocks names those norms here.
        heads: the rows of q, k, v and o: `separate_projections(...)`, which is the default, or
            `fused_projections(...)`; an empty table if there are none.

    Examples:
        >>> list(decoder_components())
        ['resid_pre', 'q', 'k', 'v', 'o', 'attn', 'mlp', 'resid']
        >>> list(decoder_components(attn="mixer", heads={}))
        ['resid_pre', 'attn', 'mlp', 'resid']
    """
    return {
        "resid_pre": Component("", "input"),
        **(separate_projections() if heads is None else heads),
        "attn": Component(attn),
        "mlp": Component(mlp),
        "resid": Component(""),
    }
