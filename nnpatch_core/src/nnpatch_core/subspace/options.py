"""How a subspace is learned: the arguments of `train_subspace`, checked."""

from __future__ import annotations

import math
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._integers import strict_int, strict_ints, strict_seed
from nnpatch_core._printable import shown
from nnpatch_core._warnings import warn
from nnpatch_core.errors import PromptWarning, SubspaceError

#: More steps, pairs or directions than there can be.
_MOST = 2**31


def _number(name: str, value: Any, least: float, most: float = math.inf) -> float:
    """A real number between two ends, or `SubspaceError`."""
    real = isinstance(value, int | float | np.integer | np.floating)
    if isinstance(value, bool) or not real or not least <= float(value) <= most:
        ends = f"from {least:g} to {most:g}" if math.isfinite(most) else f"at least {least:g}"
        raise SubspaceError(f"{name} must be a number {ends}, got {shown(value)}")
    if not math.isfinite(float(value)):
        raise SubspaceError(f"{name} must be finite, got {shown(value)}")
    return float(value)


def _count(name: str, value: Any) -> int:
    number = strict_int(value, name, SubspaceError)
    if number < 1:
        raise SubspaceError(f"{name} must be at least 1, got {number}")
    if number >= _MOST:
        raise SubspaceError(f"{name} must be below 2**31, got {number}")
    return number


@attrs.frozen
class Training:
    """How a subspace is learned; see `train_subspace`."""

    rank: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup: float
    kl: float
    patience: int | None
    seed: int

    @classmethod
    def read(
        cls,
        rank: Any,
        epochs: Any,
        batch_size: Any,
        lr: Any,
        weight_decay: Any,
        warmup: Any,
        kl: Any,
        patience: Any,
        seed: Any,
    ) -> Training:
        """The arguments of these names.

        Raises:
            SubspaceError: one of them is of a wrong type, or out of its range.
        """
        # A parameter of 1 is a basis vector turned by a right angle.
        rate, decay = _number("lr", lr, 0.0, 1.0), _number("weight_decay", weight_decay, 0.0)
        if not rate:
            raise SubspaceError("lr must be above 0: with lr=0 nothing is learned")
        if rate * decay > 1:
            raise SubspaceError(
                f"weight_decay must be at most 1 / lr = {1 / rate:g}, got {shown(weight_decay)}: a "
                "step would take away more than there is"
            )
        return cls(
            _count("rank", rank),
            _count("epochs", epochs),
            _count("batch_size", batch_size),
            rate,
            decay,
            _number("warmup", warmup, 0.0, 1.0),
            _number("kl", kl, 0.0),
            None if patience is None else _count("patience", patience),
            strict_seed(seed),
        )


@attrs.frozen(eq=False)
class Split:
    """Which pairs a subspace is learned from, and which are held out.

    Args:
        train: `[train]`, numbers of pairs, ascending.
        held_out: `[held out]`, the others.
    """

    train: Tensor
    held_out: Tensor


def split_pairs(usable: Tensor, alike: Tensor, held_out: Any, count: int, seed: int) -> Split:
    """Part pairs into those that are learned from and those held out.

    Args:
        usable: `[usable]`, the numbers of the pairs.
        alike: `[pairs]`, a number that pairs of the same prompts share: they stay together.
        held_out: a share of the pairs, drawn at random, or the numbers of some.
        count: how many pairs there are.
        seed: of the draw.

    Raises:
        SubspaceError: it is neither, or a part is empty.

    Warns:
        PromptWarning: the numbers part pairs of the same prompts.
    """
    if isinstance(held_out, int | float | np.floating) and not isinstance(held_out, bool):
        share = _number("held_out", held_out, 0.0, 1.0)
        chosen = _drawn(alike[usable], share, seed)
        told = f"held_out={held_out:g}"
    else:
        numbers = strict_ints(held_out, "held_out", SubspaceError)
        out = [number for number in numbers if not -count <= number < count]
        if out:
            raise SubspaceError(f"held_out names pair {out[0]}, and there are {count}, from 0 on")
        named = [number % count for number in numbers]
        twice = [number for number in named if named.count(number) > 1]
        if twice:
            raise SubspaceError(f"held_out names pair {twice[0]} more than once: {list(numbers)}")
        picked = torch.tensor(named, device="cpu")
        chosen = torch.isin(usable, picked)
        told = f"held_out of {len(numbers)} pairs"
    split = Split(usable[~chosen], usable[chosen])
    seen = int(torch.isin(alike[split.held_out], alike[split.train]).sum())
    if seen and len(split.train) > 1:
        warn(
            f"{seen} of {len(split.held_out)} pairs held out are of the same prompts as pairs that "
            "are learned from, so that they say little: name these too, or give a share",
            PromptWarning,
        )
    if len(split.train) < 2 or not len(split.held_out):
        raise SubspaceError(
            f"{len(usable)} pairs that tell something are too few for a split with {told}: it "
            f"leaves {len(split.train)} to learn from and {len(split.held_out)} held out, where "
            "at least 2 and 1 are needed (pairs of the same prompts stay together)"
        )
    return split


def _drawn(alike: Tensor, share: float, seed: int) -> Tensor:
    """`[usable]`, bool: a share of the pairs, as near to it as those that stay together allow."""
    groups, which = torch.unique(alike, return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(groups), generator=generator, device="cpu")
    sizes = torch.bincount(which, minlength=len(groups))[order]
    # At least one group, where there are two or more, but never all of them.
    wanted = max(share * len(alike), 1.0) if share else 0.0
    taken = int((sizes.cumsum(0) <= wanted + 1e-9).sum())
    taken = min(max(taken, 1 if share else 0), len(groups) - 1)
    return torch.isin(which, order[:taken])
