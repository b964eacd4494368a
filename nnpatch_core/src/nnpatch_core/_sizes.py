"""Refuses models of absurd sizes while they are built, before they eat time and memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from nnpatch_core.errors import AdapterError

#: What configs call numbers of things, of which there is a list or a module each.
_COUNT = re.compile(
    r"(.*_)?(n|num)_(.*_)?(layers?|blocks?|heads?|experts?)|(.*_)?layers|.*_heads|depths?"
)
#: Far more than any model has.
_MOST_OF_A_KIND, _MOST_MODULES, _WIDEST = 2048, 100_000, 2**24


def check_config(config: Any, where: str = "") -> None:
    """Refuse a config, as read from JSON, that has more layers or heads than any model.

    A config class may make a list with an entry for each layer, so that this comes first.

    Raises:
        AdapterError: naming the setting and its value.
    """
    if not isinstance(config, Mapping):
        return
    for name, value in config.items():
        place = f"{where}{name}"
        check_config(value, f"{place}.")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if _COUNT.fullmatch(str(name)) and value > _MOST_OF_A_KIND:
            raise AdapterError(
                f"the config has {place}={value}, which is no size of a model: at most "
                f"{_MOST_OF_A_KIND} are allowed"
            )


@contextmanager
def bounded() -> Iterator[None]:
    """While it lasts, a model that is built stays within what is possible.

    Raises:
        AdapterError: a weight is too wide, or there are too many modules.
    """
    count = 0

    def counted(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > _MOST_MODULES:
            raise AdapterError(
                f"the config makes a model of more than {_MOST_MODULES} modules, which is too many"
            )

    def measured(module: nn.Module, name: str, weight: nn.Parameter | None) -> None:
        if weight is not None and max(weight.shape, default=0) > _WIDEST:
            raise AdapterError(
                f"the config makes a {type(module).__name__} with a {name} of "
                f"{list(weight.shape)}, which is no size of a model: at most {_WIDEST} are allowed "
                "on each axis"
            )

    hooks = [
        register_module_module_registration_hook(counted),
        register_module_parameter_registration_hook(measured),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
