"""Moments: all that is kept of prompts too many to be kept one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs
import torch
from scipy.special import stdtrit
from torch import Tensor

from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.formats import COUNT, Array, Each, stored

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome

_EXACT = (torch.float64,)


@attrs.frozen(eq=False)
class Moments:
    """Means over prompts of metrics and of their products, in float64.

    Args:
        count: how many prompts.
        patched: metric to site name to `[cells, 4]`: the means of p, p^2, p s and p t, where p is
            the metric of the patched run, s of the source run and t of the target run.
        unpatched: metric to `[5]`: the means of s, t, s^2, t^2 and s t.
    """

    count: int = attrs.field(metadata=stored(COUNT))
    patched: Mapping[str, Mapping[str, Tensor]] = attrs.field(
        metadata=stored(Each("metrics", Each("sites", Array(_EXACT, ("cells", "products")))))
    )
    unpatched: Mapping[str, Tensor] = attrs.field(
        metadata=stored(Each("metrics", Array(_EXACT, ("unpatched",))))
    )

    @classmethod
    def of(cls, outcome: Outcome) -> Moments:
        """The moments of an outcome that has each prompt."""
        count = len(outcome.baseline.target)
        patched: dict[str, dict[str, Tensor]] = {}
        unpatched = {}
        for metric, baseline in outcome.baselines.items():
            s, t = baseline.source.double(), baseline.target.double()
            unpatched[metric] = torch.stack([s, t, s * s, t * t, s * t]).mean(1)
            patched[metric] = {}
            for name, raw in outcome.raw[metric].items():
                p = raw.double()
                products = torch.stack([p, p * p, p * s, p * t], -1)
                patched[metric][name] = products.mean(1)
        return cls(count, patched, unpatched)


def products_unpatched(unpatched: Tensor) -> Tensor:
    """`[4]`: the products of a patched run that is the target run: t, t^2, t s and t t."""
    return unpatched[[1, 3, 4, 3]]


def standard_errors(outcome: Outcome, name: str) -> Tensor:
    """The standard error of each cell's value, `[cells]`, float64; see `Outcome.standard_error`."""
    if outcome.magnitude:
        raise OutcomeError("sizes have no standard error here: it is of values with a sign")
    moments = Moments.of(outcome) if outcome.moments is None else outcome.moments
    count = moments.count
    if count < 2:
        return torch.full(
            (len(outcome.cells[name].index),), torch.inf, dtype=torch.float64, device="cpu"
        )
    p, pp, ps, pt = moments.patched[outcome.metric][name].T
    s, t, ss, tt, st = moments.unpatched[outcome.metric]
    if outcome.scale == "change":
        # Of p - t.
        spread, size = (
            pp - 2 * pt + tt - (p - t).square(),
            torch.ones((), dtype=torch.float64, device="cpu"),
        )
    else:
        # Of p - t - value (s - t), whose mean is 0.
        size = s - t
        value = (p - t) / size
        cross, square = ps - pt - st + tt, ss - 2 * st + tt
        spread = pp - 2 * pt + tt - 2 * value * cross + value.square() * square
    errors: Tensor = (spread.clamp(min=0) / (count - 1)).sqrt() / size.abs()
    return errors


def denominator_may_be_zero(outcome: Outcome, level: float) -> bool:
    """Tell whether the interval of mean source - mean target, by Student's t, holds 0."""
    moments = Moments.of(outcome) if outcome.moments is None else outcome.moments
    if outcome.scale == "change" or moments.count < 2:
        return False
    s, t, ss, tt, st = moments.unpatched[outcome.metric].tolist()
    spread = max(ss - 2 * st + tt - (s - t) ** 2, 0.0)
    reach = float(stdtrit(moments.count - 1, (1 + level) / 2))
    return not abs(s - t) > reach * float((spread / (moments.count - 1)) ** 0.5)
