"""The hooks that change an activation as a model runs.

They are the only functions of nnpatch that change the numbers of a sweep from outside, so that it
counts them among the user's own: see `_upstream.is_known`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from nnpatch_core._models import module_of
from nnpatch_core.adapters import Place
from nnpatch_core.errors import AdapterError, SteeringError
from nnpatch_core.steering.passes import Steered
from nnpatch_core.steering.values import Amount
from nnpatch_core.sweep import space_parts, telling
from nnpatch_core.tracing import columns_of


@attrs.frozen(eq=False)
class Put:
    """An amount at a place.

    Args:
        place: where the activation is.
        head: one head of it, or None for the component as a whole.
        amount: what is put there.
        label: of the site, for errors.
    """

    place: Place
    head: int | None
    amount: Amount
    label: str

    def into(self, activation: Any, steered: Steered) -> Tensor | None:
        """The activation as steered, a copy; None where nothing of it is.

        Args:
            activation: `[rows, tokens, width]`, or `[rows * tokens, width]`.
            steered: the tokens.

        Raises:
            AdapterError: it is no such activation.
            SteeringError: it has other rows than the forward that it belongs to.
        """
        whole, at, prompts = self._rows(activation, steered)
        rows, columns = (each.to(whole.device) for each in at.nonzero().T)
        if not len(rows):
            return None
        own = columns_of(self.place, self.head, whole.shape[-1])
        there = whole[rows, columns]
        which = None if prompts is None else prompts.to(whole.device)[rows]
        changed = whole.clone()
        if own is None:
            changed[rows, columns] = self.amount.put(there, which)
        else:
            own = own.to(whole.device)
            part = self.amount.put(there[:, own], which)
            changed[rows[:, None], columns[:, None], own] = part
        return changed.view(activation.shape)

    def _rows(self, activation: Any, steered: Steered) -> tuple[Tensor, Tensor, Tensor | None]:
        """The activation `[rows, tokens, width]`, where it is steered, and the rows' prompts."""
        rows, tokens = steered.at.shape
        whole = activation
        if isinstance(whole, Tensor) and whole.ndim == 2 and not len(whole) % tokens:
            whole = whole.view(-1, tokens, whole.shape[-1])
        if not isinstance(whole, Tensor) or whole.ndim != 3 or whole.shape[1] != tokens:
            told = list(whole.shape) if isinstance(whole, Tensor) else type(whole).__name__
            raise AdapterError(
                f"site {self.label} must be [batch, seq, width], and is {told} in a run of "
                f"{rows} rows of {tokens} tokens"
            )
        if len(whole) == rows:
            return whole, steered.at, steered.prompts
        alike = steered.columns
        if alike is None:
            raise SteeringError(
                f"site {self.label} has {len(whole)} rows in a run of {rows}, as in "
                "engine='cone', where it is not known which prompt each is of: let a sweep run by "
                "engine='full', or give values and positions that are the same for all prompts"
            )
        return whole, alike.expand(len(whole), -1), None


def steered_by(put: Put, current: Callable[[], Steered], positions: Any) -> RemovableHandle:
    """Hang a hook on the place's module; `remove` takes it away.

    Args:
        put: what is put there.
        current: gives the tokens of the forward that is under way.
        positions: where it is steered, as of a `Site`, by which a checkpoint knows the hook.
    """
    component = put.place.component
    module = module_of(put.place.model).get_submodule(put.place.path.rstrip("."))

    def steered(_: Any, __: Any, output: Any) -> Any:
        several = isinstance(output, tuple | list)
        if several and component.item >= len(output):
            raise AdapterError(
                f"site {put.label} is item {component.item} of {len(output)} that its module gives"
            )
        changed = put.into(output[component.item] if several else output, current())
        if changed is None or not several:
            return changed
        items = list(output)
        items[component.item] = changed
        return type(output)(items)

    def steered_input(_: Any, args: Any, kwargs: Any) -> Any:
        name = None if args else next(iter(kwargs), None)
        if not args and name is None:
            raise AdapterError(f"the module of site {put.label} is called without an input")
        changed = put.into(args[0] if name is None else kwargs[name], current())
        if changed is None:
            return None
        if name is None:
            return (changed, *args[1:]), kwargs
        return args, {**kwargs, name: changed}

    amount = put.amount
    told = (put.label, positions, amount.kind, amount.values, *space_parts(amount.space))
    if component.side == "input":
        telling(steered_input, *told)
        return module.register_forward_pre_hook(steered_input, with_kwargs=True)
    telling(steered, *told)
    return module.register_forward_hook(steered)


def in_backward() -> bool:
    """Whether a graph is being gone through, where a checkpointed layer runs once more."""
    return torch._C._current_graph_task_id() != -1
