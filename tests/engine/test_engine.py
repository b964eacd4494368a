"""Which engine runs, in how much memory, and what a sweep says of it."""

from __future__ import annotations

import functools
import io
import re
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from nnsight import NNsight
from torch import Tensor, nn

from nnpatch_core import (
    Component,
    DecoderAPI,
    MetricContext,
    Outcome,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    decoder_components,
    plan_sweep,
    reads_tokens,
)
from nnpatch_core.engine.cone import execution as cone
from nnpatch_core.engine.cone import target
from nnpatch_core.errors import (
    EngineError,
    EngineWarning,
    MemoryBudgetError,
    MemoryWarning,
    MetricError,
    UnknownNameError,
)
from nnpatch_core.memory import limits
from nnpatch_core.memory import needs as memory
from nnpatch_core.sites import bind_cells
from nnpatch_core.sweep import progress
from nnpatch_core.sweep.progress import Progress
from nnpatch_core.testing import Trace, tiny_api, tiny_model, traces
from nnpatch_llama import Llama3
from tests.helpers.engines import from_the_middle
from tests.helpers.faults import failing_at
from tests.helpers.samples import THREE

#: Padding is what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

SOURCE, TARGET, ANSWERS = THREE
SITES = Sites(["q", "v", "mlp", "resid"], seq_pos_type="each")
#: In the first layer q and v see one token only, and change less than the tokens tell.
LATER = Sites(["q", "v", "mlp", "resid"], layers=[1, 2], seq_pos_type="each")


def sweep(model: Any = None, api: Any = Llama3, sites: Any = SITES, **options: Any) -> Outcome:
    model = model or tiny_model("llama")
    options = {"progress": False, **options}
    return activation_patching(model, api, sites, SOURCE, TARGET, *ANSWERS, **options)


def gap(one: Outcome, other: Outcome) -> float:
    """The largest difference in any number of two outcomes."""
    return max(
        (one.raw[metric][name] - other.raw[metric][name]).abs().max().item()
        for metric in one.metrics
        for name in one
    )


@pytest.fixture(scope="module")
def full() -> Outcome:
    return sweep(engine="full")


# Which engine ------------------------------------------------------------------------------------


def test_the_outcome_says_which_engine_it_was(full: Outcome) -> None:
    assert sweep().info["engine"] == "cone"
    assert full.info["engine"] == "full"
    assert "fallback" not in sweep().info
    assert "fallback" not in full.info


def test_unknown_engine() -> None:
    with pytest.raises(UnknownNameError, match="'fast'; there are auto, cone, full"):
        sweep(engine="fast")


class NoCache(nn.Module):
    """A model that takes no keys and values."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.config = inner.config

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> Any:
        return self.inner(input_ids, attention_mask=attention_mask, position_ids=position_ids)


class Counting(nn.Module):
    """Keeps what it saw last: more than keys and values tell."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found = self.inner(hidden)
        return found + nn.functional.pad(found, (0, 0, 1, 0))[:, :-1]


def shifted() -> Any:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.input_layernorm = Counting(layer.input_layernorm)
    return model


NO_CACHE = DecoderAPI("NoCache", ("llama",), decoder_components(), layers="inner.model.layers")
UNFIT = {
    "declared": (
        lambda: tiny_model("llama"),
        attrs.evolve(Llama3, cone=False),
        "adapter 'Llama3' says that its models cannot run from the middle",
    ),
    "takes no cache": (
        lambda: NoCache(tiny_model("llama")),
        NO_CACHE,
        "NoCache does not take keys and values of tokens that have been run",
    ),
    "seen by the unpatched row": (
        shifted,
        Llama3,
        "run from the middle of a prompt, the model gives other logits than run as a whole: off",
    ),
}


@pytest.mark.parametrize("what", UNFIT)
def test_falls_back_and_says_why(what: str) -> None:
    make, api, reason = UNFIT[what]
    model = make()
    sites = Sites(["v", "mlp"], seq_pos_type="each")
    # What an adapter declares is no surprise.
    declared = not getattr(api, "cone", True)
    expected = nullcontext() if declared else pytest.warns(EngineWarning, match=re.escape(reason))
    with expected:
        out = sweep(model, api, sites)
    assert out.info["engine"] == "full"
    assert reason in out.info["fallback"]
    assert gap(out, sweep(model, api, sites, engine="full")) == 0
    assert not any(out.cells[name].elided.any() for name in out)
    with pytest.raises(EngineError, match=re.escape(reason)):
        sweep(model, api, sites, engine="cone")


def test_falls_back_in_ablation_too() -> None:
    arguments = (shifted(), Llama3, SITES, TARGET, *ANSWERS)
    with pytest.warns(EngineWarning, match="gives other logits"):
        out = ablation_patching(*arguments, progress=False)
    assert out.info["engine"] == "full"
    # From the first token on the model runs as ever: what was run so far stands.
    assert gap(out, ablation_patching(*arguments, engine="full", progress=False)) < 1e-5


def test_several_adapters_in_one_list_run_in_the_full_engine() -> None:
    other = attrs.evolve(Llama3, components={"mlp": Component("input_layernorm")})
    sites = Sites.from_sites([Site.get_site(api, "mlp", 1, seq_pos=[3]) for api in (Llama3, other)])
    with pytest.warns(EngineWarning, match="of several adapters"):
        out = sweep(sites=sites)
    assert "of several adapters: Llama3, Llama3" in out.info["fallback"]
    assert out["mlp"][0] != out["mlp"][1]
    # One that was made twice is one.
    twice = [Site.get_site(attrs.evolve(Llama3), "mlp", 1, seq_pos=[p]) for p in (3, 4)]
    assert sweep(sites=Sites.from_sites(twice)).info["engine"] == "cone"


def test_a_later_bucket_that_fails_leaves_the_rest_to_the_full_engine(
    full: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = failing_at(monkeypatch, 3, RuntimeError("no such shape"))
    told = io.StringIO()
    with redirect_stderr(told), pytest.warns(EngineWarning, match="no such shape") as warned:
        out = sweep(memory_budget=800_000, progress=True)
    # Once a call, and at the user's line.
    assert [warning.filename for warning in warned] == [__file__]
    assert len(calls) == 3
    assert gap(out, full) < 1e-5
    assert out.info["engine"] == "full"
    assert "RuntimeError: no such shape" in out.info["fallback"]
    cells = sum(len(out.cells[name].index) for name in out)
    assert f"{cells}/{cells} cells" in told.getvalue().replace("\r", "\n").strip().splitlines()[-1]
    calls.clear()
    with pytest.raises(EngineError, match="no such shape"):
        sweep(memory_budget=800_000, engine="cone")


class WrongFor(nn.Module):
    """A module that goes wrong for some numbers of tokens."""

    def __init__(self, inner: Any, tokens: range | list[int]) -> None:
        super().__init__()
        self.inner, self.tokens = inner, tokens

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found = self.inner(hidden)
        return found + 1.0 if hidden.shape[1] in self.tokens else found


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("budget", [120_000, None])
@pytest.mark.parametrize("tokens", [range(2, 6), [1]])
def test_the_unpatched_rows_see_faults_of_fewer_tokens(
    monkeypatch: pytest.MonkeyPatch, layer: int, budget: int | None, tokens: range | list[int]
) -> None:
    # Each number of tokens runs by itself.
    monkeypatch.setitem(memory._OVERHEAD, "cpu", 0.0)
    sites = Sites(["mlp", "resid"], seq_pos_type="each")
    model = tiny_model("llama")
    norm = model.model.layers[layer].input_layernorm
    model.model.layers[layer].input_layernorm = WrongFor(norm, tokens)
    with pytest.warns(EngineWarning, match="gives other logits"):
        out = sweep(model, sites=sites, memory_budget=budget)
    assert "gives other logits than run as a whole" in out.info["fallback"]
    assert gap(out, sweep(sites=sites, engine="full")) < 1e-5


def test_an_adapter_that_says_nothing_of_it_is_tried() -> None:
    class Bare:
        """Has what the protocol asks for, and no more."""

        name, model_types, layers = "Bare", ("llama",), "model.layers"
        components = decoder_components()

        def n_heads(self, config: Any, kind: str, layer: int) -> int:
            return Llama3.n_heads(config, kind, layer)

    assert sweep(api=Bare()).info["engine"] == "cone"


# Metrics -----------------------------------------------------------------------------------------


def test_metric_that_needs_the_batch_as_it_is_is_given_it_by_each_engine() -> None:
    labels = torch.tensor([7, 8, 9])

    def remembered(logits: Tensor) -> Tensor:
        return logits[torch.arange(3), labels]

    def centred(logits: Tensor) -> Tensor:
        return logits[:, 0] - 0.5 * logits[:, 0].mean()

    def above_all(logits: Tensor) -> Tensor:
        return logits[:, 3] - logits.max()

    for metric in (remembered, centred, above_all):
        expected = sweep(metric=metric, engine="full")
        for options in ({}, {"engine": "cone", "batch_size": 1}):
            out = sweep(metric=metric, **options)
            assert (out.info["engine"], "fallback" in out.info) == ("cone", False)
            assert gap(out, expected) < 1e-5


@reads_tokens(lambda context: torch.stack([context.source_answer_index + 1] * 2, -1))
def next_logit(logits: Tensor, context: MetricContext) -> torch.Tensor:
    return logits.gather(1, context.source_answer_index[:, None] + 1)[:, 0]


def test_declared_columns_are_all_that_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = cone.ConeExecution._run

    def spied(self: Any, bucket: Any, columns: Any) -> Any:
        found = real(self, bucket, columns)
        seen.append((None if columns is None else columns.tolist(), found.shape[1]))
        return found

    monkeypatch.setattr(cone.ConeExecution, "_run", spied)
    sweep(metric=[next_logit, "logit_difference"])
    assert {(tuple(columns), width) for columns, width in seen} == {((1, 2, 3, 4, 5, 6), 6)}
    seen.clear()
    sweep(metric=[next_logit, "kl_divergence"])
    assert set(seen) == {(None, 64)}


def test_declared_metric_is_right(full: Outcome) -> None:
    assert gap(sweep(metric=next_logit), sweep(metric=next_logit, engine="full")) < 1e-5
    quiet = sweep(metric={"mine": lambda logits, context: next_logit(logits, context)})
    assert torch.allclose(quiet["mlp"], sweep(metric=next_logit)["mlp"], atol=1e-5)


def test_metric_that_reads_what_it_did_not_declare() -> None:
    @reads_tokens(lambda context: context.source_answer_index[:, None])
    def sly(logits: Tensor, context: Any) -> Tensor:
        return logits[:, 0]

    with pytest.raises(MetricError, match="'sly' reads logits of tokens that it did not declare"):
        sweep(metric=sly)


@pytest.mark.parametrize(
    "declared", [[1], torch.tensor([1.0]), torch.tensor([[64]]), torch.tensor([[-1]]), None]
)
def test_declaration_that_is_none(declared: Any) -> None:
    metric = reads_tokens(lambda context: declared)(lambda logits: logits[:, 0])
    with pytest.raises(MetricError, match="declares that it reads the tokens"):
        sweep(metric=metric)


# Memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [120_000, 200_000, "400 KiB", "1MB", "4 GiB", 10**12, None])
def test_every_budget_that_will_do_gives_the_same_numbers(
    full: Outcome, budget: int | str | None
) -> None:
    assert gap(sweep(memory_budget=budget, engine="cone"), full) < 1e-5
    model = tiny_model("llama")
    with traces(model) as seen:
        sweep(model, sites=LATER, memory_budget=budget)
    rows = from_the_middle(seen)
    plan = plan_sweep(model, Llama3, LATER, SOURCE, TARGET, memory_budget=budget)
    if isinstance(budget, int):
        assert plan.peak <= budget
    # At most three unpatched rows go along in each trace.
    assert plan.runs < sum(rows) <= plan.runs + 3 * len(plan.buckets)


def test_smaller_budgets_make_more_traces() -> None:
    plans = [
        plan_sweep(tiny_model("llama"), Llama3, SITES, SOURCE, TARGET, memory_budget=budget)
        for budget in (120_000, 200_000, 800_000, 10**9)
    ]
    counts = [len(plan.buckets) for plan in plans]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    assert len({plan.runs for plan in plans}) == 1


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, "", "much", "1 XB", "-1 GiB", [1]])
def test_malformed_budget(budget: Any) -> None:
    model = tiny_model("llama")
    told = "must be a positive number of bytes, or a string"
    with traces(model) as seen, pytest.raises(MemoryBudgetError, match=told):
        sweep(model, memory_budget=budget)
    assert seen == []


def test_what_cannot_fit_says_what_would() -> None:
    with pytest.raises(MemoryBudgetError, match=r"needs [\d.]+ KiB.*memory_budget is 1000 B") as no:
        sweep(memory_budget=1000)
    needed = float(re.search(r"needs ([\d.]+) KiB", str(no.value))[1])
    sweep(memory_budget=int((needed + 0.1) * 1024))
    with pytest.raises(MemoryBudgetError):
        sweep(memory_budget=int((needed - 1) * 1024))


def test_recorded_runs_may_lie_elsewhere(full: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do in host memory, where they do not fit on a device."""
    real = limits.limits_of
    stored = []

    def on_host(*arguments: Any, **options: Any) -> Any:
        return attrs.evolve(real(*arguments, **options), store=torch.device("cpu"))

    def spied(value: Any, store: Any) -> Any:
        stored.append(store)
        return value.to(store, copy=True)

    monkeypatch.setattr("nnpatch_core.sweep.sweep.limits_of", on_host)
    monkeypatch.setattr(target, "_stored", spied)
    assert gap(sweep(engine="cone"), full) < 1e-5
    assert set(stored) == {torch.device("cpu")}


class OnDevice:
    """As if the model were on a device with a memory of its own."""

    type = "cuda"


def test_a_small_device_keeps_recorded_runs_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    sites = [site for grid in SITES.grids(model, Llama3, 6).values() for site in grid.sites]
    patches = bind_cells(sites, NNsight(model), 6)
    limits_of = functools.partial(limits.limits_of, patches, 64, 6, batch_size=None, whole=False)
    monkeypatch.setattr(limits, "input_device", lambda model: OnDevice())
    wide = limits_of(given=10**9)
    assert (wide.store, wide.prompts) == (None, 64)
    needs = wide.needs
    narrow = 4 * 64 * needs.forward
    found = limits_of(given=narrow)
    assert found.recorded in (needs.ahead, needs.recorded)
    tight = 2 * (needs.forward + needs.recorded) * 8
    found = limits_of(given=tight)
    # There is room for one layer's, which are read back before it runs.
    assert (found.store, found.recorded) == (torch.device("cpu"), needs.ahead)
    assert 0 < needs.ahead < needs.recorded
    assert found.prompts > 8


class Small(nn.Module):
    """A device that has no room for more than so many rows."""

    def __init__(self, inner: Any, most: int) -> None:
        super().__init__()
        self.inner, self.most = inner, most
        self.tried: list[int] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.tried.append(len(hidden))
        if len(hidden) > self.most:
            raise torch.OutOfMemoryError("no room")
        return self.inner(hidden)


@pytest.mark.parametrize("most", [3, 4, 10])
def test_out_of_memory_halves_the_bucket_and_goes_on(full: Outcome, most: int) -> None:
    model = tiny_model("llama")
    small = Small(model.model.layers[2].mlp, most)
    model.model.layers[2].mlp = small
    told = "do not fit on the device at once.*half of them"
    with traces(model) as seen, pytest.warns(MemoryWarning, match=told):
        out = sweep(model, engine="cone")
    assert out.info["engine"] == "cone"
    assert gap(out, full) < 1e-5
    # What did not fit was no trace that ended.
    assert min(from_the_middle(seen)) <= most < max(small.tried)


def test_a_row_that_does_not_fit_alone_is_the_devices_own_error() -> None:
    model = tiny_model("llama")
    # Three prompts are recorded together; a row alone is refused when it is run.
    model.model.layers[2].mlp = Small(model.model.layers[2].mlp, 3)
    real, calls = model.model.layers[2].mlp.forward, []

    def shrinking(hidden: Any) -> Any:
        calls.append(len(hidden))
        if len(calls) > 2:
            raise torch.OutOfMemoryError("no room")
        return real(hidden)

    model.model.layers[2].mlp.forward = shrinking
    with pytest.warns(MemoryWarning), pytest.raises(torch.OutOfMemoryError, match="no room"):
        sweep(model, engine="cone")


# Plans -------------------------------------------------------------------------------------------


def test_plan_is_what_the_sweep_does() -> None:
    model = tiny_model("llama")
    plan = plan_sweep(model, Llama3, LATER, SOURCE, TARGET)
    with traces(model) as seen:
        out = sweep(model, sites=LATER)
    rows = from_the_middle(seen)
    assert plan.elided == sum(int(out.cells[name].elided.sum()) for name in out)
    # Unpatched rows: of each prompt and one more with the longest and with single tokens, and one
    # with any others.
    starts = [bucket.start for bucket in plan.buckets]
    alone = [len(SOURCE) + 1 if start in (starts[0], 5) else 1 for start in sorted(set(starts))]
    assert sum(rows) == plan.runs + sum(alone)
    assert len(rows) == len(plan.buckets)
    # Of the first layer a sweep finds more than a plan, which knows tokens only.
    more = plan_sweep(tiny_model("llama"), Llama3, SITES, SOURCE, TARGET)
    every = sweep()
    assert more.elided < sum(int(every.cells[name].elided.sum()) for name in every)


def test_plan_needs_no_weights() -> None:
    with torch.device("meta"):
        model = tiny_model("llama")
    plan = plan_sweep(model, Llama3, SITES, SOURCE, TARGET, memory_budget="1 GiB")
    real = plan_sweep(tiny_model("llama"), Llama3, SITES, SOURCE, TARGET)
    assert (plan.cells, plan.elided) == (real.cells, real.elided)


def test_plan_of_an_ablation_elides_nothing() -> None:
    plan = plan_sweep(tiny_model("llama"), Llama3, SITES, None, TARGET)
    assert plan.elided == 0
    assert plan.runs == plan.cells * 3


def test_plan_where_prompts_differ_in_length_elides_padding_only() -> None:
    mask = torch.ones_like(SOURCE)
    mask[0, :2] = 0
    sites = Sites("resid", layers=[0], seq_pos_type="each")
    model = tiny_model("llama")
    plan = plan_sweep(model, Llama3, sites, TARGET, TARGET, source_attention_mask=mask)
    assert plan.runs == 4
    plan = plan_sweep(model, Llama3, sites, TARGET, TARGET, attention_mask=mask)
    assert plan.runs == 0


def test_plan_describes_itself() -> None:
    plan = plan_sweep(tiny_model("llama"), Llama3, SITES, SOURCE, TARGET)
    told = plan.describe()
    for number in (plan.cells, plan.elided, plan.token_layers, plan.full_token_layers):
        assert str(number) in told
    assert [line.split()[0] for line in told.splitlines()] == [
        *("cells", "elided", "traces", "token-layers", "peak")
    ]


def test_plan_of_what_the_cone_engine_cannot_do() -> None:
    with pytest.raises(EngineError, match="cannot run from the middle"):
        plan_sweep(tiny_model("llama"), attrs.evolve(Llama3, cone=False), SITES, SOURCE, TARGET)


def test_a_sweep_without_any_difference_runs_nothing() -> None:
    out = ablation_patching(
        tiny_model("llama"),
        Llama3,
        Sites("resid", seq_pos_type="each"),
        TARGET,
        *ANSWERS,
        method="resample",
        reference=TARGET[:1],
        progress=False,
    )
    # The first prompt gets what it had.
    assert out.cells["resid"].elided[:, 0].all()
    assert (out.per_prompt("resid")[..., 0] == 0).all()
    assert not out.cells["resid"].elided[:, 1].all()
    model = tiny_model("llama")
    with traces(model) as seen:
        same = ablation_patching(
            model,
            Llama3,
            Sites("resid", seq_pos_type="each"),
            TARGET[:1],
            *(answers[:1] for answers in ANSWERS),
            method="resample",
            reference=TARGET[:1],
            progress=False,
        )
    # The unpatched runs alone: the prompt's, the donor's, and the prompt's again to be recorded.
    assert seen == [Trace(1, 6, False)] * 3
    assert (same["resid"] == 0).all()
    assert same.info["engine"] == "cone"


def test_outcome_tells_what_was_elided() -> None:
    out = sweep(sites=Sites(["resid", "q"], layers=[1, 2], seq_pos_type="each"))
    # Of the first token all prompts have one; from the second on the first prompt differs.
    assert out.elided("resid").tolist() == [[False] * 6, [True] + [False] * 5, [True] + [False] * 5]
    assert out.elided("q").shape == out["q"].shape
    assert not out.elided("q")[0].any()
    assert out.elided("q")[1, 0].all()
    assert (out["resid"][out.elided("resid")] == 0).all()


def test_outcome_keeps_what_was_elided(tmp_path: Path) -> None:
    out = sweep()
    out.save(tmp_path / "out")
    again = type(out).load(tmp_path / "out")
    for name in out:
        assert again.cells[name].elided.equal(out.cells[name].elided)


# Progress ----------------------------------------------------------------------------------------


def bar(**options: Any) -> list[str]:
    told = io.StringIO()
    with redirect_stderr(told):
        sweep(progress=True, **options)
    return told.getvalue().replace("\r", "\n").strip().splitlines()


def test_bar_counts_cells_and_what_was_elided() -> None:
    lines = bar()
    out = sweep()
    cells = sum(len(out.cells[name].index) for name in out)
    elided = sum(int(out.cells[name].elided.sum()) for name in out)
    assert "cone engine" in lines[-1]
    assert f"{cells}/{cells} cells" in lines[-1]
    assert f"{elided / 3:.0f} elided" in lines[-1]
    assert "about 00:00 left" in lines[-1]
    assert "full engine" in bar(engine="full")[-1]
    assert "elided" not in bar(engine="full")[-1]


def test_bar_of_a_sweep_that_fell_back() -> None:
    told = io.StringIO()
    with redirect_stderr(told), pytest.warns(EngineWarning):
        out = sweep(shifted(), progress=True)
    assert out.info["engine"] == "full"
    last = told.getvalue().replace("\r", "\n").strip().splitlines()[-1]
    cells = sum(len(out.cells[name].index) for name in out)
    assert "full engine" in last
    assert f"{cells}/{cells} cells" in last
    assert "elided" not in last


def test_no_bar() -> None:
    told = io.StringIO()
    with redirect_stderr(told):
        sweep(progress=False)
    assert told.getvalue() == ""


def test_estimate_goes_by_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the cells, at half of the work, is half of the time."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    nothing = np.zeros((10, 2), dtype=np.bool_)
    shown = Progress(10, 2, shown=False)
    assert shown.left() is None
    shown.begin(slice(0, 2), "cone", 100.0, nothing, nothing)
    assert shown.left() is None
    clock[0] = 30.0
    shown.advance(2, 50.0)
    assert shown.left() == pytest.approx(30.0)
    clock[0] = 40.0
    shown.advance(18, 50.0)
    assert shown.left() == pytest.approx(0.0)


def test_estimate_counts_prompts_that_have_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = Progress(10, 4, shown=False)
    one = np.zeros((10, 1), dtype=np.bool_)
    shown.begin(slice(0, 1), "cone", 10.0, one, one)
    clock[0] = 5.0
    shown.advance(10, 10.0)
    assert shown.left() == pytest.approx(15.0)


def test_tiny_api_runs_in_the_cone_engine(full: Outcome) -> None:
    assert gap(sweep(api=tiny_api()), full) < 1e-5


def test_a_plan_tells_the_work_of_recorded_runs() -> None:
    model = tiny_model("llama")
    of_two = plan_sweep(model, Llama3, SITES, SOURCE, TARGET)
    of_one = plan_sweep(model, Llama3, SITES, None, TARGET)
    one = TARGET.numel() * of_two.n_layers
    assert (of_two.recorded_token_layers, of_one.recorded_token_layers) == (2 * one, one)
