"""What a steered model must generate, by plain torch hooks: shares no code with nnpatch.

Each prompt runs alone and unpadded, on a copy of the model, and greedily: all of its tokens again
for each that is generated, without a cache. A position is a number counted from the end of the
prompt: 1 is its last token, and stands for each that is generated too.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.helpers.family_oracle import Layout

#: What becomes of activations `[tokens, columns]`.
Change = Callable[[Tensor], Tensor]


class Steered(NamedTuple):
    """A component of a layer, a head of it or (None) all, positions from the end or (None) all."""

    component: str
    layer: int
    head: int | None
    backs: tuple[int, ...] | None
    change: Change


def in_span(basis: Tensor, mean: Tensor | None, new: Callable[[Tensor], Tensor]) -> Change:
    """The coordinates in the span of a basis `[width, rank]` become `new` of what they were."""

    def change(x: Tensor) -> Tensor:
        wide = x.double()
        middle = torch.zeros(len(basis), dtype=torch.float64) if mean is None else mean.double()
        old = torch.einsum("tw,wr->tr", wide - middle, basis.double())
        moved = new(old) - old
        return (wide + torch.einsum("tr,wr->tw", moved, basis.double())).to(x.dtype)

    return change


class SteeringOracle:
    """Plain hooks on a copy of `model`."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.model = copy.deepcopy(model).eval()
        self.layout = layout

    def generate(
        self, prompt: Sequence[int], count: int, steered: Sequence[Steered] = ()
    ) -> tuple[list[int], Tensor]:
        """The tokens that follow a prompt, and the logits `[count, vocab]` that each is read of."""
        tokens, seen = list(prompt), []
        for _ in range(count):
            seen.append(self.logits(tokens, len(prompt), steered)[-1])
            tokens.append(int(seen[-1].argmax()))
        return tokens[len(prompt) :], torch.stack(seen)

    def logits(self, tokens: Sequence[int], prompt: int, steered: Sequence[Steered] = ()) -> Tensor:
        """`[seq, vocab]` of one forward; the first `prompt` tokens are the prompt's."""
        hooks = [self._hook(each, len(tokens), prompt) for each in steered]
        try:
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return logits[0].float()

    def _hook(self, steered: Steered, length: int, prompt: int) -> Any:
        place = self.layout.table(steered.layer)[steered.component]
        layers = self.model.get_submodule(self.layout.layers)
        module = layers[steered.layer].get_submodule(place.path)
        if steered.backs is None:
            rows = list(range(length))
        else:
            rows = [prompt - back for back in steered.backs]
            rows += range(prompt, length) if 1 in steered.backs else []
        visited = functools.partial(_changed, steered, place.heads, length, rows)

        def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple:
            if args:
                return (visited(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": visited(kwargs["hidden_states"])}

        def after(_: nn.Module, args: tuple, output: Any) -> Any:
            if isinstance(output, tuple):
                return (visited(output[0]), *output[1:])
            return visited(output)

        if place.side == "input":
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)


def _changed(steered: Steered, heads: Any, length: int, rows: list[int], found: Tensor) -> Tensor:
    edited = found.clone()
    flat = edited.view(length, -1)
    columns = list(range(flat.shape[1]))
    if heads is not None:
        columns = (
            list(itertools.chain(*heads)) if steered.head is None else list(heads[steered.head])
        )
    for row in rows:
        flat[row, columns] = steered.change(flat[row : row + 1, columns])[0]
    return edited
