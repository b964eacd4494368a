"""The built-in metrics against their formulas, and what a metric of one's own may look like."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from nnpatch_core import MetricContext, Outcome, Sites, ablation_patching, activation_patching
from nnpatch_core.errors import AnswerError, MetricError, UnknownNameError
from nnpatch_core.metrics import BUILTIN_METRICS, measure, name_metrics, with_context
from nnpatch_core.plugins import find_metric
from nnpatch_core.testing import tiny_model
from tests.helpers.counted import calling
from tests.helpers.metrics import OF_LAST_TOKEN

VOCAB = 7
finite = st.floats(-30, 30, width=32)


@st.composite
def runs(draw: st.DrawFn) -> Any:
    """Logits of a patched, a source and a target run, and the answers to the two prompts."""
    batch = draw(st.integers(1, 4))
    logits = arrays(np.float32, (batch, VOCAB), elements=finite)
    answers = arrays(np.int64, batch, elements=st.integers(0, VOCAB - 1))
    return [draw(logits) for _ in range(3)] + [draw(answers) for _ in range(2)]


def context_of(
    source: Tensor, target: Tensor, source_answers: Tensor, target_answers: Tensor
) -> MetricContext:
    return MetricContext(*map(torch.tensor, (source_answers, target_answers, source, target)))


def log_softmax(logits: Tensor) -> Tensor:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def by_hand(
    name: str, logits: Tensor, source: Any, source_answers: Tensor, target_answers: Tensor
) -> Any:
    """The formulas, row by row and in float64."""
    rows = range(len(logits))
    own, base = log_softmax(logits), log_softmax(source)
    formulas = {
        "logit_difference": lambda row: (
            float(logits[row, source_answers[row]]) - float(logits[row, target_answers[row]])
        ),
        "answer_probability": lambda row: np.exp(own[row, source_answers[row]]),
        "answer_log_probability": lambda row: own[row, source_answers[row]],
        "kl_divergence": lambda row: (np.exp(base[row]) * (base[row] - own[row])).sum(),
    }
    return np.array([formulas[name](row) for row in rows])


@pytest.mark.parametrize("name", OF_LAST_TOKEN)
@given(runs=runs())
def test_built_in_metric_is_its_formula(name: Any, runs: Any) -> None:
    logits, source, target, source_answers, target_answers = runs
    context = context_of(source, target, source_answers, target_answers)
    value = BUILTIN_METRICS[name](torch.tensor(logits), context)
    expected = by_hand(name, logits, source, source_answers, target_answers)
    assert value.shape == (len(logits),)
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", OF_LAST_TOKEN)
@given(runs=runs(), shift=st.floats(-10, 10, width=32))
def test_adding_one_number_to_all_logits_changes_nothing(name: Any, runs: Any, shift: Any) -> None:
    logits, *context = runs
    context = context_of(*context)
    before = BUILTIN_METRICS[name](torch.tensor(logits), context)
    after = BUILTIN_METRICS[name](torch.tensor(logits) + shift, context)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OF_LAST_TOKEN)
@given(runs=runs(), order=st.randoms(use_true_random=False))
def test_prompts_do_not_look_at_each_other(name: Any, runs: Any, order: Any) -> None:
    rows = list(range(len(runs[0])))
    order.shuffle(rows)
    shuffled = [values[rows] for values in runs]
    whole, again = (
        BUILTIN_METRICS[name](torch.tensor(logits), context_of(*context))
        for logits, *context in (runs, shuffled)
    )
    torch.testing.assert_close(again, whole[rows])


@given(runs=runs())
def test_ranges(runs: Any) -> None:
    logits, *rest = runs
    context, logits = context_of(*rest), torch.tensor(logits)
    probability = BUILTIN_METRICS["answer_probability"](logits, context)
    assert ((probability >= 0) & (probability <= 1 + 1e-6)).all()
    torch.testing.assert_close(
        BUILTIN_METRICS["answer_log_probability"](logits, context).exp(),
        probability,
        rtol=1e-4,
        atol=1e-6,
    )
    assert (BUILTIN_METRICS["kl_divergence"](logits, context) >= -1e-4).all()
    assert (BUILTIN_METRICS["kl_divergence"](context.source_logits, context) == 0).all()


@given(runs=runs())
def test_logit_difference_changes_its_sign_with_the_answers(runs: Any) -> None:
    logits, source, target, one, other = runs
    metric = BUILTIN_METRICS["logit_difference"]
    there = metric(torch.tensor(logits), context_of(source, target, one, other))
    back = metric(torch.tensor(logits), context_of(source, target, other, one))
    assert there.equal(-back)


def test_kl_divergence_is_of_the_source_run_from_this_one() -> None:
    """Not the other way round: `KL(source || this run)`."""
    source = torch.tensor([[0.9, 0.1]]).log()
    run = torch.tensor([[0.5, 0.5]]).log()
    context = MetricContext(torch.tensor([0]), None, source, run)
    value = BUILTIN_METRICS["kl_divergence"](run, context)
    expected = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_logit_difference_needs_both_answers() -> None:
    logits = torch.zeros(1, VOCAB)
    context = MetricContext(torch.tensor([0]), None, logits, logits)
    with pytest.raises(AnswerError, match="'logit_difference' compares two answers"):
        BUILTIN_METRICS["logit_difference"](logits, context)
    for name in {*OF_LAST_TOKEN} - {"logit_difference"}:
        assert BUILTIN_METRICS[name](logits, context).isfinite().all()


# In a sweep -------------------------------------------------------------------------------------

SOURCE = torch.tensor([[5, 6, 7], [8, 9, 10]])
TARGET = torch.tensor([[5, 16, 7], [8, 19, 10]])
SOURCE_ANSWERS, TARGET_ANSWERS = torch.tensor([21, 22]), torch.tensor([31, 32])


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def sweep(model: Any, metric: Any, **options: Any) -> Outcome:
    return activation_patching(
        model,
        None,
        Sites("resid", seq_pos_type="last"),
        SOURCE,
        TARGET,
        SOURCE_ANSWERS,
        TARGET_ANSWERS,
        metric=metric,
        progress=False,
        **options,
    )


def test_metrics_of_a_sweep_are_measured_on_the_models_own_logits(model: Any) -> None:
    out = sweep(model, OF_LAST_TOKEN)
    with torch.no_grad():
        source, target = (model(tokens).logits[:, -1].numpy() for tokens in (SOURCE, TARGET))
    for name in OF_LAST_TOKEN:
        baseline = out.for_metric(name).baseline
        answers = (SOURCE_ANSWERS.numpy(), TARGET_ANSWERS.numpy())
        for logits, measured in ((source, baseline.source), (target, baseline.target)):
            expected = by_hand(name, logits, source, *answers)
            np.testing.assert_allclose(measured.numpy(), expected, rtol=1e-4, atol=1e-4)
        # The last position of the last layer is all that the logits are made of.
        np.testing.assert_allclose(out.for_metric(name)["resid"][-1], 1, atol=1e-4)


def test_kl_divergence_of_an_ablation_is_from_the_unablated_run(model: Any) -> None:
    out = ablation_patching(
        model,
        None,
        Sites("mlp", layers=[0], seq_pos_type="last"),
        SOURCE,
        SOURCE_ANSWERS,
        metric="kl_divergence",
        progress=False,
    )
    assert out.baseline.source.tolist() == [0, 0]
    assert (out["mlp"][0] > 0).all()


def test_several_metrics_cost_no_further_runs() -> None:
    forwards = []
    model = calling(tiny_model(), lambda: forwards.append(1))
    sweep(model, "logit_difference")
    alone = len(forwards)
    sweep(model, OF_LAST_TOKEN)
    assert len(forwards) == 2 * alone


def test_metric_is_given_float32_logits(model: Any) -> None:
    seen = []

    def mine(logits: Tensor, context: Any) -> Tensor:
        seen.append((logits.dtype, tuple(logits.shape), logits.requires_grad))
        seen.append((context.source_logits.dtype, tuple(context.source_logits.shape), False))
        return logits[:, 0]

    sweep(tiny_model().bfloat16(), mine, engine="full")
    assert set(seen) == {(torch.float32, (2, 64), False)}


# Metrics of one's own ---------------------------------------------------------------------------


def _logits(logits: Tensor) -> torch.Tensor:
    return logits[:, 0]


def _context(logits: Tensor, context: MetricContext) -> torch.Tensor:
    return logits[:, 0] - context.source_logits[:, 0]


def _other_names(x: Any, y: Any) -> Any:
    return _context(x, y)


def _option(logits: Tensor, index: int = 0) -> torch.Tensor:
    return logits[:, index]


def _any(*arguments: Any) -> Any:
    return _context(*arguments)


def _keyword_only(logits: Tensor, *, context: Any) -> Tensor:
    return _context(logits, context)


class _Object:
    def __call__(self, logits: Tensor, context: MetricContext) -> torch.Tensor:
        return _context(logits, context)

    def method(self, logits: Tensor) -> Tensor:
        return _logits(logits)


@pytest.mark.parametrize(
    ("metric", "takes_context"),
    [
        (_logits, False),
        (lambda logits: logits[:, 0], False),
        (_option, False),
        (functools.partial(_option, index=0), False),
        (_Object().method, False),
        (_context, True),
        (_other_names, True),
        (_any, True),
        (functools.partial(_context), True),
        (_Object(), True),
        (_keyword_only, True),
    ],
)
def test_metric_of_ones_own_takes_the_logits_or_the_context_too(
    metric: _Object | Callable[..., Any], takes_context: bool
) -> None:
    logits, source = torch.randn(2, 3), torch.randn(2, 3)
    context = MetricContext(torch.tensor([0, 1]), None, source, source)
    expected = logits[:, 0] - (source[:, 0] if takes_context else 0)
    assert with_context(metric)(logits, context).equal(expected)


def test_metric_of_ones_own_in_a_sweep(model: Any) -> None:
    out = sweep(model, {"first": _logits, "logit_difference": "logit_difference"})
    assert out.metrics == ("first", "logit_difference")
    with torch.no_grad():
        expected = model(SOURCE).logits[:, -1, 0]
    torch.testing.assert_close(out.baseline.source, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("kl_divergence", ["kl_divergence"]),
        (["kl_divergence", "answer_probability"], ["kl_divergence", "answer_probability"]),
        (("logit_difference", _logits), ["logit_difference", "_logits"]),
        (_logits, ["_logits"]),
        (_Object(), ["_Object"]),
        (lambda logits: logits[:, 0], ["<lambda>"]),
        ({"mine": _logits, "kl": "kl_divergence"}, ["mine", "kl"]),
    ],
)
def test_names_of_metrics(spec: Any, names: list[str]) -> None:
    assert list(name_metrics(spec, find_metric)) == names


def test_metric_by_name_is_the_one_that_is_registered() -> None:
    for name, metric in BUILTIN_METRICS.items():
        assert find_metric(name) is metric
    with pytest.raises(UnknownNameError, match=r"'kl'; there are .*kl_divergence"):
        find_metric("kl")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_values_are_float32_whatever_the_metric_gives(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    context = MetricContext(torch.tensor([0, 1]), None, logits, logits)
    (value,) = measure({"mine": lambda logits, _: logits[:, 0].to(dtype)}, logits, context).values()
    assert value.dtype == torch.float32
    assert value.tolist() == [1, 0]


def test_values_carry_no_gradient() -> None:
    logits = torch.ones(2, 3, requires_grad=True)
    context = MetricContext(torch.tensor([0, 1]), None, logits, logits)
    (value,) = measure({"mine": lambda logits, _: logits[:, 0]}, logits, context).values()
    assert not value.requires_grad


def test_metric_error_names_the_metric_and_both_shapes() -> None:
    logits = torch.zeros(2, 3)
    context = MetricContext(torch.tensor([0, 1]), None, logits, logits)
    with pytest.raises(MetricError, match=r"'mine'.*\[2\].*\(3,\)"):
        measure({"mine": lambda logits, _: logits[0]}, logits, context)
