"""What a step of learning must compute, by plain torch hooks: shares no code with nnpatch.

Each pair runs alone and unpadded, on a copy of a plain Hugging Face model in float64, and a
position is a number counted from the end of a prompt: 1 is its last token. Where components live is
read off the layouts of family_oracle.py.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.helpers.family_oracle import Layout

Prompt = tuple[int, ...]


class Pair(NamedTuple):
    """A source and a target prompt, with the first token of the answer of each."""

    source: Prompt
    target: Prompt
    answer: int
    other: int


class Where(NamedTuple):
    """A component of a layer, one head of it or (None) all of them."""

    component: str
    layer: int
    head: int | None = None


#: For each pair the positions that are patched, each with the position its value is taken from.
Moves = Sequence[Sequence[tuple[int, int]]]


def reflected(initial: Tensor, raw: Tensor) -> Tensor:
    """The basis `[width, rank]` that numbers below the diagonal of `raw` make of the first one."""
    width, rank = initial.shape
    mixing = mixed(width).to(raw.dtype)
    whole, factor = torch.linalg.qr(mixing.T @ initial, mode="complete")
    turned = torch.eye(width, dtype=raw.dtype)
    for column in range(rank):
        one = torch.eye(width, dtype=raw.dtype)[column]
        vector = one + torch.where(torch.arange(width) > column, raw[:, column], 0.0)
        reflection = torch.eye(width, dtype=raw.dtype)
        reflection = reflection - 2 * torch.outer(vector, vector) / (vector @ vector)
        turned = turned @ reflection
    return mixing @ whole @ turned[:, :rank] * -factor.diagonal().sign()


def mixed(width: int) -> Tensor:
    """`[width, width]`: the coordinates of learning, sums of cosine and sine with random signs."""
    numbers = torch.arange(width, dtype=torch.float64)
    angles = 2 * torch.pi * numbers[:, None] * numbers / width
    drawn = torch.randint(0, 2, (width, 1), generator=torch.Generator().manual_seed(0))
    return (2 * drawn - 1) * (angles.cos() + angles.sin()) / width**0.5


class LearningOracle:
    """Hooks, with gradients, on a copy of `model`."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.model = copy.deepcopy(model).double().eval().requires_grad_(False)
        self.layout = layout
        self._kept: dict[tuple[Prompt, str, int], Tensor] = {}

    def columns(self, where: Where) -> list[int] | None:
        """The columns of a head, or of all of them; None is every column."""
        heads = self.layout.table(where.layer)[where.component].heads
        if heads is None:
            return None
        return (
            [n for head in heads for n in head] if where.head is None else list(heads[where.head])
        )

    def activation(self, prompt: Prompt, where: Where) -> Tensor:
        """`[seq, width]`, of the component as a whole."""
        key = (prompt, where.component, where.layer)
        if key not in self._kept:

            def keep(rows: Tensor) -> Tensor:
                self._kept[key] = rows.clone()
                return rows

            with torch.no_grad():
                self.logits(prompt, where, keep)
        return self._kept[key]

    def logits(self, prompt: Prompt, where: Where | None = None, visit: Any = None) -> Tensor:
        """`[vocab]` at the last token, in float64."""
        hook = None if where is None else self._hook(where, len(prompt), visit)
        try:
            found: Tensor = self.model(input_ids=torch.tensor([prompt]), use_cache=False).logits
        finally:
            if hook is not None:
                hook.remove()
        assert found.dtype == torch.float64
        return found[0, -1]

    def patched(
        self, pair: Pair, where: Where, moves: Sequence[tuple[int, int]], basis: Tensor | None
    ) -> Tensor:
        """`[vocab]`: the target run with coordinates of the source run; no basis is all of it."""
        source = self.activation(pair.source, where)
        columns = self.columns(where)

        def put(rows: Tensor) -> Tensor:
            new = list(rows)
            for to, taken in moves:
                at = len(pair.target) - to
                there, donor = rows[at], source[len(pair.source) - taken]
                chosen = list(range(len(there))) if columns is None else columns
                gap = (donor - there)[chosen]
                moved = gap if basis is None else basis @ (basis.T @ gap)
                whole = torch.zeros_like(there)
                new[at] = there + whole.index_put((torch.tensor(chosen),), moved)
            return torch.stack(new)

        return self.logits(pair.target, where, put)

    def loss(
        self,
        pairs: Sequence[Pair],
        where: Where,
        moves: Moves,
        basis: Tensor | None,
        kl: float = 0.0,
    ) -> tuple[Tensor, list[int]]:
        """The mean loss, and the most likely token of each patched run."""
        losses, tops = [], []
        for pair, own in zip(pairs, moves, strict=True):
            logits = self.patched(pair, where, own, basis)
            loss = logits.logsumexp(0) - logits[pair.answer]
            if kl:
                with torch.no_grad():
                    before = self.logits(pair.target)
                loss = loss + kl * rest(before, logits, (pair.answer, pair.other))
            losses.append(loss)
            tops.append(int(logits.argmax()))
        return torch.stack(losses).mean(), tops

    def _hook(self, where: Where, length: int, visit: Any) -> Any:
        place = self.layout.table(where.layer)[where.component]
        module = self.model.get_submodule(self.layout.layers)[where.layer]
        module = module.get_submodule(place.path)

        def visited(found: Tensor) -> Tensor:
            edited: Tensor = visit(found.reshape(length, -1))
            return edited.view(found.shape)

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


def rest(before: Tensor, after: Tensor, answers: tuple[int, int]) -> Tensor:
    """sum p log(p / q) over the tokens that are neither answer, each renormalised among them."""
    others = [token for token in range(len(before)) if token not in answers]
    p, q = before[others].softmax(0), after[others].softmax(0)
    return (p * (p / q).log()).sum()


@functools.cache
def directions(width: int, rank: int, seed: int) -> Tensor:
    """`[width, rank]`: an orthonormal basis in float64."""
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randn(width, rank, generator=draw, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q
