"""A loop of plain torch forward hooks, as one would write it by hand for this one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jobs import Cell
from subject import Prompts, Subject
from torch import Tensor

#: Where in a layer a component is, and whether it is the module's input.
PLACES = {
    "resid": ("", False),
    "attn": ("self_attn", False),
    "mlp": ("mlp", False),
    "q": ("self_attn.q_proj", False),
    "k": ("self_attn.k_proj", False),
    "v": ("self_attn.v_proj", False),
    "o": ("self_attn.o_proj", True),
}


def make(subject: Subject) -> Hooks:
    """Hooks on that model."""
    return Hooks(subject)


class Hooks:
    """One forward for the source's activations, and one for every cell."""

    def __init__(self, subject: Subject) -> None:
        self.model, self.layers = subject.model, subject.layers
        self.head_dim = subject.model.config.head_dim

    @torch.no_grad()
    def sweep(self, prompts: Prompts, cells: Sequence[Cell]) -> list[list[float]]:
        """See `Contestant`."""
        source = self.record(prompts.source, {(cell.component, cell.layer) for cell in cells})
        return [
            prompts.metric(self.patched(prompts.target, cell, source)).tolist() for cell in cells
        ]

    def record(self, tokens: Tensor, places: set[tuple[str, int]]) -> dict[tuple[str, int], Tensor]:
        """The activations of a run."""
        kept: dict[tuple[str, int], Tensor] = {}

        def keep(place: tuple[str, int], activation: Tensor) -> None:
            kept[place] = activation

        handles = [
            self.hook(*place, lambda activation, place=place: keep(place, activation))
            for place in places
        ]
        self.model(tokens, use_cache=False, logits_to_keep=1)
        for handle in handles:
            handle.remove()
        return kept

    def patched(self, tokens: Tensor, cell: Cell, source: dict[tuple[str, int], Tensor]) -> Tensor:
        """The logits at the last token of a run with one cell replaced, `[prompts, vocab]`."""
        donor = source[cell.component, cell.layer]
        first = 0 if cell.head is None else cell.head * self.head_dim
        last = donor.shape[-1] if cell.head is None else first + self.head_dim

        def replace(activation: Tensor) -> Tensor:
            edited = activation.clone()
            edited[:, cell.position, first:last] = donor[:, cell.position, first:last]
            return edited

        handle = self.hook(cell.component, cell.layer, replace)
        try:
            return self.model(tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
        finally:
            handle.remove()

    def hook(self, component: str, layer: int, visit: Any) -> Any:
        """Show an activation to `visit`, which may give another one in its place."""
        path, of_input = PLACES[component]
        module = self.layers[layer].get_submodule(path)

        def before(_: Any, given: tuple) -> tuple | None:
            new = visit(given[0])
            return None if new is None else (new, *given[1:])

        def after(_: Any, __: Any, output: Any) -> Any:
            new = visit(output[0] if isinstance(output, tuple) else output)
            return (new, *output[1:]) if new is not None and isinstance(output, tuple) else new

        if of_input:
            return module.register_forward_pre_hook(before)
        return module.register_forward_hook(after)
