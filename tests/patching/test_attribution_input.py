"""Attribution refuses what it cannot do, each with an error of its own that names the value."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

from nnpatch_core import (
    Component,
    DecoderAPI,
    MultiSite,
    Site,
    Sites,
    activation_patching,
    attribution_patching,
    decoder_components,
)
from nnpatch_core.errors import (
    AdapterWarning,
    AnswerError,
    EstimateWarning,
    GradientError,
    MemoryBudgetError,
    MetricError,
    PatchingError,
    TokensError,
    UnknownNameError,
)
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.attribution import told
from tests.helpers.refusals import SOURCE, SOURCE_ANSWERS, TARGET, TARGET_ANSWERS
from tests.helpers.refusals import Counted as Swept

SITES = Sites(["resid", "q", "k", "mlp"], seq_pos_type="each")
get = functools.partial(Site.get_site, tiny_api())
SEVERAL = Sites.from_sites([MultiSite([get("mlp", 0), get("attn", 1)], name="both")])


class Counted(Swept):
    """A small model that counts its forwards, and estimates of it."""

    def estimate(self, sites: Any = SITES, api: Any = None, **changed: Any) -> Any:
        arguments = {
            "source_tokens": SOURCE,
            "target_tokens": TARGET,
            "source_answer_index": SOURCE_ANSWERS,
            "target_answer_index": TARGET_ANSWERS,
            "progress": False,
        }
        return attribution_patching(self.model, api, sites, **{**arguments, **changed})

    def patch(self, sites: Any = SITES, api: Any = None, **changed: Any) -> Any:
        answers = SOURCE_ANSWERS, TARGET_ANSWERS
        options = {"progress": False, **changed}
        return activation_patching(self.model, api, sites, SOURCE, TARGET, *answers, **options)

    def refuses(
        self, error: Any, *parts: str, forwards: int = 0, call: Any = None, **changed: Any
    ) -> None:
        """`rejects`, of one call."""
        with self.rejects(error, *parts, forwards=forwards):
            (call or self.estimate)(**changed)


@pytest.fixture(scope="module")
def counted() -> Counted:
    return Counted(tiny_model())


def test_what_the_refused_calls_are_variations_of_is_accepted(counted: Counted) -> None:
    before = counted.forwards
    counted.estimate()
    # A source run and a target run.
    assert counted.forwards == before + 2
    counted.estimate(SEVERAL)
    counted.estimate(ablation="zero", source_tokens=None)
    counted.estimate(ablation="mean", source_tokens=None, per_position=True)
    counted.patch(screen="atp*", top_k=2)


# Methods.


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"steps": 0}, ["steps", "at least 1", "0"]),
        ({"steps": -3}, ["steps", "at least 1", "-3"]),
        ({"steps": True}, ["steps", "True"]),
        ({"steps": 1.5}, ["steps", "1.5"]),
        ({"steps": "4"}, ["steps", "'4'"]),
        ({"qk_fix": 1}, ["qk_fix", "True or False", "1"]),
        ({"qk_fix": None}, ["qk_fix", "None"]),
        ({"grad_drop": "yes"}, ["grad_drop", "'yes'"]),
        ({"steps": 4, "qk_fix": True}, ["steps=4", "qk_fix=True"]),
        ({"steps": 4, "grad_drop": True}, ["steps=4", "grad_drop=True"]),
        ({"sites": SEVERAL, "steps": 2}, ["integrated, 2 steps", "mlp", "attn"]),
        ({"sites": SEVERAL, "qk_fix": True}, ["QK fix", "attn L1"]),
        ({"sites": SEVERAL, "grad_drop": True}, ["GradDrop", "attn L1"]),
        ({"sites": SEVERAL, "qk_fix": True, "grad_drop": True}, ["AtP*", "mlp L0"]),
        ({"reference": [SOURCE]}, ["reference", "ablation='mean'"]),
        ({"per_position": True}, ["per_position", "ablation='mean'"]),
        ({"sites": "resid"}, ["sites", "'resid'"]),
    ],
    ids=str,
)
def test_methods(counted: Counted, changed: dict[str, Any], parts: list[str]) -> None:
    counted.refuses(PatchingError, *parts, **changed)


@pytest.mark.parametrize("ablation", [{}, {"ablation": "zero", "source_tokens": None}], ids=str)
def test_a_fix_of_nothing_is_said(counted: Counted, ablation: dict[str, Any]) -> None:
    sites = Sites(["attn", "v", "z"], seq_pos_type="each")
    with pytest.warns(EstimateWarning, match=r"nothing without q or k .* of v, o, attn$") as caught:
        found = counted.estimate(sites, qk_fix=True, **ablation)
    assert [each.filename for each in caught] == [__file__]
    plain = counted.estimate(sites, **ablation)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_a_fix_of_something_or_as_half_of_a_whole_says_nothing(counted: Counted) -> None:
    """AtP* is both repairs, by definition of all sites: GradDrop changes them."""
    counted.estimate(Sites(["attn", "k"]), qk_fix=True)
    counted.estimate(Sites.from_sites([get("mlp", 0), get("q", 1, 0)]), qk_fix=True)
    counted.estimate(Sites("attn"), qk_fix=True, grad_drop=True)
    counted.patch(Sites("attn"), screen="atp*", top_k=2)


# Ablations.

ZERO = {"ablation": "zero", "source_tokens": None}


@pytest.mark.parametrize(
    ("error", "changed", "parts"),
    [
        (UnknownNameError, {**ZERO, "ablation": "resample"}, ["resample", "zero, mean"]),
        (UnknownNameError, {**ZERO, "ablation": True}, ["True", "zero, mean"]),
        (PatchingError, {"ablation": "zero"}, ["'zero'", "source_tokens=None"]),
        (
            PatchingError,
            {**ZERO, "source_attention_mask": torch.ones_like(SOURCE)},
            ["source_attention_mask"],
        ),
        (PatchingError, {**ZERO, "reference": [SOURCE]}, ["reference", "'zero'"]),
        (PatchingError, {**ZERO, "per_position": True}, ["per_position", "'zero'"]),
        (PatchingError, {**ZERO, "force_model_confidence": True}, ["force_model_confidence"]),
        (AnswerError, {**ZERO, "target_answer_index": None}, ["logit_difference", "two answers"]),
        (MetricError, {**ZERO, "metric": "kl_divergence"}, ["kl_divergence", "steps="]),
        (TokensError, {"source_tokens": None}, ["source_tokens", "NoneType"]),
        (TokensError, {**ZERO, "target_tokens": None}, ["target_tokens", "NoneType"]),
    ],
    ids=str,
)
def test_ablations(
    counted: Counted,
    error: type[Exception],
    changed: dict[str, str | bool | None],
    parts: list[str],
) -> None:
    counted.refuses(error, *parts, **changed)


# Metrics. That one has no gradient is seen when there are logits.


def first(logits: Tensor) -> Tensor:
    return logits[:, 5]


METRICS = {
    "argmax": lambda logits: logits.argmax(-1).float(),
    "compared": lambda logits: (logits[:, 5] > logits[:, 6]).float() + torch.arange(len(logits)),
    "item": lambda logits: torch.tensor([each.item() for each in logits[:, 5]]),
    "detached": lambda logits: logits[:, 5].detach(),
    "without": torch.no_grad()(lambda logits: logits[:, 5] * 2),
}


@pytest.mark.parametrize("options", [{}, {"steps": 2}, {"grad_drop": True}], ids=str)
@pytest.mark.parametrize("name", METRICS)
def test_a_metric_without_a_gradient(counted: Counted, name: str, options: Any) -> None:
    # argmax would be an error of its own, were it the same in both runs.
    metric = {name: lambda logits: METRICS[name](logits) + logits[:, 4].detach()}
    parts = [repr(name), "not differentiable", "argmax"]
    counted.refuses(MetricError, *parts, forwards=4, metric=metric, **options)


@pytest.mark.parametrize(
    "metric",
    [
        lambda logits: logits[:, 5].clamp(max=-1e4) + logits[:, 4].detach(),
        lambda logits: logits[:, 5].round() + logits[:, 4].detach(),
        lambda logits: logits[:, 5].detach() + logits[:, 6] * 0,
    ],
)
def test_a_metric_of_gradient_0(counted: Counted, metric: Callable[..., Any]) -> None:
    parts = ["'flat'", "gradient 0", "steps="]
    counted.refuses(MetricError, *parts, forwards=2, metric={"flat": metric})
    counted.refuses(MetricError, *parts, forwards=6, metric={"flat": metric}, batch_size=1)
    counted.estimate(metric={"flat": metric}, steps=1)


@pytest.mark.parametrize("options", [{}, {"steps": 2}, {"qk_fix": True}], ids=str)
def test_a_metric_whose_gradient_is_not_finite(counted: Counted, options: Any) -> None:
    def rooted(logits: Tensor) -> Tensor:
        """Of the second prompt its slope is infinite, and its value is not."""
        shift = torch.tensor([0.0, 1.0])
        away = (logits[:, 5] - logits[:, 5].detach()).abs() + 1 - shift
        return away.sqrt() + logits[:, 4]

    parts = ["'rooted'", "not finite", "[1]"]
    counted.refuses(MetricError, *parts, forwards=3, metric=rooted, **options)

    def nowhere(logits: Tensor) -> Tensor:
        return torch.where(logits[:, 5] > 1e4, (logits[:, 5] - 1e5).sqrt(), logits[:, 4])

    counted.refuses(MetricError, "'nowhere'", "[0, 1]", forwards=3, metric=nowhere, **options)


def test_a_metric_is_named_among_others(counted: Counted) -> None:
    several = {"fine": first, "off": lambda logits: logits[:, 5].detach()}
    counted.refuses(MetricError, "'off'", "not differentiable", forwards=2, metric=several)
    counted.refuses(
        MetricError, "'off'", forwards=4, call=counted.patch, metric=several, screen="atp*", top_k=3
    )


# Models.


def test_a_quantised_model() -> None:
    model = tiny_model()
    with warnings.catch_warnings():
        # That torch will move it elsewhere.
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    parts = ["LlamaForCausalLM", "quantised", "model.layers.0.self_attn.q_proj"]
    Counted(model).refuses(GradientError, *parts)


def test_a_model_of_whole_numbers() -> None:
    model = tiny_model()
    up = model.model.layers[1].mlp.up_proj
    up.weight = nn.Parameter(up.weight.to(torch.int8), requires_grad=False)
    parts = ["quantised", "'model.layers.1.mlp.up_proj'", "Linear"]
    Counted(model).refuses(GradientError, *parts)


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = tiny_model()
    Counted(model).refuses(GradientError, "inference mode", "LlamaForCausalLM", "embed_tokens")


def test_inference_mode_around_the_call(counted: Counted) -> None:
    with torch.inference_mode():
        counted.refuses(GradientError, "inference_mode() is on")


class Leaves(nn.Module):
    """Goes on without the graph."""

    def __init__(self, inner: Any, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.how == "no_grad":
            with torch.no_grad():
                return self.inner(*args, **kwargs)
        if self.how == "inference":
            with torch.inference_mode():
                return self.inner(*args, **kwargs)
        return self.inner(*args, **kwargs).detach()


METHODS = [{}, {"steps": 2}, {"qk_fix": True}, {"grad_drop": True}]


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("how", ["no_grad", "detach", "inference"])
def test_a_model_that_leaves_the_graph(how: str, options: Any) -> None:
    model = tiny_model()
    model.model.norm = Leaves(model.model.norm, how)
    Counted(model).refuses(GradientError, forwards=3, **options)


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("how", ["no_grad", "detach"])
def test_a_model_that_leaves_it_above_a_site(how: str, options: Any) -> None:
    """There is a gradient from the last layer on, and none below it."""
    model = tiny_model()

    class Cut(type(model.model.layers[1])):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if how == "no_grad":
                with torch.no_grad():
                    return super().forward(*args, **kwargs)
            return super().forward(*args, **kwargs).detach()

    model.model.layers[1].__class__ = Cut
    counted = Counted(model)
    counted.refuses(GradientError, forwards=3, **options)
    several = Sites.from_sites([MultiSite([get("mlp", 0), get("attn", 2)], name="both")])
    if not options:
        counted.refuses(GradientError, forwards=3, sites=several)
    counted.estimate(Sites(["resid", "q", "k", "mlp"], [2], "each"), **options)


class Aside(nn.Module):
    """Shows what it is given, or a copy, to a module of which it does not take anything."""

    def __init__(self, mlp: Any, copies: bool) -> None:
        super().__init__()
        self.inner, self.probe, self.copies = mlp, nn.Identity(), copies

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.probe(hidden_states.clone() if self.copies else hidden_states)
        return self.inner(hidden_states)


def aside(copies: bool) -> tuple[Any, DecoderAPI]:
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp = Aside(layer.mlp, copies)
    table = {**decoder_components(), "mlp": Component("mlp.probe")}
    return model, DecoderAPI("Aside", ("llama",), table)


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("copies", [True, False])
def test_a_site_that_the_model_does_not_go_on_with(copies: bool, options: Any) -> None:
    """Not even where it is the tensor itself that the model goes on with, but not from there."""
    model, api = aside(copies)
    counted = Counted(model)
    for sites in (Sites("mlp", seq_pos_type="each"), Sites("mlp", [0])):
        before = counted.patch(sites, api=api)
        assert before["mlp"].abs().max() < 1e-6
        parts = ["model.layers.0.mlp.probe", "does not go on"]
        with told(sites, options):
            counted.refuses(GradientError, *parts, forwards=3, sites=sites, api=api, **options)


# Adapters.


@pytest.mark.parametrize("name", ["q", "k", "v", "o"])
def test_an_adapter_without_a_projection_has_no_fix(counted: Counted, name: str) -> None:
    table = {key: row for key, row in decoder_components().items() if key != name}
    api = DecoderAPI("Lacking", ("llama",), table)
    other = "k" if name == "q" else "q"
    sites = Sites(other, seq_pos_type="each")
    parts = ["QK fix", "'Lacking'", f"has no {name}"]
    counted.refuses(GradientError, *parts, sites=sites, api=api, qk_fix=True)
    # What it is not for needs nothing.
    with pytest.warns(EstimateWarning, match="changes nothing"):
        counted.estimate(Sites("mlp"), api, qk_fix=True)
    counted.estimate(sites, api)


def test_projections_that_are_in_no_one_module(counted: Counted) -> None:
    model = tiny_model()

    class Scattered(type(model.model.layers[0])):
        pass

    for layer in model.model.layers:
        layer.__class__ = Scattered
        layer.k_elsewhere = layer.self_attn.k_proj
    table = {**decoder_components(), "k": Component("k_elsewhere", heads="key_value")}
    api = DecoderAPI("Scattered", ("llama",), table)
    Counted(model).refuses(
        GradientError, "in no one module", "'Scattered'", sites=Sites("q"), api=api, qk_fix=True
    )


def test_an_adapter_of_layers_that_do_not_add_has_no_drop(counted: Counted) -> None:
    api = attrs.evolve(tiny_api(), residual=None)
    parts = ["GradDrop", "'TinyLlama'", "layer 0", "sum"]
    counted.refuses(GradientError, *parts, api=api, grad_drop=True)
    counted.estimate(api=api)
    table = {key: decoder_components()[key] for key in ("resid_pre", "q", "resid")}
    bare = DecoderAPI("Bare", ("llama",), table)
    counted.refuses(
        GradientError, "GradDrop", "'Bare'", sites=Sites("resid"), api=bare, grad_drop=True
    )


@pytest.mark.parametrize(
    ("fails", "parts"),
    [(False, ["other values", "layer 1"]), (True, ["does not run by itself", "moody"])],
)
def test_an_attention_that_is_not_the_same_by_itself(fails: bool, parts: list[str]) -> None:
    model = tiny_model()

    attention = model.model.layers[1].self_attn
    real, calls = type(attention).forward, []

    class Changing(type(attention)):
        scaling: float

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(0)
            if len(calls) <= 2:
                return real(self, *args, **kwargs)
            if fails:
                raise ZeroDivisionError("moody")
            before = self.scaling
            self.scaling = before * 3
            try:
                return real(self, *args, **kwargs)
            finally:
                self.scaling = before

    attention.__class__ = Changing
    Counted(model).refuses(
        GradientError, "QK fix", *parts, forwards=3, sites=Sites("q", [1]), qk_fix=True
    )


# Memory.


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_a_budget_that_no_prompt_fits_in(counted: Counted, options: Any) -> None:
    counted.refuses(MemoryBudgetError, "memory_budget", memory_budget=1, **options)
    counted.refuses(MemoryBudgetError, "memory_budget", "'lots'", memory_budget="lots", **options)
    counted.refuses(MemoryBudgetError, "memory_budget", "0", memory_budget=0, **options)


def test_a_graph_needs_more_than_a_sweep(counted: Counted) -> None:
    """What a sweep does with is not enough where graphs are kept: the error says so."""
    sites = Sites("resid", [0, 1], "each")
    budget = 1
    while True:
        try:
            counted.patch(sites, memory_budget=budget, engine="full")
        except MemoryBudgetError:
            budget = int(budget * 1.2) + 1
        else:
            break
    parts = ["graph is kept", "raise it", "4 tokens"]
    counted.refuses(MemoryBudgetError, *parts, sites=sites, memory_budget=budget)
    assert counted.estimate(sites, memory_budget="1 GiB")["resid"].any()


# Screens.


@pytest.mark.parametrize(
    ("error", "changed", "parts"),
    [
        (UnknownNameError, {"screen": "gradient", "top_k": 3}, ["gradient", "attribution, atp*"]),
        (UnknownNameError, {"screen": True, "top_k": 3}, ["True"]),
        (UnknownNameError, {"screen": ["atp*"], "top_k": 3}, ["atp*"]),
        (PatchingError, {"screen": "atp*"}, ["'atp*'", "top_k"]),
        (PatchingError, {"screen": "atp*", "top_k": 0}, ["top_k", "at least 1", "0"]),
        (PatchingError, {"screen": "atp*", "top_k": True}, ["top_k", "True"]),
        (PatchingError, {"screen": "atp*", "top_k": 2.5}, ["top_k", "2.5"]),
        (
            PatchingError,
            {"screen": "atp*", "top_k": 3, "spot_checks": -1},
            ["spot_checks", "negative", "-1"],
        ),
        (PatchingError, {"screen": "atp*", "top_k": 3, "spot_checks": True}, ["spot_checks"]),
        (PatchingError, {"screen": "atp*", "top_k": 3, "seed": "x"}, ["seed", "'x'"]),
        (PatchingError, {"top_k": 3}, ["top_k=3", "screen="]),
        (PatchingError, {"spot_checks": 0}, ["spot_checks=0", "screen="]),
        (PatchingError, {"screen": "atp*", "top_k": 3, "sites": SEVERAL}, ["QK fix", "attn L1"]),
    ],
    ids=str,
)
def test_screens(
    counted: Counted, error: type[Exception], changed: dict[str, Any], parts: list[str]
) -> None:
    counted.refuses(error, *parts, call=counted.patch, **changed)


def test_what_a_sweep_refuses_attribution_refuses(counted: Counted) -> None:
    """Two of many: the checks are those of every sweep."""
    counted.refuses(UnknownNameError, "'nothing'", metric="nothing")
    counted.refuses(TokensError, "batch_size", "0", batch_size=0)
    with pytest.warns(AdapterWarning, match="llama"):
        attribution_patching(
            tiny_model("gemma"),
            tiny_api(),
            Sites("mlp"),
            SOURCE,
            TARGET,
            SOURCE_ANSWERS,
            TARGET_ANSWERS,
            progress=False,
        )


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_sites_of_several_adapters(options: Any) -> None:
    """The plain estimate takes them as they are; a repair that goes by one table refuses them."""
    other = DecoderAPI("Llama3", ("llama",), {**decoder_components(), "attn": Component("mlp")})
    mine, theirs = (Site.get_site(api, "attn", 1, seq_pos=[-1]) for api in ("Llama3", other))
    counted = Counted(tiny_model())
    both = Sites.from_sites([mine, theirs])
    if "qk_fix" in options or "grad_drop" in options:
        counted.refuses(PatchingError, "of several", sites=both, api=None, **options)
        return
    found = counted.estimate(both, api=None, **options)["attn"]
    alone = [
        counted.estimate(Sites.from_sites([one]), api=None, **options)["attn"] for one in both.sites
    ]
    torch.testing.assert_close(found, torch.cat(alone))
    assert abs(float(found[0] - found[1])) > 1e-3
