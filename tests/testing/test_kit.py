"""How the kit runs: in which order, on what, what it says, and as a plugin's own tests run it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from nnsight import NNsight
from torch import nn

from nnpatch_core import Component, DecoderAPI, decoder_components
from nnpatch_core.conformance import make_subject, why_skipped
from nnpatch_core.errors import AdapterError, LayerError, PatchingError, UnknownNameError
from nnpatch_core.testing import CHECKS, CheckError, parametrize_with_checks, run_checks, tiny_model
from nnpatch_llama import Llama3
from tests.helpers.counted import calling
from tests.helpers.kit import (
    GPT2,
    GRANITE,
    HALVED,
    LLAMA,
    QWEN3_NEXT,
    RIGHT,
    UNGROUPED,
    OwnCounts,
    arranged,
    changed,
    failures,
    fresh,
    heads,
    last_layer,
    mark_last,
    model_of,
    scaled,
    table,
)

pytest_plugins = ["pytester"]

#: nnsight says so of BERT's modules called `output`, which is of no use to anybody here.
pytestmark = pytest.mark.filterwarnings("ignore:Module .* has a submodule named:UserWarning")

#: Checks of what is said, not of what a forward gives.
WITHOUT_A_FORWARD = {"check_model_type", "check_undeclared"}
NUMBERS = [name for name in CHECKS if name not in WITHOUT_A_FORWARD]

# A check that could pass without running the model would be no check.


class BrokenError(RuntimeError):
    pass


def break_forward(model: Any) -> None:
    def refuse(*_: Any) -> None:
        raise BrokenError

    model.lm_head.register_forward_pre_hook(refuse)


def test_each_check_of_numbers_runs_the_model() -> None:
    forwards: list[str] = []
    model = fresh(lambda model: calling(model, lambda: forwards.append("")))
    subject = make_subject(Llama3, model())
    for name, check in CHECKS.items():
        before = len(forwards)
        check(subject)
        assert (len(forwards) > before) is (name in NUMBERS), name


def test_no_check_of_numbers_passes_on_a_model_that_does_not_run() -> None:
    results = run_checks(Llama3, fresh(break_forward)())
    assert set(failures(results)) == set(NUMBERS)
    assert all("BrokenError" in reason for reason in failures(results).values())


NO_HEADS = {name: attrs.evolve(Llama3.components[name], heads=None) for name in "qkv"}


@pytest.mark.parametrize(
    ("api", "model", "layers", "checks"),
    [
        pytest.param(changed(Llama3, **NO_HEADS), LLAMA, None, "query key value", id="no heads"),
        pytest.param(table("o"), LLAMA, None, "output", id="nothing that o could reach"),
        pytest.param(
            QWEN3_NEXT,
            RIGHT["qwen3_next"][1],
            [0],
            "query key value output",
            id="no such layer among those to look at",
        ),
    ],
)
def test_what_has_nothing_to_look_at_does_not_pass(
    api: Any, model: Callable[[], Any], layers: list[int] | None, checks: str
) -> None:
    names = [f"check_{part}_heads" for part in checks.split()]
    results = run_checks(api, model(), only=names, layers=layers)
    # What an adapter declares is known; what the layers have is a matter of the model.
    expected = "skipped" if layers is None else "failed"
    assert [result.status for result in results] == [expected] * len(names)
    assert all(result.reason for result in results)
    if layers is not None:
        assert all("no layer that is looked at has" in result.reason for result in results)


def test_the_projections_output_for_o_without_q_k_and_v() -> None:
    api = table("attn", "mlp", o=Component("self_attn.o_proj", heads="query"))
    assert failures(run_checks(arranged(api, "o attn mlp"), LLAMA()))


# What is right, but unlike the tiny models.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precision(dtype: torch.dtype) -> None:
    assert failures(run_checks(Llama3, fresh(lambda model: model.to(dtype))())) == {}


def test_double_precision() -> None:
    assert failures(run_checks(Llama3, fresh(lambda model: model.double())())) == {}


def test_large_activations() -> None:
    def enlarge(model: Any) -> None:
        with torch.no_grad():
            model.model.embed_tokens.weight *= 1000
        model.to(torch.bfloat16)

    found = failures(run_checks(Llama3, fresh(enlarge)(), only=["check_edits_stay"]))
    assert found == {}


def test_frozen_parameters() -> None:
    model = fresh(lambda model: model.requires_grad_(False))()
    assert failures(run_checks(Llama3, model)) == {}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_nothing_is_left_of_the_checks() -> None:
    model = tiny_model("llama", num_hidden_layers=2, attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    # Dropout is off: with it, no two runs would be alike.
    assert failures(run_checks(Llama3, model)) == {}
    assert failures(run_checks(Llama3, fresh(break_forward)())) != {}
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    hooks = [
        [*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks]
        for module in model.modules()
    ]
    assert not any(hooks)


# Running the kit.


def test_results_come_in_the_order_of_the_kit() -> None:
    results = run_checks(Llama3, LLAMA())
    assert [result.check for result in results] == list(CHECKS)
    assert {result.status for result in results} == {"passed"}
    assert all(result.ok and result.reason == "" for result in results)


def test_only_some_checks_run() -> None:
    wanted = ["check_padding", "check_layers"]
    for given in (wanted, tuple(wanted), iter(wanted)):
        results = run_checks(Llama3, LLAMA(), only=given)
        assert [result.check for result in results] == wanted
    assert run_checks(Llama3, LLAMA(), only=[]) == []


def test_only_some_layers_are_looked_at() -> None:
    wrong = last_layer(q=heads(Llama3, "q", 0, 1, 3, 2).components["q"])
    model = fresh(mark_last)()
    run = functools.partial(run_checks, wrong, model)
    assert failures(run(layers=[0])) == {}
    assert set(failures(run(layers=[1]))) == {"check_query_heads"}
    for layers in ([1, 0], (0, 1, 1), iter([1])):
        (result,) = run(layers=layers, only=["check_query_heads"])
        assert result.status == "failed"


@pytest.mark.parametrize("layers", [[2], [-1], [0.5], ["0"], [True]])
def test_layers_that_are_not_there(layers: list[Any]) -> None:
    with pytest.raises(LayerError, match="layer"):
        run_checks(Llama3, LLAMA(), layers=layers)


def test_known_failures() -> None:
    wrong = attrs.evolve(GRANITE, residual="sum", padding=False)
    known = {
        "check_residual": "scaled",
        "check_layers": "no longer true",
        "check_padding": "does not apply",
    }
    only = ["check_residual", "check_layers", "check_padding", "check_causal"]
    results = run_checks(wrong, HALVED(), known_failures=known, only=only)
    found = {result.check: result for result in results}
    assert [result.status for result in results] == ["known failure", "fixed", "skipped", "passed"]
    assert [result.ok for result in results] == [True, False, True, True]
    assert found["check_residual"].reason.startswith("scaled (resid_pre + attn + mlp is not resid")
    assert found["check_layers"].reason == "no longer true"
    assert found["check_padding"].reason == "the adapter declares padding=False"
    # A check that is not run is no failure, known or not.
    assert run_checks(wrong, HALVED(), known_failures=known, only=["check_causal"])[0].ok


def test_a_reason_names_an_error_that_is_not_the_checks_own() -> None:
    wrong = attrs.evolve(Llama3, layers="model.blocks")
    (result,) = run_checks(wrong, LLAMA(), only=["check_layers"])
    assert result.reason.startswith("AdapterError: adapter 'Llama3' does not fit LlamaForCausalLM")
    (result,) = run_checks(attrs.evolve(GRANITE, residual="sum"), HALVED(), only=["check_residual"])
    assert result.reason.startswith("resid_pre + attn + mlp is not resid")


@pytest.mark.parametrize("where", ["only", "known_failures"])
def test_a_name_that_is_no_check(where: str) -> None:
    given = {"only": ["check_heads"], "known_failures": {"check_heads": "new"}}[where]
    with pytest.raises(UnknownNameError) as error:
        run_checks(Llama3, LLAMA(), **{where: given})
    assert "'check_heads'" in str(error.value)
    assert all(name in str(error.value) for name in CHECKS)


@pytest.mark.parametrize("model", [None, "llama", nn.Linear(2, 2)])
def test_no_model(model: Any) -> None:
    with pytest.raises(AdapterError):
        run_checks(Llama3, model)


def test_a_wrapped_model() -> None:
    assert failures(run_checks(Llama3, NNsight(tiny_model(num_hidden_layers=2)))) == {}


@pytest.mark.parametrize(
    ("api", "skipped"),
    [
        (Llama3, {}),
        (
            arranged(Llama3, "resid_pre o attn mlp resid"),
            {"query_heads": "no q", "key_heads": "no k", "value_heads": "no v"},
        ),
        (
            arranged(Llama3, "resid_pre q k v attn mlp resid"),
            dict.fromkeys(("query_heads", "key_heads", "value_heads", "output_heads"), "no o"),
        ),
        (
            arranged(Llama3, "resid_pre q k v o attn mlp"),
            {
                "residual_is_everything": "no resid",
                "causal": "no resid",
                "residual": "lacks the residual stream",
            },
        ),
        (
            arranged(Llama3, "q k v o attn mlp resid"),
            {"residual": "lacks the residual stream", "blocks": "no resid_pre"},
        ),
        (
            arranged(Llama3, "resid_pre q k v o resid"),
            {"residual": "what is added to it", "blocks": "no attn"},
        ),
        (arranged(Llama3, "resid_pre q k v o attn resid"), {}),
        (attrs.evolve(Llama3, padding=False), {"padding": "declares padding=False"}),
        (attrs.evolve(Llama3, residual=None), {"residual": "declares residual=None"}),
        (scaled(Llama3), {}),
        # What some layers have is looked at there.
        (QWEN3_NEXT, {"cone_equals_full": "declares cone=False"}),
        # By default, what is not declared is what DecoderAPI has by default.
        (OwnCounts(), {}),
    ],
)
def test_why_a_check_does_not_apply(api: Any, skipped: dict[str, str]) -> None:
    found = {name: reason for name in CHECKS if (reason := why_skipped(name, api)) is not None}
    assert set(found) == {f"check_{name}" for name in skipped}
    assert all(words in found[f"check_{name}"] for name, words in skipped.items())


# As a plugin's tests run it.


def cases(*args: Any, **options: Any) -> dict[str, Any]:
    """The id of each case to the case."""
    names, found = parametrize_with_checks(*args, **options).args
    assert names == "check"
    return {case.id: case for case in found}


def test_one_case_for_each_check_of_each_adapter_on_each_model() -> None:
    both = DecoderAPI("Both", ("llama", "mistral"), decoder_components())
    assert list(cases(both)) == [
        f"Both-{model}-{check}" for model in ("llama", "mistral") for check in CHECKS
    ]
    assert list(cases([Llama3, GPT2])) == [
        *(f"Llama3-llama-{check}" for check in CHECKS),
        *(f"GPT2-gpt2-{check}" for check in CHECKS),
    ]
    models = {"grouped": LLAMA, "ungrouped": UNGROUPED}
    assert list(cases("Llama3", models)) == [
        f"Llama3-{model}-{check}" for model in models for check in CHECKS
    ]
    assert not any(case.marks for case in cases(both).values())


def test_marks_of_a_case() -> None:
    wrong = attrs.evolve(Llama3, padding=False)
    known = {"check_residual": "one day", "check_padding": "does not apply"}
    found = cases(wrong, known_failures=known)
    marked = {name: case.marks for name, case in found.items() if case.marks}
    assert list(marked) == ["Llama3-llama-check_residual", "Llama3-llama-check_padding"]
    (failing,), (skipped,) = marked.values()
    assert (failing.name, failing.kwargs) == ("xfail", {"reason": "one day", "strict": True})
    assert skipped.name == "skip"
    assert skipped.kwargs == {"reason": "the adapter declares padding=False"}


def test_a_model_is_made_when_it_is_needed_and_once() -> None:
    made = []

    def make() -> Any:
        made.append("")
        return LLAMA()

    found = cases(Llama3, {"tiny": make})
    assert made == []
    for check in ("check_model_type", "check_layers"):
        (bound,) = found[f"Llama3-tiny-{check}"].values
        bound()
    assert len(made) == 1


def test_a_case_fails_as_its_check_does() -> None:
    found = cases(attrs.evolve(GRANITE, residual="sum"), {"halved": HALVED})
    (bound,) = found["Granite-halved-check_residual"].values
    with pytest.raises(CheckError, match="is not resid in layer 0"):
        bound()


def test_a_case_does_not_warn_of_its_own_prompts() -> None:
    """A plugin's tests may make each warning an error, as these do."""
    first = int(make_subject(Llama3, LLAMA()).source.tokens[0, 0])
    model = model_of("llama", pad_token_id=first)
    (bound,) = cases(Llama3, {"tiny": model})["Llama3-tiny-check_sweep"].values
    bound()


def test_a_case_does_not_warn_of_what_is_another_check() -> None:
    other = attrs.evolve(Llama3, model_types=("other",))
    (bound,) = cases(other, {"tiny": LLAMA})["Llama3-tiny-check_sweep"].values
    bound()


@pytest.mark.parametrize(
    ("args", "options", "error", "words"),
    [
        (([],), {}, PatchingError, "at least one"),
        (("Llama9",), {}, UnknownNameError, "Llama9"),
        ((3,), {}, AdapterError, "adapter"),
        ((None,), {}, AdapterError, "adapter"),
        ((Llama3,), {"known_failures": {"check_heads": ""}}, UnknownNameError, "check_padding"),
    ],
)
def test_arguments_that_are_none(
    args: tuple, options: dict, error: type[PatchingError], words: str
) -> None:
    with pytest.raises(error, match=words):
        parametrize_with_checks(*args, **options)


PLUGINS_TESTS = """
import attrs
from nnpatch_core.testing import parametrize_with_checks, tiny_model
from nnpatch_llama import Llama3

one_layer = {"tiny": lambda: tiny_model("llama", num_hidden_layers=1)}

@parametrize_with_checks(Llama3, one_layer)
def test_right(check):
    check()

wrong = attrs.evolve(Llama3, query_heads=2, key_value_heads=1, padding=False)

@parametrize_with_checks(wrong, one_layer, known_failures={
    "check_query_heads": "counted wrongly", "check_layers": "they were",
})
def test_wrong(check):
    check()
"""


def test_pytest_runs_the_cases(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(PLUGINS_TESTS)
    result = pytester.runpytest_inprocess("-rxsf", "-p", "no:cacheprovider")
    # Of the wrong one: k's heads, and what is said to fail but does not.
    result.assert_outcomes(passed=2 * len(CHECKS) - 4, failed=2, xfailed=1, skipped=1)
    result.stdout.fnmatch_lines_random(
        [
            "FAILED *test_wrong[[]Llama3-tiny-check_key_heads[]]*",
            "FAILED *test_wrong[[]Llama3-tiny-check_layers[]]*",
            "*CheckError: half of k L0 H0 does not reach*",
            "XFAIL *test_wrong[[]Llama3-tiny-check_query_heads[]] - counted wrongly",
            "SKIPPED * the adapter declares padding=False",
        ]
    )
