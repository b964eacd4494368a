"""What patching must give, by plain torch hooks: this file shares no code with nnpatch.

Each prompt runs alone and unpadded, in one whole forward for every cell, on a copy of a plain
Hugging Face model. A position is a number counted from the end of a prompt: 1 is its last token.
So prompts of different lengths line up on the right, and a prompt that is too short for a position
is not patched there.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Prompt = tuple[int, ...]
#: Given a place and a position counted from the end, the vector to put there, or None for nothing.
Donor = Callable[["Place", int], "Tensor | None"]

COMPONENTS = ("resid_pre", "q", "k", "v", "o", "attn", "mlp", "resid")

_LLAMA = {
    "resid_pre": ("", "input"),
    "q": ("self_attn.q_proj", "output"),
    "k": ("self_attn.k_proj", "output"),
    "v": ("self_attn.v_proj", "output"),
    "o": ("self_attn.o_proj", "input"),
    "attn": ("self_attn", "output"),
    "mlp": ("mlp", "output"),
    "resid": ("", "output"),
}
_POST_NORMS = {
    **_LLAMA,
    "attn": ("post_attention_layernorm", "output"),
    "mlp": ("post_feedforward_layernorm", "output"),
}
#: Where the components live in a decoder layer of each family.
TABLES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _POST_NORMS,
    "gemma3_text": _POST_NORMS,
}


class Part:
    """What of a vector is replaced: all that a matrix `[width, width]` projects onto.

    nnpatch never makes such a matrix.
    """

    def __init__(self, projector: Tensor) -> None:
        self.projector = projector.double()

    def of(self, vector: Tensor) -> Tensor:
        return (vector.double() @ self.projector).to(vector.dtype)

    @functools.cache  # noqa: B019
    def of_each(self, heads: int) -> Part:
        """The same part of each of so many heads."""
        return Part(torch.block_diag(*[self.projector] * heads))


@functools.cache
def part_spanned(space: Any) -> Part | None:
    """What the columns of a basis span; they need not be orthonormal."""
    if space is None:
        return None
    basis = space.basis.double()
    return Part(basis @ torch.linalg.pinv(basis))


class Place(NamedTuple):
    """One component of one layer, one head of it or (None) all, at positions from the end.

    Or only a part of what stands there.
    """

    component: str
    layer: int
    head: int | None = None
    from_end: tuple[int, ...] = ()
    only: Part | None = None


class Oracle:
    """Plain hooks on a copy of `model`, which may go on to be wrapped, moved or offloaded."""

    def __init__(self, model: nn.Module, family: str) -> None:
        self.model = copy.deepcopy(model)
        for module in self.model.modules():
            module.training = False
        self.table = TABLES[family]
        config = self.model.config
        self.n_layers = config.num_hidden_layers
        self._heads = {
            "q": config.num_attention_heads,
            "o": config.num_attention_heads,
            "k": config.num_key_value_heads,
            "v": config.num_key_value_heads,
        }
        self._runs: dict[Prompt, tuple[Tensor, dict[tuple[str, int], Tensor]]] = {}
        self._patched: dict[tuple[Prompt, Prompt, tuple[Place, ...]], Tensor] = {}

    def heads(self, component: str) -> list[int] | list[None]:
        """Each head of a component that has heads, else one None."""
        return list(range(self._heads[component])) if component in self._heads else [None]

    def logits(self, prompt: Prompt) -> Tensor:
        """`[vocab]` at the prompt's last token."""
        return self._run(prompt)[0]

    def logits_at_each(self, prompt: Prompt) -> Tensor:
        """`[seq, vocab]` at every token of a prompt."""
        return self._at_each(prompt, [])

    def activation(self, prompt: Prompt, component: str, layer: int) -> Tensor:
        """`[seq, width]`, of every head."""
        return self._run(prompt)[1][component, layer]

    def part(self, activation: Tensor, place: Place) -> Tensor:
        """A head's columns of `[..., width]`, or all of them."""
        if place.head is None:
            return activation
        dim = activation.shape[-1] // self._heads[place.component]
        return activation[..., place.head * dim : (place.head + 1) * dim]

    def patched(self, target: Prompt, source: Prompt, *places: Place) -> Tensor:
        """`[vocab]`: `target` with what `source` has at the places, all in one forward."""
        key = (target, source, places)
        if key not in self._patched:
            self._patched[key] = self.replaced(target, places, self.of_prompt(source))
        return self._patched[key]

    def replaced(self, target: Prompt, places: Iterable[Place], donor: Donor) -> Tensor:
        """`[vocab]`: `target` with what `donor` gives at the places, all in one forward."""
        return self._forward(target, self._replacing(target, places, donor))

    def replaced_at_each(self, target: Prompt, places: Iterable[Place], donor: Donor) -> Tensor:
        """`[seq, vocab]`: the same at every token."""
        return self._at_each(target, self._replacing(target, places, donor))

    def read_when_replaced(
        self, target: Prompt, places: Iterable[Place], donor: Donor, read: Place
    ) -> Tensor:
        """`[seq, width]`: what stands at another place, or the same, in such a run."""
        return self.all_when_replaced(target, places, donor, [read])[1][0]

    def all_when_replaced(
        self, target: Prompt, places: Iterable[Place], donor: Donor, reads: Sequence[Place]
    ) -> tuple[Tensor, list[Tensor]]:
        """The logits `[seq, vocab]` of such a run, and `[seq, width]` of each place read."""
        kept: dict[tuple[str, int], Tensor] = {}
        hooks = self._replacing(target, places, donor)
        # After what replaces, so that they see that.
        hooks += [self._hook(each._replace(head=None), self._reader(each, kept)) for each in reads]
        logits = self._at_each(target, hooks)
        return logits, [self.part(kept[each.component, each.layer], each) for each in reads]

    def _replacing(
        self, target: Prompt, places: Iterable[Place], donor: Donor
    ) -> list[Callable[[], None]]:
        # All before the first hook: a donor may run the model, which must be as it is.
        found = []
        for place in places:
            vectors = {
                len(target) - back: vector
                for back in place.from_end
                if back <= len(target) and (vector := donor(place, back)) is not None
            }
            found.append((place, vectors))
        return [self._hook(place, self._writer(place, vectors)) for place, vectors in found]

    def of_prompt(self, source: Prompt) -> Donor:
        """What another prompt has at the same position from the end."""

        def donor(place: Place, back: int) -> Tensor | None:
            if back > len(source):
                return None
            found = self.activation(source, place.component, place.layer)
            return self.part(found[len(source) - back], place)

        return donor

    def zeros(self, place: Place, back: int) -> Tensor:
        """Zeros, which broadcast."""
        return torch.zeros(1)

    def mean(self, prompts: Sequence[Prompt]) -> Donor:
        """The mean over every token of the prompts."""

        def donor(place: Place, back: int) -> Tensor:
            found = [self.activation(each, place.component, place.layer) for each in prompts]
            return self.part(torch.cat(found).double().mean(0), place)

        return donor

    def mean_per_position(self, prompts: Sequence[Prompt]) -> Donor:
        """The mean over the prompts that are long enough, each position from the end apart."""

        def donor(place: Place, back: int) -> Tensor | None:
            found = [
                self.activation(each, place.component, place.layer)[len(each) - back]
                for each in prompts
                if back <= len(each)
            ]
            return self.part(torch.stack(found).double().mean(0), place) if found else None

        return donor

    def _run(self, prompt: Prompt) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
        if prompt not in self._runs:
            kept: dict[tuple[str, int], Tensor] = {}
            hooks = []
            for layer in range(self.n_layers):
                for component in self.table:
                    place = Place(component, layer)
                    hooks.append(self._hook(place, self._reader(place, kept)))
            logits = self._forward(prompt, hooks)
            self._runs[prompt] = (logits, kept)
        return self._runs[prompt]

    def _forward(self, prompt: Prompt, hooks: list[Callable[[], None]]) -> Tensor:
        return self._at_each(prompt, hooks)[-1]

    def _at_each(self, prompt: Prompt, hooks: list[Callable[[], None]]) -> Tensor:
        try:
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([prompt]), use_cache=False).logits
        finally:
            for remove in hooks:
                remove()
        return logits[0].float()

    def _hook(self, place: Place, visit: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """Let `visit` read or replace the activation `[1, seq, width]`; gives what undoes it."""
        path, side = self.table[place.component]
        module = self.model.model.layers[place.layer].get_submodule(path)

        def before(_: nn.Module, args: tuple) -> tuple:
            return (visit(args[0]), *args[1:])

        def after(_: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
            if isinstance(output, tuple):
                return (visit(output[0]), *output[1:])
            return visit(output)

        if side == "input":
            return module.register_forward_pre_hook(before).remove
        return module.register_forward_hook(after).remove

    def _reader(
        self, place: Place, kept: dict[tuple[str, int], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        def read(activation: Tensor) -> Tensor:
            kept[place.component, place.layer] = activation[0].clone()
            return activation

        return read

    def _writer(self, place: Place, vectors: Mapping[int, Tensor]) -> Callable[[Tensor], Tensor]:
        def write(activation: Tensor) -> Tensor:
            edited = activation.clone()
            for index, vector in vectors.items():
                there = self.part(edited[0, index], place)
                new = vector.to(edited.dtype)
                if place.only is not None:
                    new = there + place.only.of(new - there)
                there[:] = new
            return edited

        return write


def random_prompts(lengths: Iterable[int], seed: int) -> list[Prompt]:
    """Prompts of random tokens, none of which is a special one."""
    draw = random.Random(seed)
    return [tuple(draw.randrange(3, 64) for _ in range(length)) for length in lengths]


def lay_out(
    prompts: Sequence[Prompt], how: str, width: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Prompts in one batch: tokens and mask, `[batch, width]`.

    Padding, if there is any, stands on the `"left"`, on the `"right"`, on a side that differs from
    row to row (`"mixed"`) or anywhere, between tokens too (`"holes"`). It holds arbitrary tokens,
    so that whatever looks at it will be noticed.
    """
    draw = random.Random(seed)
    width = width or max(map(len, prompts))
    tokens = torch.tensor([[draw.randrange(3, 64) for _ in range(width)] for _ in prompts])
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        spare = width - len(prompt)
        if how == "holes":
            slots = sorted(draw.sample(range(width), len(prompt)))
        else:
            side = ("both", "right", "left")[row % 3] if how == "mixed" else how
            start = {"left": spare, "right": 0, "both": spare // 2, "unpadded": 0}[side]
            slots = list(range(start, start + len(prompt)))
        tokens[row, slots] = torch.tensor(prompt)
        mask[row, slots] = 1
    return tokens, mask
