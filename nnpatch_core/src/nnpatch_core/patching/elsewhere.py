"""Sweeps that run elsewhere: workers stand for the model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, Protocol, TypeVar, runtime_checkable

_P = ParamSpec("_P")
_R = TypeVar("_R")


@runtime_checkable
class Workers(Protocol):
    """Processes that have a model each; they are given in place of one."""

    def swept(self, sweep: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        """The result of a sweep.

        Args:
            sweep: the function that was called.
            given: its arguments by name, but for the model.
        """
        ...


def on_workers(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function`, which takes `Workers` too as its first argument, `nnmodel`."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def swept(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        first: Any = kwargs.get("nnmodel", args[0] if args else None)
        if not isinstance(first, Workers):
            return function(*args, **kwargs)
        given = dict(signature.bind(*args, **kwargs).arguments)
        del given["nnmodel"]
        found: _R = first.swept(swept, given)
        return found

    return swept
