"""Prompts whose first tokens have been run, in pieces: their keys and values are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import attrs
import torch

from nnpatch_core._models import module_of
from nnpatch_core._rounding import rounding
from nnpatch_core._upstream import KeysValues, cache_keywords, recorded, recording
from nnpatch_core.batch import Batch
from nnpatch_core.errors import EngineError, MemoryBudgetError, PatchingError
from nnpatch_core.tracing.trace import Kept, forward

_Found = TypeVar("_Found")
_TOO_LONG = "prompts do not fit in memory_budget at once, and the model cannot run them in pieces"
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


def begin(nnmodel: Any, batch: Batch, edges: Sequence[tuple[int, int]], n_layers: int) -> Begun:
    """Run the first tokens of some prompts, a piece at a time.

    Args:
        nnmodel: the model, wrapped by nnsight.
        batch: the prompts.
        edges: the pieces, each from one position up to another.
        n_layers: the model's layers.

    Raises:
        MemoryBudgetError: the model does not take keys and values, or gives others in pieces.
    """
    (_, end), *others = edges
    first = _columns(batch, end)

    def run(cache: Mapping[str, Any]) -> None:
        forward(nnmodel, first, cache=cache, kept=_NONE)

    try:
        keyword, _, cache = with_cache(nnmodel, n_layers, run)
    except EngineError as error:
        raise MemoryBudgetError(f"{_TOO_LONG}, as {error}: {_ADVICE}") from error
    _check(nnmodel, first, Begun(end, keyword, cache), n_layers)
    for start, end in others:
        forward(nnmodel, _columns(batch, end), cache={keyword: cache}, start=start, kept=_NONE)
    return Begun(end, keyword, cache)


def with_cache(
    nnmodel: Any, n_layers: int, run: Callable[[Mapping[str, Any]], _Found]
) -> tuple[str, _Found, Any]:
    """Run a model, and find under which keyword it leaves its keys and values.

    Args:
        nnmodel: the model, wrapped by nnsight.
        n_layers: its layers.
        run: runs it with a cache, by keyword.

    Returns:
        The keyword, what `run` gives, and the cache.

    Raises:
        EngineError: under none.
    """
    problems = []
    for keyword in cache_keywords(module_of(nnmodel)):
        cache = recording(n_layers)
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


def _check(nnmodel: Any, batch: Batch, whole: Begun, n_layers: int) -> None:
    """Raise `MemoryBudgetError` unless two halves leave the keys and values of the whole.

    Args:
        nnmodel: the model, wrapped by nnsight.
        batch: the prompts, up to the end of their first piece.
        whole: the same, run at once.
        n_layers: the model's layers.
    """
    middle = batch.seq_len // 2
    if not middle:
        return
    cache = recording(n_layers)
    for start, end in ((0, middle), (middle, batch.seq_len)):
        part = _columns(batch, end)
        forward(nnmodel, part, cache={whole.keyword: cache}, start=start, kept=_NONE)
    real = batch.mask.bool()
    for one, two in zip(whole.kept, recorded(cache), strict=True):
        if one is None or two is None:
            continue
        for expected, found in zip(one, two, strict=True):
            own = real.to(expected.device)[:, None, :, None]
            gaps = (expected - found).abs().masked_fill(~own, 0.0)
            allowed = rounding(expected) * expected.abs().masked_fill(~own, 0.0).max()
            if not bool(gaps.max() <= allowed):
                raise MemoryBudgetError(
                    f"{_TOO_LONG}, as it then gives other keys and values than run at once (off by "
                    f"{float(gaps.max()):.3g}, where rounding explains {float(allowed):.3g}): "
                    f"{_ADVICE}"
                )


def pieces_differ(model: torch.nn.Module) -> str | None:
    """Why a model cannot be run in pieces, as far as can be told without a run; None if it may."""
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, Mapping) else (kinds,):
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                return f"{name} turns positions by the length of what is run ({kind})"
    return None
