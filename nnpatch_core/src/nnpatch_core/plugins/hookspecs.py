"""The hooks that a plugin may implement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pluggy
from torch import nn

from nnpatch_core.adapters import ModelAPI
from nnpatch_core.metrics import Metric
from nnpatch_core.seq_pos import PlacedSeqPos, SeqPos

PROJECT = "nnpatch"

hookspec = pluggy.HookspecMarker(PROJECT)
#: Marks a function of a plugin as the implementation of the hook of its name.
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_model_apis(register: Callable[[ModelAPI | type[ModelAPI]], None]) -> None:
    """Add adapters: call `register(adapter)` for each, an instance or a class without arguments."""


@hookspec
def register_seq_pos(
    register: Callable[[str, Callable[..., SeqPos | PlacedSeqPos]], None],
) -> None:
    """Add position strategies: call `register(name, strategy)`; it takes `seq_pos`, or nothing.

    The name of a built-in strategy is refused.
    """


@hookspec
def register_metrics(register: Callable[[str, Callable[..., Any] | Metric], None]) -> None:
    """Add metrics: call `register(name, metric)`; it takes logits, and a context if it wants.

    The name of a built-in metric is refused.
    """


@hookspec(firstresult=True)
def infer_model_api(model: nn.Module, lacks: Callable[[str, str], None]) -> ModelAPI | None:
    """Read an adapter off a model whose type no plugin claims, and check it; None passes it on.

    Call `lacks(component, why)` for each component that it does without.
    """
