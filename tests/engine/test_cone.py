"""The cone engine against whole forwards and plain hooks, and what it refuses."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from nnpatch_core import (
    MultiSite,
    Outcome,
    Site,
    Sites,
    activation_patching,
    decoder_components,
    reads_tokens,
)
from nnpatch_core.engine.cone.execution import ConeExecution
from nnpatch_core.engine.full import FullExecution
from nnpatch_core.errors import (
    EngineError,
    EngineWarning,
    MemoryBudgetError,
    MetricError,
    PositionError,
)
from nnpatch_core.testing import tiny_model
from nnpatch_llama import Llama3
from tests.helpers.engines import ATOL, check_cone, cut_by, gap_of
from tests.helpers.families import FAMILIES, model_of
from tests.helpers.metrics import answer_logit
from tests.helpers.oracle import COMPONENTS, Place, lay_out, random_prompts
from tests.helpers.pairs import VARIANTS, Pairs, unlike_pairs
from tests.helpers.strategies import grids, lists_of_sites, pairs_of

#: Padding is what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")


# The last layer, of which the last token alone is read.


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2"])
def test_attention_is_not_taken_for_the_mlp_that_sees_the_last_token_alone(family: str) -> None:
    """Nothing is patched in the last layer, which lower cells pass whole."""
    api, model = FAMILIES[family].api, model_of(family)
    both = MultiSite([Site.get_site(api, "mlp", 0), Site.get_site(api, "resid", 1, seq_pos=[-1])])
    cells = [both, Site.get_site(api, "resid", 0, seq_pos=[1]), Site.get_site(api, "mlp", 0)]
    outcomes = [
        activation_patching(
            model,
            api,
            Sites.from_sites(cells),
            torch.tensor([[5, 6, 7, 8, 9, 4]]),
            torch.tensor([[5, 9, 7, 8, 9, 4]]),
            torch.tensor([1]),
            torch.tensor([2]),
            engine=engine,
            progress=False,
        )
        for engine in ("cone", "full")
    ]
    assert gap_of(*outcomes) < ATOL


# Any sweep.


@reads_tokens(lambda context: torch.tensor([61, 4]))
def some_logits(logits: Tensor) -> Tensor:
    return logits[:, 4] * 2 - logits[:, 61]


def smallest(logits: Tensor) -> Tensor:
    return logits.min(-1).values


#: Of few columns, and of all.
METRICS: list[Any] = [
    "logit_difference",
    [answer_logit, "logit_difference"],
    {"ours": some_logits},
    ["logit_difference", "kl_divergence"],
    [smallest, answer_logit, "answer_log_probability"],
]


@attrs.frozen
class Sweep:
    """A sweep in full, and how the cone engine is to cut it."""

    pairs: Pairs
    sites: Any
    #: Of the ablation, or None for activation patching.
    method: str | None
    reference: tuple[int, ...]
    per_position: bool
    metric: Any
    cut: tuple[float, int]
    batch_size: int | None
    #: How often the least possible memory; None is no limit.
    budget: float | None

    def run(self, engine: str, **options: Any) -> Outcome:
        options["metric"] = self.metric
        if self.method is None:
            return self.pairs.sweep(self.sites, engine, **options)
        if self.method != "zero" and self.reference:
            options["reference"] = [lay_out(random_prompts(self.reference, seed=9), "mixed")]
        options["per_position"] = self.per_position and self.method == "mean"
        return self.pairs.ablate(self.sites, engine, method=self.method, **options)


@st.composite
def sweeps(draw: st.DrawFn) -> Sweep:
    pairs = draw(pairs_of())
    method = draw(st.sampled_from([None, None, "zero", "mean", "resample"]))
    reference = draw(st.lists(st.integers(2, 9), max_size=3))
    if method == "resample" and len(pairs.target) == 1:
        reference = [5, *reference]
    return Sweep(
        pairs,
        draw(grids(pairs) | lists_of_sites(pairs)),
        method,
        tuple(reference),
        draw(st.booleans()),
        draw(st.sampled_from(METRICS)),
        draw(st.tuples(st.sampled_from([0.0, 1.0, 16.0, 1e6]), st.sampled_from([1, 7, 40, 2048]))),
        draw(st.sampled_from([None, None, 1, 2])),
        draw(st.sampled_from([None, 1.0, 1.5, 5.0])),
    )


def least_memory(run: Callable[..., Outcome]) -> float:
    """The bytes that the refusal of a single one names; it rounds them to a tenth."""
    with pytest.raises(MemoryBudgetError) as caught:
        run("cone", memory_budget=1)
    found = re.search(r"needs ([\d.]+) (KiB|MiB),", str(caught.value))
    assert found, str(caught.value)
    return (float(found[1]) + 0.06) * {"KiB": 2**10, "MiB": 2**20}[found[2]]


@given(sweeps())
@settings(max_examples=220)
def test_any_sweep_equals_whole_forwards(sweep: Sweep) -> None:
    try:
        expected = sweep.run("full")
    except (MetricError, PositionError):
        # Runs that do not differ, or positions that are padding in every prompt.
        reject()
    options: dict[str, Any] = {"batch_size": sweep.batch_size}
    if sweep.budget is not None:
        options["memory_budget"] = int(sweep.budget * least_memory(sweep.run))
    with cut_by(*sweep.cut):
        check_cone(sweep.run("cone", **options), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_component_at_every_position(variant: str) -> None:
    """The whole grid at once: most effects are far larger than what the engines may differ by."""
    prompts = random_prompts((7, 5, 6), seed=1), random_prompts((7, 5, 6), seed=2)
    pairs = Pairs(variant, *prompts, "mixed")
    sites = Sites(COMPONENTS, seq_pos_type="each")
    found, expected = pairs.sweep(sites, "cone"), pairs.sweep(sites, "full")
    check_cone(found, expected)
    unpatched = expected.baseline.target
    moved = [(expected.patched(name) - unpatched).nan_to_num().flatten() for name in COMPONENTS]
    effects = torch.cat(moved).abs()
    assert (effects[effects > ATOL] > 100 * ATOL).float().mean() > 0.8
    assert effects.max() > 1


@pytest.mark.parametrize("overhead", [0.0, 16.0, 1e6])
@pytest.mark.parametrize("variant", ["llama", "gemma2"])
def test_pairs_of_other_lengths_beside_each_other(variant: str, overhead: float) -> None:
    """A row may run from further left than it is patched: what its source lacks stays as it is."""
    source, prompts = random_prompts((8, 4, 6), seed=1), random_prompts((5, 8, 6), seed=2)
    pairs = Pairs(variant, source, prompts, "mixed")
    several = MultiSite(Site.get_site(pairs.api, name, 1, None, [2, 5]) for name in ("mlp", "k"))
    for sites in (
        Sites(COMPONENTS),
        Sites(COMPONENTS, seq_pos_type="custom_constant", seq_pos=[2, 3, 6]),
        Sites.from_sites([several, Site.get_site(pairs.api, "resid_pre", 0)]),
    ):
        with cut_by(overhead, 2048):
            found = pairs.sweep(sites, "cone")
        check_cone(found, pairs.sweep(sites, "full"))


# Plain hooks, each prompt alone.


@given(st.data(), pairs_of(), st.sampled_from(["patch", "zero", "mean"]))
@settings(max_examples=80)
def test_a_sweep_equals_plain_hooks(data: st.DataObject, pairs: Pairs, method: str) -> None:
    sites = data.draw(grids(pairs) | lists_of_sites(pairs))
    oracle, width = pairs.oracle, pairs.width
    lengths = list(map(len, pairs.target))
    if method == "patch":
        lengths = [min(len(s), len(t)) for s, t in zip(pairs.source, pairs.target, strict=True)]
    try:
        with cut_by(data.draw(st.sampled_from([0.0, 16.0])), 40):
            if method == "patch":
                out = pairs.sweep(sites, "cone")
            else:
                out = pairs.ablate(sites, "cone", method=method)
    except (MetricError, PositionError):
        reject()
    assert out.info["engine"] == "cone"
    tokens = torch.zeros(1, width, dtype=torch.int64)
    for name, cells in sites.get_sites_dict(pairs.model, pairs.api, tokens).items():
        expected = []
        for cell in cells:
            groups = [(site, site.group(width)) for site in cell.sites]
            if not any(width - at <= max(lengths) for _, group in groups for at in group):
                continue
            places = [
                Place(site.component, site.layer, site.head, tuple(width - at for at in group))
                for site, group in groups
            ]
            logits = []
            for source, prompt in zip(pairs.source, pairs.target, strict=True):
                donor = oracle.of_prompt(source)
                if method != "patch":
                    donor = oracle.zeros if method == "zero" else oracle.mean(pairs.target)
                logits.append(oracle.replaced(prompt, places, donor))
            expected.append(pairs.difference(torch.stack(logits)))
        found = out.raw["logit_difference"][name]
        assert len(found) == len(expected)
        if expected:
            torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=0)


# Other types of numbers.


def precise(monkeypatch: pytest.MonkeyPatch, model: Any) -> dict[str, dict[Any, Tensor]]:
    """Will hold each engine's logits, before they are rounded to float32."""
    seen: dict[str, dict[Any, Tensor]] = {"full": {}, "cone": {}}
    last: list[Tensor] = []
    ran: list[Tensor] = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: last.append(output[:, -1])
    )

    def spied(engine: str, parts: Callable[..., Any]) -> Callable[..., Any]:
        def spy(run: Any, *arguments: Any) -> Iterator[Any]:
            for part in parts(run, *arguments):
                logits = last[-1][ran[-1]] if engine == "cone" else last[-1]
                pairs = zip(part.cells.tolist(), part.prompts.tolist(), strict=True)
                seen[engine].update(zip(pairs, logits, strict=True))
                yield part

        return spy

    run = ConeExecution._run

    def noted(self: ConeExecution, bucket: Any, columns: Any) -> Tensor:
        # Some rows of a bucket may be no run of a cell.
        ran.append(torch.from_numpy(bucket.runs.cell >= 0))
        return run(self, bucket, columns)

    monkeypatch.setattr(ConeExecution, "_run", noted)
    monkeypatch.setattr(ConeExecution, "parts", spied("cone", ConeExecution.parts))
    monkeypatch.setattr(FullExecution, "parts", spied("full", FullExecution.parts))
    return seen


ALL_LOGITS = ["logit_difference", "kl_divergence"]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "starcoder2"])
def test_in_float64_the_engines_agree_to_its_last_digits(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In families whose norms, too, are computed in it."""
    model = FAMILIES[family].model().double()
    seen = precise(monkeypatch, model)
    pairs = unlike_pairs("llama", 8, 5, 7)
    for engine in seen:
        pairs.sweep(
            Sites(COMPONENTS, seq_pos_type="each"),
            engine,
            model,
            api=FAMILIES[family].api,
            metric=ALL_LOGITS,
        )
    # Where a position is padding in one prompt, the whole forward is that prompt as it was.
    shared = seen["cone"].keys() & seen["full"].keys()
    assert shared == seen["cone"].keys()
    assert len(shared) > 0.7 * len(seen["full"])
    assert all(seen["cone"][key].dtype == torch.float64 for key in shared)
    gaps = [(seen["cone"][key] - seen["full"][key]).abs().max() for key in shared]
    assert max(gaps) <= 1e-9


@pytest.mark.parametrize("variant", ["llama", "mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_in_half_precision_the_engines_agree_to_its_rounding(
    variant: str, dtype: torch.dtype, atol: float
) -> None:
    model = tiny_model(VARIANTS[variant].family).to(dtype)
    pairs = unlike_pairs(variant, 8, 5, 7)
    sites = Sites(COMPONENTS, seq_pos_type="each", heads=[0, 1])
    expected = pairs.sweep(sites, "full", model)
    found = pairs.sweep(sites, "cone", model)
    largest = max(expected.baseline.source.abs().max(), expected.baseline.target.abs().max())
    check_cone(found, expected, atol * largest.item())
    effects = (expected.patched("resid") - expected.baseline.target).abs()
    assert effects.nan_to_num().max() > 10 * atol * largest


# Other families.

#: What the engine finds out where the adapter does not say it.
UNFIT = {
    "bloom": "does not run from the middle of a prompt",
    "lfm2": "does not hand out keys and values",
    "olmo_hybrid": "does not hand out keys and values",
    "qwen3_next": "does not hand out keys and values",
}
DECLARED = [name for name, family in FAMILIES.items() if not family.api.cone]


def of_family(name: str, engine: str, **api: Any) -> Outcome:
    prompts = random_prompts((6, 4, 6), seed=1), random_prompts((6, 4, 6), seed=2)
    # One prompt that begins as its source does.
    prompts[1][2] = prompts[0][2][:3] + prompts[1][2][3:]
    adapter = attrs.evolve(FAMILIES[name].api, **api)
    tables = (adapter.components, *adapter.kinds.values())
    names = list(dict.fromkeys(component for table in tables for component in table))
    sites = Sites(names, seq_pos_type="custom", seq_pos=[0, 2, 4, -1], heads=[0, 1])
    if name.startswith("falcon") and "by" not in name:
        sites = Sites(names, seq_pos_type="custom", seq_pos=[0, 2, 4, -1], heads=[0])
    return Pairs("llama", *prompts).sweep(sites, engine, model_of(name), api=adapter)


@functools.cache
def whole(name: str) -> Outcome:
    return of_family(name, "full")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_component_of_other_families(name: str) -> None:
    out = of_family(name, "auto")
    if name in DECLARED:
        assert out.info["engine"] == "full"
        assert "cannot run from the middle" in out.info["fallback"]
        assert gap_of(out, whole(name)) == 0
    else:
        check_cone(out, whole(name))


@pytest.mark.parametrize("name", DECLARED)
def test_what_an_adapter_does_not_say_is_found_out(name: str) -> None:
    if name in UNFIT:
        with pytest.warns(EngineWarning, match=UNFIT[name]):
            out = of_family(name, "auto", cone=True)
        assert UNFIT[name] in out.info["fallback"]
        assert gap_of(out, whole(name)) == 0
        with pytest.raises(EngineError, match=UNFIT[name]):
            of_family(name, "cone", cone=True)
    else:
        check_cone(of_family(name, "auto", cone=True), whole(name))


# What it refuses.


class Unfit:
    """An adapter of somebody's own, whose models cannot be run from the middle."""

    cone = False
    name = "Unfit"
    model_types = ("llama",)
    layers = "model.layers"
    components = decoder_components()

    def n_heads(self, config: Any, kind: str, layer: int) -> int:
        return Llama3.n_heads(config, kind, layer)


@pytest.mark.parametrize("api", [Unfit(), attrs.evolve(Llama3, name="Unfit", cone=False)])
def test_an_adapter_that_says_that_it_cannot(api: Any) -> None:
    pairs, sites = unlike_pairs("llama", 8, 5, 7), Sites("resid", seq_pos_type="last")
    with pytest.raises(EngineError, match="'Unfit' says that its models cannot run"):
        pairs.sweep(sites, "cone", api=api)
    out = pairs.sweep(sites, "auto", api=api)
    assert out.info["engine"] == "full"
    assert "'Unfit' says" in out.info["fallback"]
    full = pairs.sweep(sites, "full", api=api)
    assert "fallback" not in full.info
    assert gap_of(out, full) == 0


def test_a_model_that_takes_no_keys_and_values() -> None:
    model = tiny_model("llama")

    class NoCache(type(model)):
        def forward(self, input_ids: Any, attention_mask: Any = None, **others: Any) -> Any:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **others)

    model.__class__ = NoCache
    pairs, sites = unlike_pairs("llama", 8, 5, 7), Sites("resid", seq_pos_type="last")
    with pytest.raises(EngineError, match="NoCache does not take keys and values"):
        pairs.sweep(sites, "cone", model)
    with pytest.warns(EngineWarning, match="NoCache .* costs about 24.0 times"):
        out = pairs.sweep(sites, "auto", model)
    assert (out.info["engine"], "NoCache" in out.info["fallback"]) == ("full", True)
    assert gap_of(out, pairs.sweep(sites, "full", model)) == 0


def stateful() -> Callable[[Tensor], Tensor]:
    """A metric that knows which prompt each row is of, by its place."""
    weights = torch.tensor([1.0, 2.0, 3.0])

    def by_place(logits: Tensor) -> Tensor:
        return logits[:, 3] * weights[: len(logits)]

    return by_place


def test_a_metric_that_needs_all_prompts_in_their_order() -> None:
    pairs, sites = unlike_pairs("llama", 8, 5, 7), Sites("resid", seq_pos_type="last")
    expected = pairs.sweep(sites, "full", metric=stateful())
    for engine in ("cone", "auto"):
        out = pairs.sweep(sites, engine, metric=stateful())
        assert (out.info["engine"], "fallback" in out.info) == ("cone", False)
        assert gap_of(out, expected) < 1e-5
