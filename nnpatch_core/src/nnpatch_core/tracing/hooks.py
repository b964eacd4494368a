"""Hooks on the model that are the user's own: they may tell rows and passes from one another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import nn
from torch.nn.modules import module as of_torch

from nnpatch_core._upstream import forward_of, is_known, is_unseen
from nnpatch_core.adapters import Place
from nnpatch_core.errors import EngineError

#: Where torch keeps a module's hooks, those of all modules, and what they are called.
_Kinds: TypeAlias = Mapping[str, tuple[str, str]]
_FORWARD: _Kinds = {
    "_forward_pre_hooks": ("_global_forward_pre_hooks", "forward pre-hook"),
    "_forward_hooks": ("_global_forward_hooks", "forward hook"),
}
_BACKWARD: _Kinds = {
    "_backward_pre_hooks": ("_global_backward_pre_hooks", "backward pre-hook"),
    "_backward_hooks": ("_global_backward_hooks", "backward hook"),
}


def forward_hooks(model: nn.Module) -> list[str]:
    """The hooks and replaced forwards that are neither ours nor of a library that is known.

    Returns:
        What each is and on which module it is, in words.
    """
    return [words for words, _ in forward_functions(model)]


def forward_functions(model: nn.Module) -> list[tuple[str, Callable[..., Any]]]:
    """The same hooks and forwards, each with the function itself."""
    functions = list(_hooks(model, _FORWARD))
    for path, module in model.named_modules():
        function = forward_of(module)
        if function is not None:
            words = f"the forward {_name(function)} put in place of {_at(path)}'s own"
            functions.append((words, function))
    return functions


def backward_hooks(model: nn.Module) -> list[str]:
    """The same, of hooks that see gradients and may change them."""
    return [words for words, _ in backward_functions(model)]


def backward_functions(model: nn.Module) -> list[tuple[str, Callable[..., Any]]]:
    """The same hooks, each with the function itself."""
    return list(_hooks(model, _BACKWARD))


def in_words(hooks: list[str]) -> str:
    """The first of some hooks, and how many there are besides."""
    return hooks[0] if len(hooks) == 1 else f"{hooks[0]} (and {len(hooks) - 1} more)"


def check_forwards(places: Iterable[Place], model: nn.Module) -> None:
    """Raise `EngineError` where nnsight can neither read nor write an activation.

    Args:
        places: what is patched.
        model: the model.
    """
    paths = {"": model}
    for place in places:
        path = place.path.rstrip(".")
        paths[path] = model.get_submodule(path)
    for path, module in paths.items():
        if is_unseen(module):
            raise EngineError(
                f"the forward of {_at(path)} was replaced after nnsight had wrapped the model, "
                "which a first sweep does too: nnsight does not see it any more; replace it "
                "before the first sweep of a model that was loaded anew, or use a forward hook"
            )


def _hooks(model: nn.Module, kinds: _Kinds) -> Iterator[tuple[str, Callable[..., Any]]]:
    for own, (everywhere, kind) in kinds.items():
        for hook in getattr(of_torch, everywhere).values():
            if not is_known(hook):
                yield f"the {kind} {_name(hook)} on all modules", hook
        for path, module in model.named_modules():
            for hook in getattr(module, own).values():
                if not is_known(hook):
                    yield f"the {kind} {_name(hook)} on {_at(path)}", hook


def _name(function: Callable[..., Any]) -> str:
    while hasattr(function, "func"):
        function = function.func
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"`{name.rpartition('<locals>.')[-1]}`"


def _at(path: str) -> str:
    return repr(path) if path else "the model itself"
