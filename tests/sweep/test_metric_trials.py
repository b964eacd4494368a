"""What metrics declare, how they are tried out before a cell runs, and what their logits take."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nnpatch_core import (
    MetricContext,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    per_prompt,
    reads_tokens,
)
from nnpatch_core.engine import Part
from nnpatch_core.errors import AnswerError, MemoryBudgetError, MetricError, PatchingError
from nnpatch_core.memory import free as memory
from nnpatch_core.metrics import (
    BUILTIN_METRICS,
    is_per_prompt,
    name_metrics,
    reads_some,
    with_context,
)
from nnpatch_core.plugins import find_metric
from nnpatch_core.results import Baseline
from nnpatch_core.sites import bind_cells
from nnpatch_core.sweep.cells import _whole
from nnpatch_core.sweep.trials import try_out
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.counted import Counted

SOURCE = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6], [9, 4, 3, 12]])
TARGET = torch.tensor([[5, 9, 7, 8], [9, 8, 7, 16], [9, 4, 13, 12]])
ANSWERS = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
SITES = Sites(["mlp", "resid"], layers=[1], seq_pos_type="each")


def counted(patch: Callable[..., Any], metric: Any, *prompts: Tensor, **options: Any) -> Any:
    """A sweep of a tiny model; an error of ours has the number of forwards that came before it."""
    model = Counted(tiny_model("llama"))
    sites = options.pop("sites", SITES)
    try:
        return patch(
            model.model, tiny_api(), sites, *prompts, metric=metric, progress=False, **options
        )
    except PatchingError as error:
        error.forwards = model.forwards
        raise


def of_rows(rows: slice, *tensors: Tensor) -> list[Tensor]:
    return [each[rows] for each in tensors]


def activation(metric: Any, rows: slice = slice(None), **options: Any) -> Any:
    prompts = of_rows(rows, SOURCE, TARGET, *ANSWERS)
    return counted(activation_patching, metric, *prompts, **options)


def ablation(metric: Any, rows: slice = slice(None), **options: Any) -> Any:
    return counted(ablation_patching, metric, *of_rows(rows, TARGET, *ANSWERS), **options)


def attribution(metric: Any, rows: slice = slice(None), **options: Any) -> Any:
    prompts = of_rows(rows, SOURCE, TARGET, *ANSWERS)
    return counted(attribution_patching, metric, *prompts, **options)


def screened(metric: Any, rows: slice = slice(None), **options: Any) -> Any:
    return activation(metric, rows, screen="attribution", top_k=2, **options)


ENTRIES = {
    "activation": activation,
    "full": functools.partial(activation, engine="full"),
    "one by one": functools.partial(activation, batch_size=1),
    "zero": ablation,
    "mean": functools.partial(ablation, method="mean"),
    "attribution": attribution,
    "steps": functools.partial(attribution, steps=2),
    "screened": screened,
}
entries = pytest.mark.parametrize("entry", ENTRIES)


def answer(logits: Tensor, context: MetricContext) -> Tensor:
    return logits.gather(1, context.source_answer_index[:, None])[:, 0]


# Declarations ------------------------------------------------------------------------------------

answers_only = reads_tokens(lambda context: context.source_answer_index[:, None])


def plain() -> Callable[..., Tensor]:
    return lambda logits: logits[:, 1]


class Object:
    """A metric that is an object, with slots, so that nothing can be put on it."""

    __slots__ = ()

    def __call__(self, logits: Tensor) -> Tensor:
        return logits[:, 1]

    def method(self, logits: Tensor) -> Tensor:
        return logits[:, 1]


class Declared:
    """A metric whose class declares it."""

    @per_prompt
    @answers_only
    def __call__(self, logits: Tensor, context: MetricContext) -> Tensor:
        return answer(logits, context)

    @answers_only
    @per_prompt
    def method(self, logits: Tensor, context: MetricContext) -> Tensor:
        return answer(logits, context)


class Below(Declared):
    """One that inherits it."""


class Module(nn.Module):
    def forward(self, logits: Tensor, context: MetricContext) -> Tensor:
        return answer(logits, context)


CALLABLES: dict[str, Callable[[], Any]] = {
    "function": plain,
    "takes a context": lambda: lambda logits, context: answer(logits, context),
    "keyword only": lambda: lambda logits, *, context: answer(logits, context),
    "partial": lambda: functools.partial(answer),
    "object": Object,
    "method": lambda: Object().method,
    "module": Module,
}


@pytest.mark.parametrize("name", CALLABLES)
@pytest.mark.parametrize("order", ["alone first", "tokens first", "alone", "tokens", "none"])
def test_declarations_in_either_order(name: str, order: str) -> None:
    metric = CALLABLES[name]()
    if order in ("alone first", "alone"):
        metric = per_prompt(metric)
    if order in ("alone first", "tokens first", "tokens"):
        metric = answers_only(metric)
    if order == "tokens first":
        metric = per_prompt(metric)
    alone = order in ("alone first", "tokens first", "alone")
    (wrapped,) = name_metrics({"mine": metric}, find_metric).values()
    for each in (metric, with_context(metric), wrapped):
        assert is_per_prompt(each) is alone
        assert reads_some(each) is (order not in ("alone", "none"))
    logits = torch.randn(3, 8)
    context = MetricContext(*ANSWERS, logits, logits)
    expected = with_context(CALLABLES[name]())(logits, context)
    assert wrapped(logits, context).equal(expected)


@pytest.mark.parametrize("metric", [Declared(), Below(), Declared().method])
def test_declarations_on_a_class(metric: Any) -> None:
    wrapped = with_context(metric)
    assert is_per_prompt(wrapped)
    assert reads_some(wrapped)


def test_a_declared_object_keeps_its_name() -> None:
    assert list(name_metrics(per_prompt(Object()), find_metric)) == ["Object"]
    assert list(name_metrics(per_prompt(Object().method), find_metric)) == ["method"]


def test_a_registered_metric_keeps_what_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnpatch_core.plugins import lookup

    registered = {"mine": per_prompt(answers_only(answer_of_mine))}
    monkeypatch.setattr(lookup, "_find", lambda kind, name, *_: registered[name])
    (found,) = name_metrics("mine", find_metric).values()
    assert is_per_prompt(found)
    assert reads_some(found)


def answer_of_mine(logits: Tensor, context: MetricContext) -> Tensor:
    return answer(logits, context)


def test_every_built_in_metric_is_declared() -> None:
    assert all(map(is_per_prompt, BUILTIN_METRICS.values()))
    assert [name for name, each in BUILTIN_METRICS.items() if reads_some(each)] == [
        "answer_set_difference",
        "logit_difference",
    ]


@pytest.mark.parametrize("declare", [per_prompt, answers_only])
def test_only_what_can_be_called_can_be_declared(declare: Any) -> None:
    with pytest.raises(MetricError, match="can be called, got 'kl_divergence'"):
        declare("kl_divergence")


# Trials ------------------------------------------------------------------------------------------


def count_calls() -> Callable[[Tensor], Tensor]:
    calls: list[int] = []

    def counting(logits: Tensor) -> Tensor:
        calls.append(1)
        return logits[:, 1] * len(calls)

    return counting


def beside_the_last() -> Callable[[Tensor], Tensor]:
    last: list[Tensor] = []

    def beside(logits: Tensor) -> Tensor:
        last.append(logits[:, 1].detach())
        return logits[:, 1] - last[-2][: len(logits)] if len(last) > 1 else logits[:, 1]

    return beside


def in_context(logits: Tensor, context: MetricContext) -> Tensor:
    context.target_logits.mul_(2)
    return logits[:, 1]


def above() -> Callable[[Tensor, MetricContext], Tensor]:
    """How many tokens are above the answer: in the cone all others were nan, so none."""
    return lambda logits, context: (logits > answer(logits, context)[:, None]).sum(-1).float()


def far(sign: int) -> Callable[[Tensor, MetricContext], Tensor]:
    """Whether another token is far off, which none is in the unpatched runs: nan is like them."""
    return lambda logits, context: (
        answer(logits, context) + (sign * (logits[:, 40] - answer(logits, context)) > 4).float()
    )


def in_order() -> Callable[[Tensor, MetricContext], Tensor]:
    """Whether two tokens are far apart, between the others."""

    def metric(logits: Tensor, context: MetricContext) -> Tensor:
        own, apart = answer(logits, context), (logits[:, 40] - logits[:, 41]).abs()
        return own + (apart > 4).float()

    return metric


def numbered(logits: Tensor) -> Tensor:
    return logits[:, 1] * torch.arange(1, len(logits) + 1)


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "counts its calls": (count_calls, "'mine' gives another number when it is called again"),
    "remembers": (beside_the_last, "'mine' gives another number when it is called again"),
    "random": (
        lambda: lambda logits: logits[:, 1] + torch.rand(len(logits)),
        "'mine' gives another number when it is called again",
    ),
    "changes the context": (lambda: in_context, "'mine' changes its context in place"),
    "raises": (lambda: lambda logits: logits[:, 99], r"'mine' raised IndexError on .*\[3, 64\]"),
    "raises on keys": (lambda: lambda logits: {}["no"], "'mine' raised KeyError"),
    "no tensor": (lambda: lambda logits: [1.0, 2.0, 3.0], r"'mine' must give .*\[3\], got list"),
    "one number": (lambda: lambda logits: logits.mean(), r"'mine' must give .*, got \(\)"),
    "a column": (lambda: lambda logits: logits[:, :1], r"'mine' must give .*, got \(3, 1\)"),
    "nan": (lambda: lambda logits: logits[:, 1] * torch.nan, "'mine' is nan"),
    "infinite": (lambda: lambda logits: logits[:, 1] + torch.inf, "'mine' is inf"),
    "no real number": (
        lambda: lambda logits: logits[:, 1] * 1j,
        "'mine' must give real numbers, got a tensor of torch.complex64",
    ),
    "elsewhere": (
        lambda: lambda logits: logits[:, 1].to("meta"),
        "'mine' must give real numbers, got a tensor on the meta device",
    ),
    "relative": (
        lambda: per_prompt(lambda logits: logits[:, 1] - 0.5 * logits[:, 1].mean()),
        "'mine' is declared with per_prompt, but gives a prompt another number in other company",
    ),
    "by place": (
        lambda: per_prompt(numbered),
        "'mine' is declared with per_prompt, but gives a prompt another number in other company",
    ),
    "of one length": (
        lambda: per_prompt(lambda logits: logits[torch.arange(3), ANSWERS[0]]),
        "'mine' is declared with per_prompt, but cannot be called on some of the prompts",
    ),
    "by the largest": (
        lambda: per_prompt(lambda logits: logits[:, 1] / logits.abs().max()),
        "'mine' is declared with per_prompt, but gives a prompt another number in other company",
    ),
    "reads others": (
        lambda: answers_only(lambda logits: logits[:, 40]),
        "'mine' reads logits of tokens that it did not declare.*where they are nan",
    ),
    "compares with others": (
        lambda: answers_only(above()),
        "'mine' reads logits of tokens that it did not declare",
    ),
    "compares, alone": (
        lambda: per_prompt(answers_only(above())),
        "'mine' reads logits of tokens that it did not declare",
    ),
    "would see what is far above": (
        lambda: answers_only(far(1)),
        "'mine' reads logits of tokens that it did not declare.*where they are above all others",
    ),
    "would see what is far below": (
        lambda: per_prompt(answers_only(far(-1))),
        "'mine' reads logits of tokens that it did not declare.*where they are below all others",
    ),
    "would see another order": (
        lambda: per_prompt(answers_only(in_order())),
        "'mine' reads logits of tokens that it did not declare.*where they are moved at random",
    ),
    "does not bear nan": (
        lambda: answers_only(lambda logits: logits[:, 1] * (1 / int(logits.isfinite().all()))),
        "'mine' reads logits of tokens .*it cannot be called .*ZeroDivisionError",
    ),
    "declares what is none": (
        lambda: reads_tokens(lambda context: torch.tensor([99]))(plain()),
        "metric 'mine' declares that it reads the tokens",
    ),
    "declares and raises": (
        lambda: reads_tokens(lambda context: context.no_such)(plain()),
        "what metric 'mine' declares with reads_tokens raised AttributeError",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@entries
def test_a_faulty_metric_is_named_before_any_cell_runs(fault: str, entry: str) -> None:
    make, says = FAULTS[fault]
    with pytest.raises(MetricError, match=says) as caught:
        ENTRIES[entry]({"fine": per_prompt(answer), "mine": make()})
    # The unpatched runs: each prompt's, both runs', twice where the rows are then run apart.
    assert caught.value.forwards <= 6


@pytest.mark.parametrize("fault", [each for each in FAULTS if "[3" not in FAULTS[each][1]])
@pytest.mark.parametrize("entry", ["activation", "zero"])
def test_a_faulty_metric_is_found_with_one_prompt_too(fault: str, entry: str) -> None:
    make, _ = FAULTS[fault]
    if fault == "of one length":
        make = lambda: per_prompt(lambda logits: logits[torch.arange(1), ANSWERS[0][:1]])  # noqa: E731
    with pytest.raises(MetricError, match="'mine'"):
        ENTRIES[entry]({"mine": make()}, slice(1))


def masked(logits: Tensor) -> Tensor:
    logits[:, 8:] = -1e9
    return logits.softmax(-1)[:, 1]


FINE: dict[str, Any] = {
    "in place": masked,
    "in place, alone": per_prompt(masked),
    "float64": lambda logits: logits[:, 1].double(),
    "bfloat16": per_prompt(lambda logits: logits[:, 1].bfloat16()),
    "needs a gradient": lambda logits: logits[:, 1] * nn.Parameter(torch.ones(())),
    "a view": lambda logits: logits[:, 1],
    "divides": answers_only(lambda logits, context: 1 / (3 + answer(logits, context).square())),
    "of the context": lambda logits, context: logits[:, 1] - context.source_logits[:, 2],
    "no gradient mode": torch.no_grad()(lambda logits: logits[:, 1]),
}


@pytest.mark.parametrize("name", FINE)
@pytest.mark.parametrize("entry", ["activation", "full", "one by one", "zero"])
def test_what_a_metric_may_do(name: str, entry: str) -> None:
    out = ENTRIES[entry]({"mine": FINE[name], "first": per_prompt(plain())})
    same = ENTRIES[entry]({"first": per_prompt(plain())})
    first, expected = out.for_metric("first"), same.for_metric("first")
    for site in out:
        assert first.patched(site).equal(expected.patched(site)) or torch.allclose(
            first.patched(site), expected.patched(site), atol=1e-5, equal_nan=True
        )


def test_an_error_of_ours_stays_what_it_is() -> None:
    def mine(logits: Tensor, context: MetricContext) -> Tensor:
        return logits[:, 1] + context.other_answer("mine")

    with pytest.raises(AnswerError, match="'mine' compares two answers"):
        ablation_patching(
            tiny_model("llama"),
            tiny_api(),
            SITES,
            TARGET,
            ANSWERS[0],
            metric=mine,
            progress=False,
        )


@st.composite
def contexts(draw: st.DrawFn) -> MetricContext:
    batch, vocab = draw(st.integers(1, 5)), draw(st.integers(2, 12))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]))
    runs = [scale * torch.randn(batch, vocab, generator=random) for _ in range(2)]
    if draw(st.booleans()):
        runs[0][:, 0] = -torch.inf
    answers = [torch.randint(1, vocab, (batch,), generator=random) for _ in range(2)]
    return MetricContext(*answers, *runs)


def baseline_of(metric: Any, context: MetricContext) -> dict[str, Baseline]:
    source, target = (
        metric(logits.clone(), context) for logits in (context.source_logits, context.target_logits)
    )
    return {"mine": Baseline(source, target)}


@pytest.mark.parametrize("name", ["logit_difference", "answer_log_probability", "mine", "sums"])
@given(context=contexts())
def test_no_metric_that_keeps_its_word_is_refused(name: str, context: MetricContext) -> None:
    metric = {
        "mine": per_prompt(answers_only(lambda logits, context: answer(logits, context).tanh())),
        "sums": answers_only(lambda logits, context: answer(logits, context) / len(logits)),
        **BUILTIN_METRICS,
    }[name]
    try_out({"mine": metric}, context, baseline_of(metric, context))


@given(context=contexts(), alone=st.booleans())
def test_a_comparison_with_undeclared_logits_is_found(context: MetricContext, alone: bool) -> None:
    metric = answers_only(per_prompt(above()) if alone else above())
    if context.target_logits.shape[1] > len(context.source_answer_index.unique()):
        with pytest.raises(MetricError, match="did not declare"):
            try_out({"mine": metric}, context, baseline_of(metric, context))


def test_the_trials_leave_the_generator_of_the_user_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    activation({"mine": answers_only(lambda logits, context: answer(logits, context))})
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("name", ["logit_difference", "few"])
def test_the_trials_are_the_same_under_any_default(name: str) -> None:
    context = MetricContext(*ANSWERS, torch.randn(3, 20), torch.randn(3, 20))
    metric = BUILTIN_METRICS.get(
        name, answers_only(lambda logits, context: answer(logits, context))
    )
    sly = per_prompt(answers_only(above()))
    baseline, other = baseline_of(metric, context), baseline_of(sly, context)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        try_out({"mine": metric}, context, baseline)
        with pytest.raises(MetricError, match="did not declare"):
            try_out({"mine": sly}, context, other)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_few_tokens_are_laid_out_in_full_precision_under_any_default() -> None:
    thirds, columns = torch.tensor([[1 / 3, 2 / 3]]), torch.tensor([1, 2])
    part = Part(np.array([0]), np.array([0]), thirds, columns, 1.0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        ((_, laid),) = _whole(part, 5, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert laid[0, 1:3].equal(thirds[0])
    assert laid.isnan().sum() == 3


# Memory ------------------------------------------------------------------------------------------


def relative(logits: Tensor) -> Tensor:
    return logits[:, 1] - 0.5 * logits[:, 1].mean()


@answers_only
def relative_of_few(logits: Tensor, context: MetricContext) -> Tensor:
    own = answer(logits, context)
    return own - 0.5 * own.mean()


def needed(metric: Any, rows: slice = slice(None), **options: Any) -> int:
    """Bytes that a sweep is said to need."""
    with pytest.raises(MemoryBudgetError, match=r"needs [\d.]+ KiB") as no:
        activation(metric, rows, memory_budget=1000, **options)
    assert no.value.forwards == 0
    return int(1024 * (float(re.search(r"needs ([\d.]+) KiB", str(no.value))[1]) + 0.1))


@pytest.mark.parametrize("engine", ["cone", "full"])
def test_logits_that_do_not_fit_are_an_error_before_anything_runs(engine: str) -> None:
    enough = needed(relative)
    with pytest.raises(MemoryBudgetError) as no:
        activation(relative, memory_budget=enough - 500, engine=engine)
    assert no.value.forwards == 0
    said = str(no.value)
    for part in ("'relative'", "@per_prompt", "@reads_tokens", "raise it", "fewer", "of 3 prompts"):
        assert part in said
    # Each way out.
    activation(relative, memory_budget=enough, engine=engine)
    activation("kl_divergence", memory_budget=enough - 500, engine=engine)
    activation(relative_of_few, memory_budget=enough - 500, engine=engine)
    activation(relative, slice(2), memory_budget=enough - 500, engine=engine)


def test_what_is_declared_needs_less() -> None:
    declared = per_prompt(lambda logits: logits[:, 1])
    vocabulary = 4 * 64
    # What is given to the metric and what it is copied from, of three prompts.
    assert needed(relative) - needed(declared) == pytest.approx(6 * vocabulary, abs=110)
    assert needed(declared) == needed("kl_divergence")
    assert needed(relative) > needed(relative_of_few)
    assert needed(relative, slice(1)) < needed(relative)


def test_the_default_budget_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(available=2 * 9_000)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: free)
    # By the estimate neither fits; of the model's own runs that may be too careful.
    activation("kl_divergence", slice(1), sites=Sites("resid", layers=[1], seq_pos_type="last"))
    free.available = 2 * 11_000
    with pytest.raises(MemoryBudgetError, match="'relative'") as no:
        activation(relative)
    assert no.value.forwards == 0


@pytest.mark.parametrize("budget", [None, "1 GiB"])
def test_beside_a_device_of_its_own_memory_the_hosts_counts(
    monkeypatch: pytest.MonkeyPatch, budget: str | None
) -> None:
    from nnpatch_core.memory import Gathered, limits

    class OnDevice:
        type = "cuda"

    model = tiny_model("llama")
    sites = [site for grid in SITES.grids(model, tiny_api(), 4).values() for site in grid.sites]
    monkeypatch.setattr(limits, "input_device", lambda model: OnDevice())
    patches = bind_cells(sites, model, 4)
    limits_of = functools.partial(
        limits.limits_of, patches, 64, 4, given=budget, batch_size=None, whole=True
    )
    waiting = Gathered(("mine",), 1000, True)
    alone = limits_of()
    wide = limits_of(gathered=waiting)
    assert alone.gathered == 0
    assert wide.cells(64, 64) == 1000
    assert (wide.budget, wide.usable) == pytest.approx((alone.budget, alone.usable), rel=0.2)
    free = 4 * 64 * (4 * 64 + 40 + 10 * 64)
    monkeypatch.setattr(limits, "host_memory", lambda: free)
    assert limits_of(gathered=waiting).cells(64, 64) == 6
    monkeypatch.setattr(limits, "host_memory", lambda: 4 * 64 * (4 * 64 + 39))
    with pytest.raises(MemoryBudgetError, match="more than half of the free host memory"):
        limits_of(gathered=waiting)
    limits_of()
