"""Circuits, run and measured: each is a cell of an outcome, whose value is its faithfulness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._models import evaluating, follow, input_device, module_of
from nnpatch_core._rounding import rounding
from nnpatch_core.adapters import n_layers
from nnpatch_core.circuits.circuit import Circuit
from nnpatch_core.circuits.runs import CircuitRuns
from nnpatch_core.edges import Ablated, Setting, open_layers
from nnpatch_core.errors import EngineError, MemoryBudgetError, MetricError, TokensError
from nnpatch_core.interventions import PairRuns
from nnpatch_core.memory import host_memory, in_units
from nnpatch_core.metrics import MetricContext, MetricSpec, activations_read, measure
from nnpatch_core.results import Baseline, Outcome
from nnpatch_core.seq_pos import PromptBatch
from nnpatch_core.site import Site
from nnpatch_core.sites import Axis, Grid
from nnpatch_core.sweep import (
    Options,
    Sweep,
    Tally,
    Versions,
    baselines,
    make_bar,
    outcome,
    prepare,
    try_out,
    warn_of_chunks,
)
from nnpatch_core.tracing import LAYER_INPUT, forward, forward_hooks, in_words, read_component

#: The name under which an outcome has the circuits.
CIRCUIT = "circuit"
#: Under `swapped` in an outcome's `info`.
SWAPPED = "source and target prompts have changed places, their answers in the metric have not"
#: A layer's stream, attention, MLP and heads of the target run; two streams, queries, keys, values
#: and again the heads and MLP of the run that edges outside of a circuit carry.
_KEPT = 11
#: Recorded runs, and logits that wait, take at most this share of the memory.
_SHARE = 4


@attrs.frozen(eq=False)
class _Cell:
    """A circuit as a sweep has its sites: it comes in where the final stream is."""

    sites: tuple[Site, ...]
    label: str

    @property
    def name(self) -> str:
        """The name of the outcome's tensor."""
        return CIRCUIT


@attrs.frozen(eq=False)
class _Circuits:
    """Circuits by name, as `SweepSites`."""

    names: tuple[str, ...]

    def grids(
        self, nnmodel: Any, api: Any, seq_len: int, prompts: PromptBatch | None = None
    ) -> dict[str, Grid]:
        """See `SweepSites.grids`."""
        last = Site.get_site(api, "resid", n_layers(api, module_of(nnmodel)) - 1)
        found: Any = tuple(_Cell((last,), name) for name in self.names)
        index = tuple((number,) for number in range(len(found)))
        return {CIRCUIT: Grid((Axis(CIRCUIT, self.names),), index, found)}


class CircuitMeasure:
    """Circuits are run and measured on the same prompts, again and again.

    Args:
        setting: the model and its prompts.
        metric: as the user names it.
        options: how they may run.

    Raises:
        PatchingError: one of its kinds.
    """

    def __init__(self, setting: Setting, metric: MetricSpec, options: Options) -> None:
        _check_masks(setting)
        given = setting.given(options)
        self._prepared = _prepared(setting, (CIRCUIT,), metric, options)
        sweep, runs = self._prepared
        _check_metrics(sweep)
        self._setting, self._metric, self._options = setting, metric, options
        self._own = attrs.evolve(setting, runs=runs)
        self._size = _Size.of(sweep, self._own)
        warn_of_chunks(sweep, self._size.chunks)
        self._opened = _Opened(self._own, given, self._size)
        self._known: tuple[MetricContext, dict[str, Baseline]] | None = None

    def outcome(self, circuits: Mapping[str, Circuit]) -> Outcome:
        """The outcome of circuits by name: the value of each is its faithfulness.

        0 is the run without edges, 1 the source run, which has all.
        """
        options, runs = self._options, self._own.runs
        named, _ = _prepared(self._setting, tuple(circuits), self._metric, options)
        with self._running():
            _, baseline = self._baseline()
            versions = Versions.of(named, runs.reading)
            with make_bar(len(circuits), options.progress, desc="circuits") as bar:
                values = self._measured([*circuits.values()], bar)
        tally = attrs.evolve(Tally.empty(len(circuits), baseline), values=values)
        tally.done[:] = True
        tally.note("circuits", None)
        found = outcome(
            versions.sweep(named),
            CIRCUIT,
            runs.scale,
            versions.tally(tally),
            versions.baselines(baseline),
            runs.prompts,
            versions.mask(runs.mask_of(named.patches)),
        )
        given = self._own.ablation
        told = {
            **({"swapped": SWAPPED} if self._own.swapped else {}),
            **({} if given is None else {"ablation": given.method}),
        }
        return attrs.evolve(found, info={**found.info, **told})

    def faithfulness(self, circuits: Sequence[Circuit]) -> list[float]:
        """The faithfulness of circuits by the first metric."""
        sweep, runs = self._prepared
        with self._running():
            _, baseline = self._baseline()
            values = self._measured(circuits, None)
        versions = Versions.of(sweep, runs.reading)
        name = next(iter(sweep.metrics))
        own, once = versions.joined(values)[name].double(), versions.baselines(baseline)[name]
        none, whole = once.target.double().mean(), once.source.double().mean()
        return [float(each) for each in (own.mean(1) - none) / (whole - none)]

    @contextmanager
    def _running(self) -> Iterator[None]:
        with evaluating(module_of(self._setting.nnmodel)), torch.no_grad():
            yield

    def _measured(self, circuits: Sequence[Circuit], bar: Any) -> dict[str, Tensor]:
        """For each metric `[circuits, batch]`."""
        sweep, _ = self._prepared
        context, _ = self._baseline()
        found: dict[str, list[Tensor]] = {name: [] for name in sweep.metrics}
        for first in range(0, len(circuits), self._size.circuits):
            some = circuits[first : first + self._size.circuits]
            kept = torch.stack([circuit.kept for circuit in some])
            logits = []
            for chunk in self._size.chunks:
                last = chunk is self._size.chunks[-1]
                done = bar.update if bar is not None and last else None
                logits.append(self._opened.at(chunk).logits(kept, done))
            for own in torch.cat(logits, 1):
                for name, value in measure(sweep.metrics, own, context).items():
                    found[name].append(value)
        return {name: torch.stack(each) for name, each in found.items()}

    def _baseline(self) -> tuple[MetricContext, dict[str, Baseline]]:
        """The context of metrics, and what they give for the runs with all edges and none."""
        if self._known is None:
            sweep, runs = self._prepared
            context = self._opened.context(sweep)
            baseline = baselines(sweep, context)
            versions = Versions.of(sweep, runs.reading)
            runs.check_baseline(context.once, versions.baselines(baseline))
            try_out(sweep.metrics, context, baseline)
            self._known = context, baseline
        return self._known


def _prepared(
    setting: Setting, names: tuple[str, ...], metric: MetricSpec, options: Options
) -> tuple[Sweep, PairRuns]:
    sites = _Circuits(names)
    return prepare(
        setting.nnmodel, setting.api, sites, setting.runs, metric, options, gathers=False
    )


class _Opened:
    """Circuits in chunks of the prompts; where there is one chunk, it is opened but once."""

    def __init__(self, setting: Setting, given: Ablated | None, size: _Size) -> None:
        self._setting, self._given, self._size = setting, given, size
        self._known: dict[int, tuple[CircuitRuns, Tensor]] = {}

    def at(self, chunk: slice) -> CircuitRuns:
        """Circuits in the prompts of a chunk."""
        return self._open(chunk)[0]

    def _open(self, chunk: slice) -> tuple[CircuitRuns, Tensor]:
        """The same, and the source run's logits."""
        if chunk.start not in self._known:
            self._known.clear()
            setting = self._setting
            target, source = (
                batch.rows(chunk) for batch in (setting.runs.target, setting.runs.source)
            )
            layers = open_layers(setting.nnmodel, setting.api, setting.structure, target)
            given = None if self._given is None else self._given(layers, chunk)[0]
            stream: list[Tensor] = []

            def visit(traced: Any) -> None:
                envoy = follow(traced, f"{layers.path}.0")
                stream.append(read_component(envoy, LAYER_INPUT).clone())

            logits = forward(setting.nnmodel, source, visit)
            circuits = CircuitRuns.of(layers, source, stream[0], given, self._size.room)
            _check_hooks(circuits, logits)
            self._known[chunk.start] = circuits, logits
        return self._known[chunk.start]

    def context(self, sweep: Sweep) -> MetricContext:
        """The context of metrics: the source run, and the run without edges.

        All runs are of the source prompts: where a metric goes by tokens, or by positions that it
        finds in them, it does so in these.
        """
        runs, nodes = self._setting.runs, self._setting.structure.nodes
        one, other = runs.source.read, runs.target.read
        alike = one is None or (other is not None and torch.equal(one, other.to(one.device)))
        if self._given is None and alike and len(self._size.chunks) > 1:
            return runs.unpatched(sweep, self._size.chunks).of_source_run
        none = torch.zeros(1, *nodes.mask.shape, dtype=torch.bool, device="cpu")
        sources, targets = [], []
        for chunk in self._size.chunks:
            circuits, logits = self._open(chunk)
            sources.append(logits)
            whole = self._given is None and alike
            targets.append(circuits.layers.target.logits if whole else circuits.logits(none)[0])
        return runs.context(torch.cat(sources), torch.cat(targets)).of_source_run


@attrs.frozen(eq=False)
class _Size:
    """How much is done at once.

    Args:
        circuits: of how many circuits the logits are kept.
        chunks: which prompts run together.
        room: bytes that runs may take.
    """

    circuits: int
    chunks: Sequence[slice]
    room: int

    @classmethod
    def of(cls, sweep: Sweep, setting: Setting) -> _Size:
        """As much as fits in memory.

        Raises:
            MemoryBudgetError: the runs of one prompt do not fit in a budget that was given.
        """
        model: Any = module_of(setting.nnmodel)
        weight = next(model.parameters())
        width = int(model.get_input_embeddings().weight.shape[-1])
        limits, nodes = sweep.limits, setting.structure.nodes
        layer = _KEPT * sweep.seq_len * width * weight.element_size()
        prompts = limits.prompts
        # Of each device: its layers, what may be used, and the budget.
        devices = [
            (room.device, len(room.layers), room.usable, room.budget) for room in limits.rooms
        ]
        for name, layers, usable, budget in devices or [
            ("", nodes.n_layers, limits.usable, limits.budget)
        ]:
            kept, share = max(layer * layers, 1), usable // _SHARE
            if kept > share and sweep.options.memory_budget is not None:
                at = f" on {name}" if name else ""
                raise MemoryBudgetError(
                    f"what is recorded of one prompt of {sweep.seq_len} tokens needs "
                    f"{in_units(kept)}{at}, and memory_budget leaves {in_units(share)} of "
                    f"{in_units(budget)} for it: raise it, or give shorter prompts"
                )
            prompts = min(max(share // kept, 1), prompts)
        device = input_device(model)
        own = device is not None and device.type != "cpu"
        waiting = (host_memory() if own else limits.usable) // _SHARE
        circuits = max(waiting // (sweep.batch * limits.needs.logits), 1)
        # The parts of circuits lie together, and streams on each device in turn.
        kept = layer * nodes.n_layers
        room = max(limits.usable - prompts * kept - (0 if own else waiting), 0)
        return cls(circuits, limits.chunks(sweep.batch, prompts), room)


def _check_masks(setting: Setting) -> None:
    """Raise `TokensError` where a pair's prompts differ in length: no edge lines up then."""
    source, target = setting.runs.source, setting.runs.target
    uneven = (source.mask != target.mask.to(source.mask.device)).any(1).nonzero().flatten()
    if len(uneven):
        raise TokensError(
            f"a circuit is run on the source prompt with what the target prompt has at the same "
            f"tokens, and the prompts of pairs {uneven.tolist()} have other lengths: give pairs of "
            "one length each"
        )


def _check_hooks(circuits: CircuitRuns, logits: Tensor) -> None:
    """Raise `EngineError` where a hook of the user's makes circuits another model.

    It may tell rows, or few tokens, from a whole forward; then two circuits of all edges beside
    each other do not give the source run, whose logits these are.
    """
    hooks = forward_hooks(module_of(circuits.layers.nnmodel))
    if not hooks:
        return
    whole = torch.from_numpy(circuits.layers.nodes.mask).expand(2, -1, -1)
    off = float((circuits.logits(whole) - logits).abs().nan_to_num(torch.inf).max())
    allowed = rounding(circuits.stream) * float(logits.nan_to_num(0.0).abs().max())
    if not off <= allowed:
        raise EngineError(
            f"circuits are run by calling layers by themselves, and with {in_words(hooks)} the "
            f"circuit of all edges is not the source run: it is off by {off:.3g} logits, where "
            f"rounding explains {allowed:.3g}; take that away, or let it treat all rows and tokens "
            "alike"
        )


def _check_metrics(sweep: Sweep) -> None:
    """Raise `MetricError` for a metric that reads activations: no run of a circuit has them."""
    for name, metric in sweep.metrics.items():
        if activations_read(metric):
            raise MetricError(
                f"metric {name!r} reads activations, and a circuit is run without most of them: "
                "take a metric of the logits"
            )
