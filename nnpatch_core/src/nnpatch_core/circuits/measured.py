"""Circuits, run and measured: each is a cell of an outcome, whose value is its faithfulness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._models import evaluating, follow, input_device, module_of
from nnpatch_core.adapters import n_layers
from nnpatch_core.circuits.circuit import Circuit
from nnpatch_core.circuits.runs import CircuitRuns
from nnpatch_core.edges import GivenOf, Setting, open_layers
from nnpatch_core.errors import MetricError, TokensError
from nnpatch_core.memory import host_memory, memory_budget
from nnpatch_core.metrics import MetricContext, MetricSpec, activations_read, measure
from nnpatch_core.results import Outcome
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
)
from nnpatch_core.tracing import LAYER_INPUT, forward, read_component

#: The name under which an outcome has the circuits.
CIRCUIT = "circuit"
#: What a run keeps of each sender's part: the part, and copies of it as it is read and joined.
_COPIES = 4


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


def measure_circuits(
    setting: Setting,
    circuits: Mapping[str, Circuit],
    metric: MetricSpec,
    options: Options,
) -> Outcome:
    """Run circuits, and measure them.

    The value of each is its faithfulness: 0 is the run without edges, 1 the source run, which has
    all.

    Args:
        setting: the model and its prompts.
        circuits: by name.
        metric: as the user names it.
        options: how they may run.

    Raises:
        PatchingError: one of its kinds.
    """
    given = setting.given(options)
    sites = _Circuits(tuple(circuits))
    _check_masks(setting)
    sweep, runs = prepare(
        setting.nnmodel, setting.api, sites, setting.runs, metric, options, gathers=False
    )
    _check_metrics(sweep)
    setting = attrs.evolve(setting, runs=runs)
    model = module_of(setting.nnmodel)
    kept = torch.stack([circuit.kept for circuit in circuits.values()])
    size = _Size.of(sweep, setting, len(kept))
    with evaluating(model), torch.no_grad():
        opened = _Opened(setting, given, size.chunks)
        context = opened.context(sweep)
        baseline, versions = baselines(sweep, context), Versions.of(sweep, runs.reading)
        once = versions.baselines(baseline)
        runs.check_baseline(context.once, once)
        try_out(sweep.metrics, context, baseline)
        tally = Tally.empty(len(kept), baseline)
        with make_bar(len(kept), options.progress, desc="circuits") as bar:
            for first in range(0, len(kept), size.circuits):
                some = kept[first : first + size.circuits]
                logits = torch.cat([opened.at(chunk).logits(some) for chunk in size.chunks], 1)
                for number, own in enumerate(logits):
                    for name, value in measure(sweep.metrics, own, context).items():
                        tally.values[name][first + number] = value
                bar.update(len(some))
        tally.done[:] = True
        tally.note("circuits", None)
    return outcome(
        versions.sweep(sweep),
        CIRCUIT,
        runs.scale,
        versions.tally(tally),
        once,
        runs.prompts,
        versions.mask(runs.mask_of(sweep.patches)),
    )


class _Opened:
    """Circuits in chunks of the prompts; where there is one chunk, it is opened but once."""

    def __init__(self, setting: Setting, given: GivenOf | None, chunks: Sequence[slice]) -> None:
        self._setting, self._given, self._chunks = setting, given, chunks
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
            self._known[chunk.start] = CircuitRuns.of(layers, stream[0], given), logits
        return self._known[chunk.start]

    def context(self, sweep: Sweep) -> MetricContext:
        """What metrics compare with: the source run, and the run without edges."""
        runs, nodes = self._setting.runs, self._setting.structure.nodes
        if self._given is None and len(self._chunks) > 1:
            return runs.unpatched(sweep, self._chunks)
        none = torch.zeros(1, *nodes.mask.shape, dtype=torch.bool, device="cpu")
        sources, targets = [], []
        for chunk in self._chunks:
            circuits, logits = self._open(chunk)
            sources.append(logits)
            whole = circuits.layers.target.logits
            targets.append(whole if self._given is None else circuits.logits(none)[0])
        return runs.context(torch.cat(sources), torch.cat(targets))


@attrs.frozen(eq=False)
class _Size:
    """How many circuits, and which prompts, run together."""

    circuits: int
    chunks: Sequence[slice]

    @classmethod
    def of(cls, sweep: Sweep, setting: Setting, circuits: int) -> _Size:
        """As many as fit in memory."""
        model: Any = module_of(setting.nnmodel)
        weight = next(model.parameters())
        width = int(model.get_input_embeddings().weight.shape[-1])
        nodes, seq_len = setting.structure.nodes, sweep.seq_len
        row = _COPIES * len(nodes.senders) * seq_len * width * weight.element_size()
        logits = 4 * sweep.batch * sweep.limits.needs.logits
        budget = memory_budget(sweep.options.memory_budget, model)
        device = input_device(model)
        host = host_memory() if device is not None and device.type != "cpu" else budget
        rows = max(budget // 2 // row, 1)
        prompts = min(rows, sweep.options.batch_size or sweep.batch, sweep.batch)
        together = min(max(rows // prompts, 1), max(host // 4 // max(logits, 1), 1), circuits)
        return cls(together, sweep.limits.chunks(sweep.batch, prompts))


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


def _check_metrics(sweep: Sweep) -> None:
    """Raise `MetricError` for a metric that reads activations: no run of a circuit has them."""
    for name, metric in sweep.metrics.items():
        if activations_read(metric):
            raise MetricError(
                f"metric {name!r} reads activations, and a circuit is run without most of them: "
                "take a metric of the logits"
            )
