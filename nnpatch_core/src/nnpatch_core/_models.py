"""Asks the model itself: for its envoys, vocabulary, device, forward arguments."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import attrs
import torch
from torch import nn

from nnpatch_core._upstream import (
    Envoy,
    NNsight,
    forward_of,
    is_known,
    passes_on,
    server,
    with_edits,
)
from nnpatch_core._workers import TAKES_WORKERS, Workers
from nnpatch_core._wrappers import (
    as_it_was,
    check_weights,
    check_whole,
    execution_device,
    is_compiled,
    looked_through,
    path_inside,
)
from nnpatch_core.batch import Batch
from nnpatch_core.errors import AdapterError, EngineError

_P = ParamSpec("_P")
_R = TypeVar("_R")
#: The mark of a model in use: by which thread, and which model, as a copy has the mark too.
_USER = "_nnpatch_user"


@attrs.frozen(eq=False)
class Elsewhere:
    """A model that runs elsewhere: here it is known by its structure and its name.

    Args:
        nnmodel: nnsight's model of it, of which no weights need be here.
        remote: where it runs, as nnsight takes it: `"local"`, True, or the address of a server.
    """

    nnmodel: Any
    remote: bool | str

    @property
    def away(self) -> bool:
        """Whether that is another process."""
        return self.remote != "local"

    @property
    def module(self) -> nn.Module:
        """The Hugging Face model, perhaps without weights."""
        module: nn.Module = self.nnmodel._module
        return module

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that nnsight has for it, if any."""
        return getattr(self.nnmodel, "tokenizer", None)

    @property
    def where(self) -> str:
        """Where it runs, in words."""
        return server(self.remote) if self.away else "this process, by remote='local'"

    @property
    def key(self) -> str:
        """By which name the server knows it."""
        return str(self.nnmodel.to_model_key())


def as_nnsight(nnmodel: Any) -> Envoy:
    """`nnmodel` as nnsight knows it, and without what PEFT or `torch.compile` has put around it.

    Raises:
        AdapterError: it is no model, or one inside a wrapper that cannot be looked through.
    """
    module = _module(nnmodel)
    # nnsight takes the forwards away by which the parts of such a model work together.
    check_whole(module)
    if not isinstance(nnmodel, Envoy):
        return NNsight(module.get_submodule(_path_inside(module)))
    return _inside(nnmodel)


def module_of(nnmodel: Any) -> nn.Module:
    """The Hugging Face model under `nnmodel`.

    Raises:
        AdapterError: as for `as_nnsight`.
    """
    module = _module(nnmodel)
    return module.get_submodule(_path_inside(module))


def with_weights(nnmodel: Any) -> nn.Module:
    """The Hugging Face model under `nnmodel`, loaded, where that was put off until a first trace.

    Raises:
        AdapterError: it has no weights, or they cannot be loaded.
    """
    if isinstance(nnmodel, Envoy) and not getattr(nnmodel, "dispatched", True):
        try:
            nnmodel.dispatch()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise AdapterError(
                f"{type(nnmodel).__name__} cannot load its weights: {type(error).__name__}: "
                f"{error}. Load the model with AutoModelForCausalLM.from_pretrained, and pass that"
            ) from error
    model = module_of(nnmodel)
    check_weights(model)
    return model


def envoy_of(nnmodel: Any) -> Any:
    """The envoy of the Hugging Face model under `nnmodel`."""
    return follow(nnmodel, path_inside(nnmodel._module))


def _path_inside(module: nn.Module) -> str:
    """`path_inside`, of wrappers that nobody has put anything on."""
    wrappers = looked_through(module)
    for wrapper, _ in wrappers:
        _check_bare(wrapper)
    return ".".join(step for _, step in wrappers)


def _check_bare(wrapper: nn.Module) -> None:
    """Raise `AdapterError` for hooks, or a forward, that only a call of the wrapper itself runs."""
    hooks = [*wrapper._forward_pre_hooks.values(), *wrapper._forward_hooks.values()]
    foreign = next((hook for hook in hooks if not is_known(hook)), None)
    if foreign is None and not is_compiled(wrapper):
        foreign = forward_of(wrapper)
    if foreign is not None:
        name = getattr(foreign, "__qualname__", type(foreign).__qualname__)
        raise AdapterError(
            f"{type(wrapper).__name__} has `{name.rpartition('<locals>.')[-1]}` as a hook or a "
            "forward of its own, which the model inside does not run, and the model inside is what "
            "is patched: put it on that model, or take it away"
        )


def _module(nnmodel: Any) -> nn.Module:
    nnmodel = nnmodel.nnmodel if isinstance(nnmodel, Elsewhere) else nnmodel
    module = nnmodel._module if isinstance(nnmodel, Envoy) else nnmodel
    if isinstance(module, nn.Module):
        return module
    if isinstance(module, Workers):
        hint = f"; {TAKES_WORKERS}, so pass the model itself"
    elif isinstance(module, str):
        hint = "; load it first, by AutoModelForCausalLM.from_pretrained"
    else:
        model = None if isinstance(module, type) else getattr(module, "model", None)
        hint = "; it has a model, so pass its .model" if isinstance(model, nn.Module) else ""
    raise AdapterError(
        "nnmodel must be an NNsight, a TransformersModel or a Hugging Face model, "
        f"got {type(module).__name__}{hint}"
    )


def _inside(nnmodel: Envoy) -> Any:
    path = _path_inside(nnmodel._module)
    if not path:
        return nnmodel
    inside: Any = with_edits(follow(nnmodel, path), nnmodel)
    # What a `TransformersModel` knows besides its model.
    inside.tokenizer = getattr(nnmodel, "tokenizer", None)
    return inside


def follow(root: Any, path: str) -> Any:
    """The envoy at a dotted path below `root`."""
    envoy = root
    for part in path.split("."):
        if part.isdigit():
            envoy = envoy[int(part)]
        elif part:
            envoy = getattr(envoy, _attribute(part))
    return envoy


def attribute_path(path: str) -> str:
    """A module's dotted path as nnsight's attributes lead there."""
    return ".".join(_attribute(part) for part in path.split(".") if part)


def _attribute(part: str) -> str:
    """Give nnsight's name of a child: one named like a value that it serves has a prefix."""
    owner = next((cls for cls in Envoy.__mro__ if part in vars(cls)), None)
    taken = owner is not None and inspect.isdatadescriptor(vars(owner)[part])
    return f"{Envoy.OVERLOAD_PREFIX}{part}" if taken else part


def _embedding(model: Any) -> Any:
    return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None


def vocab_size(model: nn.Module) -> int | None:
    """Count the token ids of the model's embedding, if it says."""
    embedding = _embedding(model)
    own = as_it_was(embedding) if isinstance(embedding, nn.Module) else embedding
    count = getattr(own, "num_embeddings", None)
    return int(count) if isinstance(count, int) else None


def most_tokens(model: nn.Module) -> int | None:
    """Say how many tokens a prompt may have, where the model has a table of positions; else None.

    That is an embedding of positions beside that of tokens, as GPT-2 and OPT have, or a table of
    sines that is made once, as GPT-J and CTRL have. Models that compute their positions as they
    run have no such end.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions"))
    limit = next((limit for limit in limits if isinstance(limit, int)), None)
    if limit is None:
        return None
    embedding = _embedding(model)
    for module in model.modules():
        children = list(module.children())
        beside = [child for child in children if child is not embedding]
        # Only there, for what sees pictures has places of its own.
        sizes = [_embeddings(child) for child in beside] if len(beside) < len(children) else []
        # OPT and what is made after it leave the first two rows out.
        if limit in sizes or limit + 2 in sizes:
            return limit
        tables = (getattr(module, name, None) for name in ("embed_positions", "pos_encoding"))
        if any(isinstance(table, torch.Tensor) and len(table) == limit for table in tables):
            return limit
    return None


def _embeddings(module: nn.Module) -> int | None:
    own = as_it_was(module)
    return own.num_embeddings if isinstance(own, nn.Embedding) else None


def pad_id(nnmodel: Any, model: nn.Module) -> int | None:
    """The padding token of the tokenizer or the config, if there is one."""
    tokenizer = getattr(nnmodel, "tokenizer", None)
    config: Any = getattr(model, "config", None)
    # A model that sees pictures too keeps it with what it says of its text.
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    for owner in (tokenizer, config, text):
        token = getattr(owner, "pad_token_id", None)
        if isinstance(token, int) and token >= 0:
            return token
    return None


def input_device(model: nn.Module) -> torch.device | None:
    """Find the device on which the model wants its tokens; None if it does not say.

    An embedding that is moved in as it is needed wants them where it then is.
    """
    embedding = _embedding(model)
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    return execution_device(embedding) if weight.is_meta else weight.device


def runs_on_meta(model: nn.Module) -> bool:
    """Whether nnsight would move a trace's inputs to where there are no numbers."""
    weight = next(model.parameters(), None)
    return weight is not None and weight.is_meta


def forward_arguments(
    model: nn.Module, batch: Batch, cache: Mapping[str, Any] | None = None, start: int = 0
) -> dict[str, Any]:
    """The keyword arguments of one forward on `batch`, of those that the model takes by name.

    A wrapper that passes everything on is given all that every Hugging Face model understands.

    Args:
        model: the model.
        batch: the prompts.
        cache: what it takes keys and values from, by the keyword under which it does.
        start: the first position that is run; the cache has those left of it.
    """
    names = inspect.signature(type(model).forward).parameters
    wrapper = "input_ids" not in names
    offered = {
        "position_ids": batch.position_ids[:, start:],
        "use_cache": cache is not None,
        "logits_to_keep": 1,
    }
    # Some take `use_cache` among the keywords that they pass on to what is inside.
    passed = {"use_cache"} if wrapper or passes_on(model) else set()
    arguments = {
        name: value
        for name, value in offered.items()
        if name in names or name in passed or (wrapper and name != "logits_to_keep")
    }
    return {
        "input_ids": batch.tokens[:, start:],
        "attention_mask": batch.mask,
        **arguments,
        **(cache or {}),
    }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off; afterwards each module's training flag is as it was."""
    switched = [module for module in model.modules() if module.training]
    for module in switched:
        module.training = False
    try:
        yield
    finally:
        for module in switched:
            module.training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Ask for no gradient of a weight; afterwards each weight's flag is as it was."""
    # By name: a weight that is moved in as it is needed is another tensor then.
    asked = [
        (module, name)
        for module in model.modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.requires_grad
    ]
    _ask(asked, False)
    try:
        yield
    finally:
        _ask(asked, True)


def _ask(named: Iterable[tuple[nn.Module, str]], flag: bool) -> None:
    for module, name in named:
        weight = module._parameters.get(name)
        if weight is not None:
            weight.requires_grad = flag


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Nobody else uses the model: a call inside of one in the same thread may.

    Raises:
        EngineError: another thread does.
    """
    mine = (threading.get_ident(), id(model))
    state: dict[str, Any] = model.__dict__
    stale = state.get(_USER, mine)[1] != id(model)  # that of a model that this is a copy of
    if stale:
        del state[_USER]
    inner = state.get(_USER) == mine
    # One step, so that of two threads one comes first.
    if state.setdefault(_USER, mine) != mine:
        raise EngineError(
            f"another thread is using this {type(model).__name__}: nnpatch and nnsight let one "
            "thread at a time use a model; run the calls one after the other, or give each thread "
            "a model of its own"
        )
    try:
        yield
    finally:
        if not inner:
            del state[_USER]


def in_one_thread(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function`, which holds its argument `nnmodel` as `alone` does."""
    place = list(inspect.signature(function).parameters).index("nnmodel")

    @functools.wraps(function)
    def held(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        nnmodel: Any = kwargs.get("nnmodel", args[place] if len(args) > place else None)
        if not isinstance(nnmodel, Envoy | nn.Module):  # the function knows what to say of it
            return function(*args, **kwargs)
        with alone(module_of(nnmodel)):
            return function(*args, **kwargs)

    return held
