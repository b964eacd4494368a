"""All that nnpatch uses of nnsight and transformers by name: no other module imports them.

A release that moves or renames something is mended here.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import attrs
import nnsight
import torch
import transformers
from nnsight import NNsight
from nnsight.intervention.envoy import Envoy
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.utils import GenerationMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from nnpatch_core._host_memory import tokens_in_host
from nnpatch_core._wrappers import forward_before

__all__ = [
    "CONFIG_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "BitsAndBytesConfig",
    "Cache",
    "DynamicLayer",
    "Envoy",
    "KeysValues",
    "NNsight",
    "PreTrainedConfig",
    "PreTrainedModel",
    "PreTrainedTokenizerFast",
    "UnderWay",
    "cache_given",
    "cache_keywords",
    "disable_progress_bar",
    "forward_of",
    "has_api_key",
    "is_known",
    "is_packed",
    "is_unseen",
    "kept_tokens",
    "nnsight",
    "noting_inputs",
    "passes_on",
    "recorded",
    "recording",
    "server",
    "transformers",
    "under_way",
    "with_edits",
]

#: Under which keywords a model's forward has taken its keys and values, newest first.
_CACHES = ("cache", "past_key_values")

#: Whose hooks treat each row and token alike: they move, convert, adapt or merely look on.
_KNOWN = (
    "nnpatch_core",
    "nnsight",
    "accelerate",
    "peft",
    "transformers",
    "torch.nn.utils",
    "torch.ao",
    "torch.distributed",
    "kernels",
    "bitsandbytes",
    "torchao",
    "optimum",
    "hqq",
)
#: But for these, which change numbers as the user has asked.
_FOREIGN = ("nnpatch_core.steering.put",)
#: The methods of transformers in which generation runs the prompt, and checks guessed tokens.
_PREFILL, _ASSISTED = "_prefill", "_assisted_decoding"
#: By this a model is told where the prompts are that it runs in one row, one behind the other.
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "block_table", "read_index")
#: Where nnsight keeps, on a module, what it has put its own forward in place of.
_STATE = "__nnsight__"

#: Keys and values of a layer, each `[batch, heads, seq, dim]`; None where it keeps none.
KeysValues: TypeAlias = tuple[Tensor, Tensor] | None


def with_edits(envoy: Envoy, root: Envoy) -> Envoy:
    """A twin of `envoy`, which traces of it run with the lasting edits of `root` too."""
    twin: Envoy = envoy._shallow_copy()
    twin._edits = [*root._edits, *envoy._edits]
    return twin


def server(remote: Any) -> str:
    """The address of the server that `remote=` means to nnsight."""
    return remote if isinstance(remote, str) else str(nnsight.CONFIG.API.HOST)


def has_api_key() -> bool:
    """Whether nnsight has an API key to give to a server."""
    return bool(nnsight.CONFIG.API.APIKEY)


def passes_on(model: nn.Module) -> bool:
    """Whether the model's forward hands keywords that it does not know to what is inside."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def cache_keywords(model: nn.Module) -> tuple[str, ...]:
    """The keywords under which the model's forward may take keys and values, likeliest first.

    Which of them it does is found out by running it: `recorded` then has something. A keyword that
    a forward merely passes on may vanish without a word.
    """
    parameters = inspect.signature(type(model).forward).parameters
    if "input_ids" not in parameters:
        return ()
    own = [name for name in _CACHES if name in parameters]
    own += [
        name
        for name, parameter in parameters.items()
        if name not in own and Cache.__name__ in str(parameter.annotation)
    ]
    return tuple(own)


class _Stored(DynamicLayer):
    """One layer's keys and values, which lie elsewhere than where it runs."""

    def __init__(self, store: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._store = store

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        before: tuple[Any, ...] = ()
        if self.is_initialized:
            before = self.keys, self.values
        else:
            self.lazy_initialization(key_states, value_states)
        keys = [*before[:1], key_states]
        values = [*before[1:], value_states]
        self.keys = tokens_in_host(keys, self._store)
        self.values = tokens_in_host(values, self._store)
        if not before:
            return key_states, value_states
        device = key_states.device
        return (
            torch.cat([each.to(device) for each in keys], dim=-2),
            torch.cat([each.to(device) for each in values], dim=-2),
        )


def recording(n_layers: int, store: torch.device | None = None) -> Cache:
    """A cache that keeps all keys and values of each layer, beyond any sliding window.

    Args:
        n_layers: how many layers.
        store: where they lie but while their layer runs; None is where they are computed.
    """
    layers: list[Any] = [
        DynamicLayer() if store is None else _Stored(store)  # type: ignore[no-untyped-call]
        for _ in range(n_layers)
    ]
    return Cache(layers=layers)


def recorded(cache: Cache) -> list[KeysValues]:
    """Read the keys and values that a forward has left in a `recording` cache."""
    layers: Sequence[Any] = cache.layers
    return [(layer.keys, layer.values) if layer.is_initialized else None for layer in layers]


def keep_first(cache: Cache, count: int) -> None:
    """Let a `recording` cache forget all but the first tokens."""
    layers: Sequence[Any] = cache.layers
    for layer in layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys[:, :, :count], layer.values[:, :, :count]


def cache_given(arguments: Mapping[str, Any]) -> Any:
    """The keys and values that a forward is called with; None if there are none.

    Args:
        arguments: what it is called with, by name.
    """
    caches = (arguments.get(name) for name in _CACHES)
    found = next((cache for cache in caches if cache is not None), None)
    others = (value for value in arguments.values() if isinstance(value, Cache))
    return next(others, None) if found is None else found


def kept_tokens(cache: Any) -> int:
    """How many tokens a cache has keys and values of; 0 where it keeps none, or cannot tell."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError):
        return 0


def is_packed(arguments: Mapping[str, Any]) -> bool:
    """Whether a forward is called with several prompts in one row."""
    return any(arguments.get(name) is not None for name in _PACKED)


@attrs.frozen
class UnderWay:
    """The generation of transformers that a forward belongs to.

    Args:
        prefill: whether it runs the prompt.
        parted: whether the prompt runs in several parts.
        assisted: whether guessed tokens run together with others, to be checked.
    """

    prefill: bool = False
    parted: bool = False
    assisted: bool = False


def under_way() -> UnderWay:
    """Look, inside a forward, at what transformers has called it for."""
    codes = {
        getattr(getattr(GenerationMixin, name, None), "__code__", None): name
        for name in (_PREFILL, _ASSISTED)
    }
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        name = codes.get(frame.f_code)
        if name == _ASSISTED:
            return UnderWay(assisted=True)
        if name == _PREFILL:
            config = frame.f_locals.get("generation_config")
            return UnderWay(True, getattr(config, "prefill_chunk_size", None) is not None)
    return UnderWay()


def is_known(function: Any) -> bool:
    """Whether a hook is of a library whose hooks leave the numbers of a sweep alone."""
    origin = f"{_origin(function)}."

    def of(names: Sequence[str]) -> bool:
        return any(origin.startswith(f"{name}.") for name in names)

    return of(_KNOWN) and not of(_FOREIGN)


def _origin(function: Any) -> str:
    """The module that the code of a callable stands in, whatever it calls itself."""
    while isinstance(function, functools.partial) or inspect.ismethod(function):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    space = getattr(function, "__globals__", None)
    if space is None:
        # A module of torch that serves as a hook is somebody's own doing.
        return "" if isinstance(function, nn.Module) else type(function).__module__
    name = str(space.get("__name__", ""))
    wrapped = getattr(function, "__wrapped__", None)
    # Decorators of torch, such as no_grad(), stand for what they decorate.
    return _origin(wrapped) if wrapped is not None and name.startswith("torch.") else name


def forward_of(module: nn.Module) -> Callable[..., Any] | None:
    """The forward that somebody has given this one module in place of its class's; None if none.

    What nnsight and accelerate put in front of a forward is looked through.
    """
    own: Any = module.__dict__.get("forward")
    state = module.__dict__.get(_STATE)
    if state is not None and not is_unseen(module):
        own = getattr(state, "original", None)
        if own is not type(module).forward and inspect.isfunction(own) and is_known(own):
            # One that was bound already stands in a function of nnsight's own.
            own = inspect.getclosurevars(own).nonlocals.get("forward")
    function: Any
    for function in (own, forward_before(module)):
        plain = getattr(function, "__func__", function)
        if plain is not None and plain is not type(module).forward and not is_known(plain):
            foreign: Callable[..., Any] = function
            return foreign
    return None


@contextmanager
def noting_inputs(module: nn.Module, note: Callable[[Any], None]) -> Iterator[None]:
    """While this holds, tell `note` the first argument of each call of a module, as edited.

    torch's own hooks see an input as it was before an edit inside a trace. So it is noted where
    nnsight hands it on.

    Raises:
        AttributeError: nnsight hands it on in another way than it did.
    """
    state = module.__dict__.get(_STATE)
    if state is None:
        raise AttributeError(f"nnsight has not wrapped {type(module).__name__}")
    body = state.body
    bound = 0 if hasattr(body, "__self__") else 1

    @functools.wraps(body)
    def noting(*args: Any, **kwargs: Any) -> Any:
        given = args[bound:]
        note(given[0] if given else next(iter(kwargs.values())))
        return body(*args, **kwargs)

    state.body = noting
    try:
        yield
    finally:
        state.body = body


def is_unseen(module: nn.Module) -> bool:
    """Whether a module's forward was replaced after nnsight had wrapped it, which is then blind."""
    return _STATE in module.__dict__ and not is_known(module.__dict__.get("forward"))
