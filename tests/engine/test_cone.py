"""The cone engine against whole forwards and plain hooks, and with faults planted in it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import attrs
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nnpatch_core import (
    DecoderAPI,
    MultiSite,
    Outcome,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    decoder_components,
    reads_tokens,
)
from nnpatch_core.engine import ConeRun, FullRun, cone, head, target
from nnpatch_core.errors import (
    EngineError,
    EngineWarning,
    MemoryBudgetError,
    MetricError,
    PositionError,
)
from nnpatch_core.memory import needs as memory
from nnpatch_core.testing import tiny_model
from nnpatch_core.tracing import trace
from nnpatch_gemma import Gemma, Gemma2, Gemma3
from nnpatch_llama import Llama3
from nnpatch_mistral import Mistral
from tests.adapters.test_families import FAMILIES, model_of
from tests.helpers.oracle import COMPONENTS, Oracle, Place, Prompt, lay_out, random_prompts

#: Padding is what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

#: At most 9e-6 was measured in thousands of sweeps, and most effects are far above 1e-3.
ATOL = 2e-5
LAYERS = 3
LAYOUTS = ("left", "right", "mixed")


class Variant(NamedTuple):
    """An adapter, and a tiny model for it with `key_value` heads."""

    api: DecoderAPI
    family: str
    key_value: int = 2
    config: tuple[tuple[str, Any], ...] = ()


#: The sliding windows are 3 tokens wide, fewer than most prompts have.
VARIANTS = {
    "llama": Variant(Llama3, "llama"),
    "llama, one key": Variant(Llama3, "llama", 1),
    "llama, a key each": Variant(Llama3, "llama", 4),
    "mistral": Variant(Mistral, "mistral"),
    "mistral, no window": Variant(Mistral, "mistral", 2, (("sliding_window", None),)),
    "mistral, one key": Variant(Mistral, "mistral", 1),
    "gemma": Variant(Gemma, "gemma", 1),
    "gemma2": Variant(Gemma2, "gemma2"),
    "gemma3": Variant(Gemma3, "gemma3_text"),
    "gemma3, one key": Variant(Gemma3, "gemma3_text", 1),
}


@functools.cache
def model_and_oracle(variant: str, seed: int = 0) -> tuple[Any, Oracle]:
    _, family, key_value, config = VARIANTS[variant]
    model = tiny_model(family, seed=seed, num_key_value_heads=key_value, **dict(config))
    return model, Oracle(model, family)


@attrs.frozen
class Pairs:
    """Source and target prompts of one variant, and how they stand in their batches."""

    variant: str
    source: list[Prompt]
    target: list[Prompt]
    layout: str = "left"
    spare: int = 0

    @property
    def model(self) -> Any:
        return model_and_oracle(self.variant)[0]

    @property
    def oracle(self) -> Oracle:
        return model_and_oracle(self.variant)[1]

    @property
    def api(self) -> DecoderAPI:
        return VARIANTS[self.variant].api

    @property
    def width(self) -> int:
        return max(map(len, self.source + self.target)) + self.spare

    @property
    def answers(self) -> tuple[Tensor, Tensor]:
        """Each prompt has its own, so that one measured as another is noticed."""
        numbers = torch.arange(len(self.source))
        return 7 + numbers, 50 - numbers

    def difference(self, logits: Tensor) -> Tensor:
        """The logit difference of each prompt, of logits `[batch, vocab]`."""
        numbers = torch.arange(len(self.source))
        return logits[numbers, self.answers[0]] - logits[numbers, self.answers[1]]

    def sweep(self, sites: Any, engine: str, model: Any = None, **options: Any) -> Outcome:
        source, source_mask = lay_out(self.source, self.layout, self.width, seed=3)
        target, target_mask = lay_out(self.target, self.layout, self.width, seed=4)
        return activation_patching(
            self.model if model is None else model,
            options.pop("api", self.api),
            sites,
            source,
            target,
            *self.answers,
            source_attention_mask=source_mask,
            target_attention_mask=target_mask,
            engine=engine,
            progress=False,
            **options,
        )

    def ablate(self, sites: Any, engine: str, model: Any = None, **options: Any) -> Outcome:
        tokens, mask = lay_out(self.target, self.layout, self.width, seed=4)
        return ablation_patching(
            self.model if model is None else model,
            self.api,
            sites,
            tokens,
            *self.answers,
            attention_mask=mask,
            engine=engine,
            progress=False,
            **options,
        )


def gap_of(found: Outcome, expected: Outcome) -> float:
    """The largest difference of any prompt's metrics in any cell; relative, where above 1."""
    largest = 0.0
    for metric, names in expected.raw.items():
        assert list(found.raw[metric]) == list(names)
        for name, values in names.items():
            assert torch.equal(found.cells[name].index, expected.cells[name].index)
            if values.numel():
                gaps = (found.raw[metric][name] - values) / values.abs().clamp(min=1)
                largest = max(largest, gaps.abs().max().item())
    return largest


def check_cone(found: Outcome, expected: Outcome, atol: float = ATOL) -> None:
    """The first was run by the cone engine, the second by whole forwards: they agree."""
    assert (found.info["engine"], expected.info["engine"]) == ("cone", "full")
    assert "fallback" not in found.info
    assert gap_of(found, expected) <= atol
    for metric, names in found.raw.items():
        unpatched = found.baselines[metric].target
        for name, values in names.items():
            elided = found.cells[name].elided
            assert torch.equal(values[elided], unpatched.expand_as(values)[elided])


@contextmanager
def cut_by(overhead: float, tokens_at_once: int) -> Iterator[None]:
    """Plan for a machine of other costs, so that rows are cut into other buckets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(memory._OVERHEAD, "cpu", overhead)
        patch.setitem(memory._TOKENS_AT_ONCE, "cpu", tokens_at_once)
        yield


# Any sweep.


@reads_tokens(lambda context: context.source_answer_index[:, None])
def answer_logit(logits: Tensor, context: Any) -> Tensor:
    return logits.gather(1, context.source_answer_index[:, None])[:, 0]


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


@st.composite
def pairs_of(draw: st.DrawFn) -> Pairs:
    count, seed = draw(st.integers(1, 4)), draw(st.integers(0, 10_000))
    lengths = draw(st.lists(st.integers(2, 9), min_size=count, max_size=count))
    source = random_prompts(lengths, seed)
    target = []
    for prompt, other in zip(source, random_prompts(lengths, seed + 1), strict=True):
        kind = draw(st.sampled_from(["from here on", "here and there", "other length", "same"]))
        if kind == "from here on":
            here = draw(st.integers(0, len(prompt) - 1))
            target.append(prompt[:here] + other[here:])
        elif kind == "here and there":
            there = draw(st.sets(st.integers(0, len(prompt) - 1), min_size=1))
            pairs = zip(prompt, other, strict=True)
            target.append(tuple(two[at in there] for at, two in enumerate(pairs)))
        elif kind == "other length":
            target += random_prompts([draw(st.integers(2, 9))], seed + 2)
        else:
            target.append(prompt)
    return Pairs(
        draw(st.sampled_from(sorted(VARIANTS))),
        source,
        target,
        draw(st.sampled_from(LAYOUTS)),
        draw(st.integers(0, 1)),
    )


@st.composite
def grids(draw: st.DrawFn, pairs: Pairs) -> Sites:
    """Components, layers, heads and positions, each cell patched alone."""
    names = draw(st.lists(st.sampled_from(COMPONENTS), min_size=1, max_size=3, unique=True))
    layers = draw(st.none() | st.lists(st.integers(0, LAYERS - 1), min_size=1, unique=True))
    counts = [len(found) for name in names if (found := pairs.oracle.heads(name)) != [None]]
    heads = None
    if counts:
        some = st.lists(st.integers(0, min(counts) - 1), min_size=1, max_size=2, unique=True)
        heads = draw(st.none() | some)
    numbers = st.integers(-pairs.width, -1) | st.just(-1)
    positions = draw(st.lists(numbers, min_size=1, max_size=4, unique=True))
    kind = draw(
        st.sampled_from([None, "each", "last", "lastk", "custom", "custom_constant", "custom"])
    )
    seq_pos: Any = positions if kind in ("custom", "custom_constant") else None
    if kind == "lastk":
        seq_pos = draw(st.integers(1, min(3, pairs.width)))
    return Sites(names, layers, kind, seq_pos, heads)


@st.composite
def lists_of_sites(draw: st.DrawFn, pairs: Pairs) -> Any:
    """Cells of one to four sites; one component may come several times, and sites may overlap."""
    cells = []
    for _ in range(draw(st.integers(1, 6))):
        sites = []
        for _ in range(draw(st.integers(1, 4))):
            component = draw(st.sampled_from(COMPONENTS))
            layer = draw(st.integers(0, LAYERS - 1))
            head = draw(st.none() | st.sampled_from(pairs.oracle.heads(component)))
            numbers = st.integers(-pairs.width, -1)
            positions = draw(st.none() | st.lists(numbers, min_size=1, max_size=3, unique=True))
            sites.append(Site.get_site(pairs.api, component, layer, head, positions))
        cells.append(sites[0] if len(sites) == 1 else MultiSite(sites))
    return Sites.from_sites(cells)


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

    run = ConeRun._run

    def noted(self: ConeRun, bucket: Any, columns: Any) -> Tensor:
        # Some rows of a bucket may be no run of a cell.
        ran.append(torch.from_numpy(bucket.rows.cell >= 0))
        return run(self, bucket, columns)

    monkeypatch.setattr(ConeRun, "_run", noted)
    monkeypatch.setattr(ConeRun, "parts", spied("cone", ConeRun.parts))
    monkeypatch.setattr(FullRun, "parts", spied("full", FullRun.parts))
    return seen


def unlike(prompts: list[Prompt]) -> list[Prompt]:
    """Prompts as long, with another token everywhere."""
    return [tuple((token + 17) % 61 + 3 for token in prompt) for prompt in prompts]


def unlike_pairs(variant: str, *lengths: int) -> Pairs:
    source = random_prompts(lengths, seed=1)
    return Pairs(variant, source, unlike(source))


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


# What need not be run.


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Will hold the first position of each trace of rows."""
    starts: list[int] = []
    forward = cone.forward

    def spy(*arguments: Any, **options: Any) -> Tensor:
        starts.append(options["start"])
        return forward(*arguments, **options)

    monkeypatch.setattr(cone, "forward", spy)
    return starts


def layers_run(model: Any) -> list[int]:
    """Will hold for each layer the tokens that have passed it, of all rows."""
    counts = [0] * LAYERS

    def count(number: int, output: Tensor) -> None:
        counts[number] += output.shape[0] * output.shape[1]

    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(
            lambda module, args, output, number=number: count(number, output)
        )
    return counts


#: Prompts that part at position 0, in the middle, at the last token, and never; two are padded.
BEFORE = random_prompts((7, 7, 5, 6), seed=1)
OTHER = unlike(BEFORE)
PARTING = [0, 4, 4, 6]
PARTED = [
    one[:at] + two[at:] for one, two, at in zip(BEFORE, OTHER, PARTING, strict=True)
]  # fmt: skip
PARTING_PAIRS = Pairs("llama", BEFORE, PARTED)
WIDTH = 7


def parting(row: int) -> int:
    """The first position in the batch where a prompt's runs differ; its width if none does."""
    return PARTING[row] + WIDTH - len(BEFORE[row])


def test_nothing_left_of_where_a_prompt_parts_from_its_source_is_run() -> None:
    sites = Sites(COMPONENTS, seq_pos_type="each")
    out = PARTING_PAIRS.sweep(sites, "cone")
    for name in COMPONENTS:
        cells = out.cells[name]
        positions = cells.index[:, [axis.name for axis in cells.axes].index("position")]
        for row in range(4):
            assert torch.equal(cells.elided[:, row], positions < parting(row)), (name, row)
        unpatched = out.baseline.target.expand(len(positions), -1)
        assert torch.equal(out.raw["logit_difference"][name][cells.elided], unpatched[cells.elided])


@pytest.mark.parametrize(
    ("names", "layers"),
    [(["resid_pre", "mlp", "resid"], [0, 1, 2]), (["resid"], [1, 2]), (["resid"], [2]), ("q", [1])],
)
def test_what_is_elided_costs_nothing(
    names: Any, layers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row that is run passes the layers above its entry, from its own token on."""
    model = tiny_model("llama")
    counts, starts = layers_run(model), spied(monkeypatch)
    sites = Sites(names, layers, "each", heads=[3] if names == "q" else None)
    with cut_by(0.0, 10**6):
        out = PARTING_PAIRS.sweep(sites, "cone", model)
    assert out.info["engine"] == "cone"
    # The first layer of each cell's rows: `resid` enters after its own.
    entries = [layer + (name == "resid") for name in out for layer in layers]
    # The source run and the target run, and of each number of tokens an unpatched row; of the
    # longest and of single tokens one of each of the four prompts, and one that enters with the
    # last.
    watched = sum(range(2, WIDTH)) + 4 * (WIDTH + 1)
    expected = [
        2 * 4 * WIDTH + watched * (layer >= min(entries)) + (WIDTH + 1) * (layer >= max(entries))
        for layer in range(LAYERS)
    ]
    for position in range(WIDTH):
        rows = sum(parting(row) <= position for row in range(4))
        for layer in range(LAYERS):
            entered = sum(entry <= layer for entry in entries)
            expected[layer] += entered * rows * (WIDTH - position)
    assert counts == expected
    # Rows that pass no layer may as well run together.
    apart = min(entries) < LAYERS
    assert sorted(starts) == (list(range(min(map(parting, range(4))), WIDTH)) if apart else [0])


def test_a_token_that_differs_alone_changes_only_itself_below_attention() -> None:
    """At layer 0 what each token is on its own is compared by itself."""
    (prompt,) = random_prompts((7,), seed=1)
    changed = (*prompt[:3], prompt[3] % 60 + 3, *prompt[4:])
    beside = random_prompts((7,), seed=5)
    pairs = Pairs("llama", [prompt, *beside], [changed, *unlike(beside)])
    names = ["resid_pre", "q", "k", "v", "o", "mlp"]
    out = pairs.sweep(Sites(names, layers=[0], heads=[0], seq_pos_type="each"), "cone")
    for name in names:
        where = (~out.cells[name].elided[:, 0]).nonzero().flatten().tolist()
        assert where == ([3, 4, 5, 6] if name in ("o", "mlp") else [3])
        assert not out.cells[name].elided[:, 1].any()


def test_each_head_is_compared_by_its_own_columns() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        # The second head's queries are the same for every token, the third one's nearly so.
        model.model.layers[1].self_attn.q_proj.weight[8:16].zero_()
        model.model.layers[1].self_attn.q_proj.weight[17:24].zero_()
    pairs = unlike_pairs("llama", 5, 5)
    sites = Sites("q", layers=[1], seq_pos_type="last")
    found = pairs.sweep(sites, "cone", model)
    assert found.cells["q"].elided.tolist() == [[head == 1] * 2 for head in range(4)]
    check_cone(found, pairs.sweep(sites, "full", model))
    together = Sites.from_sites([Site.get_site(Llama3, "q", 1, None, [-1])])
    assert not pairs.sweep(together, "cone", model).cells["q"].elided.any()


def test_two_runs_of_one_prompt_are_not_run() -> None:
    prompts = random_prompts((6, 6), seed=1)
    pairs = Pairs("gemma2", prompts, [unlike(prompts)[0], prompts[1]])
    sites = Sites(COMPONENTS, seq_pos_type="each")
    out = pairs.sweep(sites, "cone")
    check_cone(out, pairs.sweep(sites, "full"))
    for name in COMPONENTS:
        assert out.cells[name].elided[:, 1].all()
        assert not out.cells[name].elided[:, 0].any()


def test_zeros_where_zeros_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    pairs, starts = unlike_pairs("llama", 8, 5, 7), spied(monkeypatch)
    sites = Sites("mlp", layers=[1], seq_pos_type="each")
    out = pairs.ablate(sites, "cone", model)
    assert out.info["engine"] == "cone"
    assert out.cells["mlp"].elided.all()
    assert starts == []
    unpatched = out.baseline.target
    assert torch.equal(out.patched("mlp")[1], unpatched.expand(8, -1))
    assert not pairs.ablate(Sites("mlp", layers=[2]), "cone", model).cells["mlp"].elided.any()
    assert starts


@pytest.mark.parametrize(
    ("overhead", "tokens_at_once", "traces"), [(0.0, 10**6, 7), (1e6, 10**6, 1), (0.0, 1, 7 * 9)]
)
def test_rows_are_cut_by_what_a_machine_costs(
    overhead: float, tokens_at_once: int, traces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = spied(monkeypatch)
    sites = Sites("resid_pre", seq_pos_type="each")
    with cut_by(overhead, tokens_at_once):
        unlike_pairs("llama", 7, 7, 7).sweep(sites, "cone")
    assert len(starts) == traces


# The head.


def projected(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Will hold what the head is given to project, and the weights that it projects by."""
    seen = []

    def spy(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append((given, weight))
        return nn.functional.linear(given, weight, bias)

    monkeypatch.setattr(head, "linear", spy)
    return seen


def test_only_the_columns_that_are_read_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    seen, whole_heads, starts = projected(monkeypatch), [], spied(monkeypatch)

    real = nn.Linear.forward

    def count(module: nn.Linear, given: Tensor) -> Tensor:
        output = real(module, given)
        if module is model.lm_head:
            whole_heads.append(output.shape)
        return output

    # No hook, as the head of a model with one there is left alone.
    monkeypatch.setattr(nn.Linear, "forward", count)
    pairs, sites = unlike_pairs("llama", 8, 5, 7), Sites("resid", seq_pos_type="each")
    out = pairs.sweep(sites, "cone", model, metric=["logit_difference", answer_logit])
    answers = sorted({*pairs.answers[0].tolist(), *pairs.answers[1].tolist()})
    assert len(seen) == len(starts)
    for last, weight in seen:
        assert last.shape[1:] == (1, 32)
        assert torch.equal(weight, model.lm_head.weight[answers])
    # The whole head runs in the source run and the target run, and nowhere else.
    assert [shape[0] for shape in whole_heads] == [3, 3]
    expected = pairs.sweep(sites, "full", model, metric=["logit_difference", answer_logit])
    check_cone(out, expected)
    seen.clear()
    whole_heads.clear()
    starts.clear()
    pairs.sweep(sites, "cone", model, metric=["logit_difference", "kl_divergence"])
    assert seen == []
    assert len(whole_heads) == len(starts) + 2
    assert {shape[1] for shape in whole_heads} == {1}


def test_the_head_projects_the_last_token_even_where_the_model_would_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")

    class KeepsAll(type(model)):
        def forward(
            self,
            input_ids: Any,
            attention_mask: Any = None,
            position_ids: Any = None,
            past_key_values: Any = None,
            use_cache: Any = None,
        ) -> Any:
            return super().forward(
                input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache
            )

    model.__class__ = KeepsAll
    seen = projected(monkeypatch)
    pairs, sites = unlike_pairs("llama", 8, 5, 7), Sites("resid", seq_pos_type="each")
    check_cone(pairs.sweep(sites, "cone", model), pairs.sweep(sites, "full", model))
    assert {last.shape[1] for last, _ in seen} == {1}


#: What a model does with its logits, as strongly as it can be seen.
Granite, Cohere = FAMILIES["granite"].api, FAMILIES["cohere"].api
AFTER_THE_HEAD = {
    "capped": (Gemma2, ("gemma2", {"final_logit_softcapping": 1.5})),
    "divided": (Granite, ("granite", {"logits_scaling": 7.0})),
    "multiplied": (Cohere, ("cohere", {"logit_scale": 3.0})),
    "with a bias": (FAMILIES["phi"].api, ("phi", {})),
}


@pytest.mark.parametrize("name", AFTER_THE_HEAD)
def test_what_comes_after_the_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    api, (family, config) = AFTER_THE_HEAD[name]
    model = tiny_model(family, **config)
    pairs = unlike_pairs("llama", 8, 5, 7)
    sites = Sites(["resid", "mlp"], seq_pos_type="each")
    seen = projected(monkeypatch)
    found = pairs.sweep(sites, "cone", model, api=api)
    assert seen
    check_cone(found, pairs.sweep(sites, "full", model, api=api))
    if name == "capped":
        # By far: no difference can be above 3, and many would be.
        given = torch.cat([last[:, 0] for last, _ in seen])
        uncapped = nn.functional.linear(given, model.lm_head.weight)
        assert (uncapped[:, 7] - uncapped[:, 50]).abs().max() > 4
        assert found.patched("resid").nan_to_num().abs().max() <= 3


class OwnLinear(nn.Linear):
    """A projection that does more than `nn.Linear`, such as a quantised one."""

    def forward(self, given: Tensor) -> Tensor:
        return super().forward(given) * 2


def test_a_head_that_is_no_plain_matrix_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.lm_head.__class__ = OwnLinear
    pairs, sites = unlike_pairs("llama", 8, 5, 7), Sites("resid", seq_pos_type="each")
    seen = projected(monkeypatch)
    check_cone(pairs.sweep(sites, "cone", model), pairs.sweep(sites, "full", model))
    assert seen == []


# Faults.

Plant = Callable[[pytest.MonkeyPatch], None]
PLANTS: dict[str, Plant] = {}
#: Which of them an unpatched row can show.
SEEN_UNPATCHED: list[str] = []


def fault(name: str, *, unpatched: bool = False) -> Callable[[Plant], Plant]:
    def planted(plant: Plant) -> Plant:
        PLANTS[name] = plant
        if unpatched:
            SEEN_UNPATCHED.append(name)
        return plant

    return planted


def other_prefix(patch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    prefix = cone.prefix
    patch.setattr(cone, "prefix", lambda *given: prefix(*change(*given)))


def other_ascent(patch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    start = cone._Ascent.__init__

    def changed(self: Any, *given: Any) -> None:
        start(self, *given)
        change(self)

    patch.setattr(cone._Ascent, "__init__", changed)


def other_arguments(patch: pytest.MonkeyPatch, change: Callable[..., None]) -> None:
    """Of forwards that run from the middle."""
    arguments = trace.forward_arguments

    def changed(model: Any, batch: Any, cache: Any = None, start: int = 0) -> dict[str, Any]:
        found = arguments(model, batch, cache, start)
        if start:
            change(found, start)
        return found

    patch.setattr(trace, "forward_arguments", changed)


def other_edits(patch: pytest.MonkeyPatch, **changes: Callable[[Tensor], Tensor]) -> None:
    of_bucket = cone.edits_of

    def changed(*given: Any) -> Any:
        found = of_bucket(*given)
        return {
            stage: [
                attrs.evolve(edit, **{key: f(getattr(edit, key)) for key, f in changes.items()})
                for edit in several
            ]
            for stage, several in found.items()
        }

    patch.setattr(cone, "edits_of", changed)


@fault("the prefix ends a token early")
def _(patch: pytest.MonkeyPatch) -> None:
    other_prefix(patch, lambda kept, start, prompts: (kept, max(start - 1, 0), prompts))


@fault("the prefix ends a token late")
def _(patch: pytest.MonkeyPatch) -> None:
    other_prefix(patch, lambda kept, start, prompts: (kept, start + 1, prompts))


@fault("the prefix is that of the token before", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    def change(kept: Any, start: int, prompts: Any) -> Any:
        moved = [(keys.roll(1, 2), values.roll(1, 2)) for keys, values in kept]
        return moved, start, prompts

    other_prefix(patch, change)


@fault("keys of the wrong prompt", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    def change(kept: Any, start: int, prompts: list[Tensor]) -> Any:
        return kept, start, [each.roll(1) for each in prompts]

    other_prefix(patch, change)


@fault("keys and values swapped between layers", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    other_prefix(patch, lambda kept, start, prompts: (kept[::-1], start, prompts))


@fault("rows enter as the wrong prompt", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    other_ascent(patch, lambda self: setattr(self, "prompts", self.prompts.roll(1)))


@fault("masks and positions of the wrong prompt", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    other_ascent(patch, lambda self: setattr(self, "which", self.which.roll(1)))


@fault("rows enter a stage late")
def _(patch: pytest.MonkeyPatch) -> None:
    other_ascent(patch, lambda self: setattr(self, "present", [0, *self.present[:-1]]))


@fault("rows enter as the layer before")
def _(patch: pytest.MonkeyPatch) -> None:
    joined = cone._Ascent._joined

    def changed(self: Any, hidden: Any, came: int, count: int, kept: Any, layer: int) -> Tensor:
        return joined(self, hidden, came, count, kept, max(layer - 1, 0))

    patch.setattr(cone._Ascent, "_joined", changed)


@fault("rows enter as the layer after", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    joined = cone._Ascent._joined

    def changed(self: Any, hidden: Any, came: int, count: int, kept: Any, layer: int) -> Tensor:
        return joined(self, hidden, came, count, kept, min(layer + 1, LAYERS - 1))

    patch.setattr(cone._Ascent, "_joined", changed)


@fault("padding is not masked", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    def change(found: dict[str, Any], start: int) -> None:
        found["attention_mask"] = torch.ones_like(found["attention_mask"])

    other_arguments(patch, change)


@fault("positions begin anew", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    def change(found: dict[str, Any], start: int) -> None:
        found["position_ids"] = found["position_ids"] - found["position_ids"][:, :1]

    other_arguments(patch, change)


@fault("positions count padding", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    def change(found: dict[str, Any], start: int) -> None:
        count = found["position_ids"].shape[1]
        found["position_ids"] = torch.arange(start, start + count).expand_as(found["position_ids"])

    other_arguments(patch, change)


@fault("edits of the row before")
def _(patch: pytest.MonkeyPatch) -> None:
    other_edits(patch, rows=lambda rows: (rows - 1).clamp(min=0))


@fault("edits of the token after")
def _(patch: pytest.MonkeyPatch) -> None:
    other_edits(patch, positions=lambda positions: (positions + 1).clamp(max=FAULTY.width - 1))


@fault("values of the wrong prompt")
def _(patch: pytest.MonkeyPatch) -> None:
    other_edits(patch, prompts=lambda prompts: (prompts + 1) % 3)


@fault("values of the wrong head")
def _(patch: pytest.MonkeyPatch) -> None:
    other_edits(patch, heads=lambda heads: None if heads is None else 1 - heads)


@fault("no edits inside of a layer")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cone._Ascent, "_edit_inside", lambda self, traced, layer: None)


@fault("elided though something differs")
def _(patch: pytest.MonkeyPatch) -> None:
    differs = target.differs

    def changed(*given: Any) -> Any:
        found = differs(*given).copy()
        found[1, -1] = False
        return found

    patch.setattr(target, "differs", changed)


@fault("columns in another order", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    restrict = head.Head.restrict
    patch.setattr(
        head.Head, "restrict", lambda self, traced, ids: restrict(self, traced, ids.flip(0))
    )


@fault("logits of the row before", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    run = cone._Ascent.run
    patch.setattr(cone._Ascent, "run", lambda self: run(self).roll(1, 0))


#: Padded prompts, and none that sees all of its prefix as another one does.
FAULTY = Pairs("llama", random_prompts((9, 6, 8), seed=1), random_prompts((9, 6, 8), seed=2))
FAULTY_SITES = Sites(COMPONENTS, seq_pos_type="custom", seq_pos=[-1, -2, -4, -5], heads=[0, 1])


@functools.cache
def without_fault() -> Outcome:
    return FAULTY.sweep(FAULTY_SITES, "full")


def test_without_a_fault_there_is_no_gap() -> None:
    with cut_by(0.0, 2048):
        check_cone(FAULTY.sweep(FAULTY_SITES, "cone"), without_fault())


@pytest.mark.parametrize("name", PLANTS)
def test_a_fault_shows_against_whole_forwards(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no unpatched row that could have seen it first."""
    monkeypatch.setattr(cone, "rounding", lambda dtype: float("inf"))
    PLANTS[name](monkeypatch)
    with cut_by(0.0, 2048):
        try:
            found = FAULTY.sweep(FAULTY_SITES, "cone")
        except EngineError:
            return
    assert gap_of(found, without_fault()) > 1e-3


@pytest.mark.parametrize("name", SEEN_UNPATCHED)
def test_a_fault_that_an_unpatched_row_sees_is_no_outcome(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    PLANTS[name](monkeypatch)
    with cut_by(0.0, 2048):
        with pytest.raises(EngineError, match="gives other logits than run as a whole"):
            FAULTY.sweep(FAULTY_SITES, "cone")
        with pytest.warns(EngineWarning, match="gives other logits than run as a whole"):
            out = FAULTY.sweep(FAULTY_SITES, "auto")
    assert out.info["engine"] == "full"
    assert "gives other logits than run as a whole: off by" in out.info["fallback"]
    assert gap_of(out, without_fault()) == 0
    assert not any(out.cells[name].elided.any() for name in out)


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
