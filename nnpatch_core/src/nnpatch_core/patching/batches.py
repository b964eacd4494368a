"""Sweeps over batches of prompts, of which there may be more than fit in memory."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ParamSpec, get_args

import attrs
import torch

from nnpatch_core._arguments import bound, check_flags
from nnpatch_core._models import module_of
from nnpatch_core._printable import shown
from nnpatch_core._warnings import warn
from nnpatch_core.batch import Batch
from nnpatch_core.errors import (
    MetricError,
    PatchingError,
    PositionError,
    ShardError,
    TokensError,
    UnknownNameError,
)
from nnpatch_core.interventions import Remembered, check_denominators
from nnpatch_core.metrics import is_per_prompt, name_metrics
from nnpatch_core.paths import sites_of
from nnpatch_core.plugins import find_adapter, find_metric
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.results import Joined, Keep, Outcome, means_of
from nnpatch_core.seq_pos import Custom, CustomConstant, PromptBatch, are_per_prompt
from nnpatch_core.sites import SiteList, Sites, SweepSites
from nnpatch_core.sweep import ShareFile, make_bar, warn_of_columns

_P = ParamSpec("_P")
_KEEP = get_args(Keep)
#: Arguments that need all prompts at once, each with the reason.
_REFUSED = {
    "screen": "it chooses among the cells by all prompts, which are looked at twice",
    "checkpoint": "it is of one batch: save the outcomes of some batches, each by its own call",
    "metric_data": "it has a row for each prompt, and batches have theirs in the pairs",
}


def in_batches(*names: str) -> Callable[[Callable[_P, Outcome]], Callable[_P, Outcome]]:
    """Let a sweep take an iterable of `PromptPairs` in place of one of its arguments.

    Each batch is a sweep of its own; their outcomes are joined as the argument `keep` says.

    Args:
        *names: the arguments that may be one.
    """

    def decorate(function: Callable[_P, Outcome]) -> Callable[_P, Outcome]:
        @functools.wraps(function)
        def swept(*args: _P.args, **kwargs: _P.kwargs) -> Outcome:
            arguments = bound(function, args, kwargs)
            arguments.apply_defaults()
            given = arguments.arguments
            keep = given["keep"]
            if not isinstance(keep, str) or keep not in _KEEP:
                raise UnknownNameError(f"unknown keep {shown(keep)}; there are {', '.join(_KEEP)}")
            name = next((name for name in names if is_stream(given[name])), None)
            if name is None:
                if keep == "means":
                    _check_metrics(given["metric"], "keep='means'")
                outcome = function(*args, **kwargs)
                return outcome if keep == "prompts" else means_of(outcome)
            return _Stream(function, dict(given), name).run()

        return swept

    return decorate


def is_stream(value: Any) -> bool:
    """Whether an argument is an iterable of `PromptPairs`, and not one batch."""
    if isinstance(value, PromptPairs | torch.Tensor | Mapping | str) or value is None:
        return False
    if isinstance(value, Iterator):
        return True
    if isinstance(value, list | tuple):
        return bool(value) and isinstance(value[0], PromptPairs)
    # Whatever makes an iterator anew, as a data loader does.
    return isinstance(value, Iterable) and getattr(value, "ndim", None) is None


@attrs.frozen(eq=False)
class _Stream:
    """A sweep over batches.

    Args:
        function: sweeps one.
        given: its arguments.
        name: the one that is an iterable.
    """

    function: Callable[..., Outcome]
    given: dict[str, Any]
    name: str
    told: set[tuple[type[Warning], str]] = attrs.field(factory=set, init=False)

    def run(self) -> Outcome:
        """Sweep one batch after the other, and join what came of them."""
        self._check()
        batches, given = self.given[self.name], self._arguments()
        total = len(batches) if hasattr(batches, "__len__") else None
        joined = Joined(self.given["keep"])
        first: PromptBatch | None = None
        count = 0
        with make_bar(total, bool(self.given["progress"]), desc="batches") as bar:
            for number, batch in enumerate(batches):
                if not isinstance(batch, PromptPairs):
                    raise TokensError(
                        f"{self.name} is an iterable, whose batches must be PromptPairs; batch "
                        f"{number} is {shown(batch)}"
                    )
                own = _first_of(batch)
                first = own if first is None else first
                try:
                    self._check_batch(first, own, number)
                    with self._telling(number):
                        outcome = self.function(**{**given, self.name: batch.as_part()})
                except PatchingError as error:
                    error.add_note(
                        f"in batch {number} of {self.name}, whose first prompt is number {count}"
                    )
                    raise
                joined.add(outcome)
                count += len(batch)
                # It must not stay in memory beside the next one.
                del outcome
                bar.update()
        if first is None:
            raise TokensError(f"{self.name} is an iterable without batches: give at least one")
        outcome = joined.outcome()
        if outcome.scale == "restored":
            check_denominators(outcome.baselines)
        return outcome

    def _check(self) -> None:
        """Raise for what cannot be done batch by batch."""
        if isinstance(self.given.get("checkpoint"), ShareFile):
            raise ShardError(
                f"{self.name} is an iterable of batches, each a sweep of its own, and a shard "
                "is of one sweep: give all prompts in one call, as one PromptPairs, which the "
                "sweep cuts by itself"
            )
        for name, reason in _REFUSED.items():
            if self.given.get(name) is not None:
                raise PatchingError(f"{name}= does not go with batches of prompts: {reason}")
        check_flags(progress=self.given["progress"])
        _check_metrics(self.given["metric"], "batches of prompts")
        method = self.given.get("method", self.given.get("ablation"))
        method = method if isinstance(method, str) else None
        if method == "resample":
            raise PatchingError(
                "method='resample' does not go with batches of prompts: it draws among all of them"
            )
        if method == "mean" and (self.given["reference"] is None or self.given["per_position"]):
            what = "per_position=True" if self.given["per_position"] else "without reference="
            raise PatchingError(
                f"method='mean' {what} does not go with batches of prompts, whose mean it would "
                "be: pass a data set as reference=, and leave out per_position="
            )
        if any(map(are_per_prompt, self._positions)):
            raise PositionError(
                "seq_pos names positions of each prompt, [batch, k], which does not go with "
                "several batches: go by name, with seq_pos_type='spans'"
            )

    @property
    def _sites(self) -> list[SweepSites]:
        """The sites that are swept."""
        return sites_of(self.given.get(name) for name in ("sites", "senders", "receivers", "path"))

    @property
    def _positions(self) -> list[Any]:
        """The positions that sites name, as they were spelled."""
        return [positions for sites in self._sites for positions in _positions(sites)]

    def _arguments(self) -> dict[str, Any]:
        """The arguments of each batch: the adapter is found, and a data set averaged, but once."""
        given = {**self.given, "progress": False, "keep": "prompts"}
        model = module_of(given["nnmodel"])
        given["api"] = find_adapter(given["api"], model)
        if given.get("reference") is not None:
            given["reference"] = Remembered(given["reference"])
        return given

    def _check_batch(self, first: PromptBatch, own: PromptBatch, number: int) -> None:
        """Raise, or warn, where a batch does not line up with the first one."""
        if own.seq_len != first.seq_len and any(map(_from_start, self._positions)):
            raise PositionError(
                f"batch {number} has prompts of {own.seq_len} tokens, and the first one of "
                f"{first.seq_len}: positions that are counted from the start are other ones there; "
                "count from the end, as -1, or go by name, with seq_pos_type='spans'"
            )
        if number:
            with self._telling(number):
                for sites in self._sites:
                    warn_of_columns(sites, _both(first, own))

    def _telling(self, number: int) -> _Telling:
        return _Telling(self.told, number)


class _Telling:
    """Passes warnings on, each kind of words once: later batches often say the same."""

    def __init__(self, told: set[tuple[type[Warning], str]], number: int) -> None:
        self._told, self._number = told, number
        self._caught = warnings.catch_warnings(record=True)
        self._found: list[warnings.WarningMessage] = []

    def __enter__(self) -> None:
        found = self._caught.__enter__()
        # Not `or`: it is empty still, and will be filled.
        self._found = [] if found is None else found
        warnings.simplefilter("always")

    def __exit__(self, *error: Any) -> None:
        self._caught.__exit__(*error)
        # Before an error too, as they would be told without batches.
        for each in self._found:
            text = str(each.message)
            key = each.category, re.sub(r"\d+", "", text)[:80]
            if key not in self._told:
                self._told.add(key)
                where = "" if not self._number else f"batch {self._number}: "
                warn(f"{where}{text}", each.category)


def _check_metrics(metric: Any, what: str) -> None:
    """Raise `MetricError` for a metric that must be given all prompts at once."""
    for name, each in name_metrics(metric, find_metric).items():
        if not is_per_prompt(each):
            raise MetricError(
                f"metric {name!r} is not declared for each prompt alone, and {what} do not show it "
                "all of them: declare it with @per_prompt, if it is"
            )


def _positions(sites: Any) -> list[Any]:
    """The positions that sites name, as they were spelled."""
    if isinstance(sites, SiteList):
        each = [site for cell in sites.sites for site in cell.sites]
        return [site.seq_pos for site in each if site.seq_pos is not None]
    strategy = sites.strategy if isinstance(sites, Sites) else None
    return [strategy.positions] if isinstance(strategy, Custom | CustomConstant) else []


def _from_start(positions: Any) -> bool:
    return any(position >= 0 for position in positions)


def _first_of(pairs: PromptPairs) -> PromptBatch:
    """The first pair of a batch, as wide as the batch."""
    whole, one = pairs.batch, torch.tensor([0], device="cpu")
    source = None if whole.source is None else whole.source.rows(one)
    spans = {name: span.rows(one) for name, span in whole.spans.items()}
    return PromptBatch(whole.target.rows(one), source, spans)


def _both(first: PromptBatch, own: PromptBatch) -> PromptBatch:
    """Two pairs in one batch, by which it is seen whether their columns line up."""
    width = max(first.seq_len, own.seq_len)

    def joined(one: Batch, other: Batch) -> Batch:
        rows = [
            torch.nn.functional.pad(tensor, (width - tensor.shape[1], 0))
            for tensor in (one.tokens, other.tokens, one.mask, other.mask)
        ]
        return Batch(torch.cat(rows[:2]), torch.cat(rows[2:]))

    source = None
    if first.source is not None and own.source is not None:
        source = joined(first.source, own.source)
    return PromptBatch(joined(first.target, own.target), source)
