"""Prompts whose first tokens have been run, in pieces: their keys and values are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor

from nnpatch_core._models import module_of
from nnpatch_core._rounding import rounding
from nnpatch_core._upstream import KeysValues, cache_keywords, keep_first, recorded, recording
from nnpatch_core.batch import Batch
from nnpatch_core.errors import EngineError, MemoryBudgetError, PatchingError
from nnpatch_core.tracing.trace import Kept, forward

_Found = TypeVar("_Found")
_TOO_LONG = "prompts do not fit in memory_budget at once, and the model cannot run them in pieces"
#: Tokens of a piece that is run only to be held to its halves.
_SHORT = 32
#: Of so many tokens, one after another, two lie in one piece, which can be held to its halves.
LEAST_HELD = 3
_ADVICE = "raise memory_budget=, or give shorter prompts"
#: Of tokens that others follow no logits are wanted.
_NONE = Kept(1, lambda logits, _: logits[:, -1, :0].to("cpu", torch.float32, copy=True))


@attrs.frozen(eq=False)
class Begun:
    """Prompts that have been run up to a token.

    Args:
        start: the first position that is left.
        keyword: under which the model's forward takes keys and values.
        cache: those of the tokens left of `start`; a forward adds its own.
    """

    start: int
    keyword: str
    cache: Any

    @property
    def given(self) -> dict[str, Any]:
        """The arguments of a forward that goes on, by keyword."""
        return {self.keyword: self.cache}

    @property
    def kept(self) -> list[KeysValues]:
        """The keys and values of each layer."""
        return recorded(self.cache)


def begin(
    nnmodel: Any,
    batch: Batch,
    edges: Sequence[tuple[int, int]],
    n_layers: int,
    store: torch.device | None = None,
) -> Begun:
    """Run the first tokens of some prompts, a piece at a time.

    The first and the last piece that have tokens are run in two halves too. What goes by the tokens
    that run together, or by those right before, may show in either alone.

    Args:
        nnmodel: the model, wrapped by nnsight.
        batch: the prompts.
        edges: the pieces, each from one position up to another.
        n_layers: the model's layers.
        store: where keys and values lie; None is where they are computed.

    Raises:
        MemoryBudgetError: the model does not take keys and values, or is another one in pieces.
    """
    edges, checked = _with_room(batch, _short_at_the_end(edges))
    keyword, cache = "", None
    for number, (start, end) in enumerate(edges):
        piece, middle = _columns(batch, end), checked.get(number)
        if middle is not None:
            read = torch.tensor([middle, end - 1], device="cpu").expand(len(batch), -1)
            run = partial(forward, nnmodel, attrs.evolve(piece, read=read))
        else:
            run = partial(forward, nnmodel, piece, kept=_NONE)
        if cache is None:
            keyword, logits, cache = _first(nnmodel, n_layers, run, store)
        else:
            logits = run(cache={keyword: cache}, start=start)
        if middle is not None:
            whole = [
                None if pair is None else tuple(each[:, :, start:].clone() for each in pair)
                for pair in recorded(cache)
            ]
            # The halves leave as good ones, and there is room for all of them only once.
            keep_first(cache, start)
            half = _columns(batch, middle)
            forward(nnmodel, half, cache={keyword: cache}, start=start, kept=_NONE)
            again = run(cache={keyword: cache}, start=middle)
            _check_kept(whole, recorded(cache), piece.mask[:, start:].bool())
            _hold(logits, again, ~logits.isnan(), "logits")
            # Later pieces need its room.
            del whole
    return Begun(edges[-1][1], keyword, cache)


def _first(
    nnmodel: Any, n_layers: int, run: Callable[..., Tensor], store: torch.device | None
) -> tuple[str, Tensor, Any]:
    """Run the first piece, as `with_cache` does."""
    try:
        return with_cache(nnmodel, n_layers, lambda cache: run(cache=cache), store)
    except EngineError as error:
        raise MemoryBudgetError(f"{_TOO_LONG}, as {error}: {_ADVICE}") from error


def with_cache(
    nnmodel: Any,
    n_layers: int,
    run: Callable[[Mapping[str, Any]], _Found],
    store: torch.device | None = None,
) -> tuple[str, _Found, Any]:
    """Run a model, and find under which keyword it leaves its keys and values.

    Args:
        nnmodel: the model, wrapped by nnsight.
        n_layers: its layers.
        run: runs it with a cache, by keyword.
        store: where keys and values lie; None is where they are computed.

    Returns:
        The keyword, what `run` gives, and the cache.

    Raises:
        EngineError: under none.
    """
    problems = []
    for keyword in cache_keywords(module_of(nnmodel)):
        cache = recording(n_layers, store)
        try:
            found = run({keyword: cache})
        except (PatchingError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            problems.append(f"given {keyword}=, {type(error).__name__}: {error}")
            continue
        if any(pair is not None for pair in recorded(cache)):
            return keyword, found, cache
        problems.append(f"given {keyword}=, it leaves nothing in it")
    raise EngineError(f"the model does not hand out keys and values: {'; '.join(problems)}")


def _columns(batch: Batch, end: int) -> Batch:
    """The first tokens of prompts."""
    return Batch(batch.tokens[:, :end], batch.mask[:, :end])


def _short_at_the_end(edges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same pieces, of which the last is a few tokens: to hold it to its halves costs little.

    Where the keys and values of all tokens are there already, there is no room for more.
    """
    *others, (start, end) = edges
    cut = end - _SHORT
    return [*others, (start, end)] if cut - start < _SHORT else [*others, (start, cut), (cut, end)]


def _with_room(
    batch: Batch, edges: Sequence[tuple[int, int]]
) -> tuple[list[tuple[int, int]], dict[int, int]]:
    """The same pieces, cut where one is held to its halves and is long; and `_checked` of them.

    Its keys and values are there twice then, beside those of the tokens before it: of no more
    tokens than the prompts have, for which there is room.
    """
    edges = list(edges)
    while True:
        checked = _checked(batch, edges)
        held = [number for number in checked if edges[number][1] - edges[number][0] >= 2 * _SHORT]
        number = next((n for n in held if 2 * edges[n][1] - edges[n][0] > batch.seq_len), None)
        if number is None:
            return edges, checked
        start, end = edges[number]
        edges[number : number + 1] = [(start, (start + end) // 2), ((start + end) // 2, end)]


def _checked(batch: Batch, edges: Sequence[tuple[int, int]]) -> dict[int, int]:
    """The first and the last piece, by number, in which a prompt has two tokens; where it is cut.

    Raises:
        MemoryBudgetError: there is none, and still a token that runs before others do.
    """
    real = batch.mask.bool().cpu()
    found = {
        number: start + middle
        for number, (start, end) in enumerate(edges)
        for middle in [_middle(real[:, start:end])]
        if middle
    }
    if not found and bool(real[:, : edges[-1][1]].any()):
        raise MemoryBudgetError(
            f"prompts do not fit in memory_budget at once, and have too few tokens to see whether "
            f"the model can run them in pieces: {_ADVICE}"
        )
    return {number: found[number] for number in (min(found), max(found))} if found else {}


def _middle(real: Tensor) -> int:
    """Where to cut a piece, so that the most prompts have tokens on both sides; 0 if none can."""
    left, right = real.cumsum(1)[:, :-1] > 0, real.flip(1).cumsum(1).flip(1)[:, 1:] > 0
    split = (left & right).sum(0)
    if not bool(split.any()):
        return 0
    best = (split == split.max()).nonzero().flatten() + 1
    return int(best[(best - real.shape[1] // 2).abs().argmin()])


def _check_kept(
    whole: Sequence[tuple[Tensor, ...] | None], halves: Sequence[KeysValues], real: Tensor
) -> None:
    """Raise `MemoryBudgetError` unless two halves leave the keys and values of the whole.

    Args:
        whole: those of a piece that was run at once.
        halves: those of all tokens up to its end, of which it was run in halves.
        real: `[batch, seq]`, of the piece: where there is a token.
    """
    for one, two in zip(whole, halves, strict=True):
        if one is None or two is None:
            continue
        for expected, found in zip(one, two, strict=True):
            own = real.to(expected.device)[:, None, :, None]
            _hold(expected, found[:, :, -real.shape[1] :], own, "keys and values")


def _hold(expected: Tensor, found: Tensor, own: Tensor, what: str) -> None:
    """Raise `MemoryBudgetError` where numbers differ by more than rounding, and are looked at."""
    gap = (expected - found).abs().masked_fill(~own, 0.0).max()
    allowed = rounding(expected) * expected.abs().masked_fill(~own, 0.0).max()
    # A number that is none is no small gap.
    if not bool(gap <= allowed):
        raise MemoryBudgetError(
            f"{_TOO_LONG}, as it then gives other {what} than run at once (off by "
            f"{float(gap):.3g}, where rounding explains {float(allowed):.3g}): {_ADVICE}"
        )


def pieces_differ(model: torch.nn.Module) -> str | None:
    """Why a model cannot be run in pieces, as far as can be told without a run; None if it may."""
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, Mapping) else (kinds,):
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                return f"{name} turns positions by the length of what is run ({kind})"
    return None
