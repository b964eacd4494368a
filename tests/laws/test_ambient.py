"""What the user has set for all of torch changes no number, and is as it was afterwards."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import NNsight
from torch import Tensor

from nnpatch_core import (
    Circuit,
    PromptPairs,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    cache_average,
    circuit_curve,
    edge_patching,
    evaluate_circuit,
    find_circuit,
    infer_adapter,
    plan_sweep,
)
from nnpatch_core.edges import Nodes
from nnpatch_core.errors import GradientError, StatisticsWarning
from nnpatch_core.testing import run_checks, tiny_model, tiny_tokenizer
from nnpatch_llama import Llama3
from tests.helpers.paths import ROOT
from tests.helpers.samples import THREE

#: Padding is a part of what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

SOURCE, TARGET, ANSWERS = THREE
MASK = torch.tensor([[1] * 6, [0, 1, 1, 1, 1, 1], [1] * 6])
SITES = Sites(["q", "o", "mlp", "resid"], seq_pos_type="each")
#: One forward for each cell takes a while: some of each kind.
FEW = Sites(["q", "o", "mlp", "resid"], layers=[0, 2], seq_pos_type="lastk", seq_pos=2)
EVERY = ["logit_difference", "kl_divergence", "answer_probability"]

# The states.


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def gradients(on: bool) -> Iterator[None]:
    """Set as a statement, which no block undoes."""
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(on)
    try:
        yield
        assert torch.is_grad_enabled() == on
    finally:
        torch.set_grad_enabled(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], Any]] = {
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: default_device("meta"),
    "gradients off": lambda: gradients(False),
    "gradients on": lambda: gradients(True),
    "inference mode": torch.inference_mode,
    "deterministic": deterministic,
}

# The entry points, each with all numbers that it gives.


def numbers(out: Any) -> dict[str, Tensor]:
    found = {f"{metric} of {name}": out.raw[metric][name] for metric in out.raw for name in out}
    return found | {f"value of {name}": out[name] for name in out}


def activation(model: Any, **options: Any) -> dict[str, Tensor]:
    out = activation_patching(
        model,
        Llama3,
        options.pop("sites", SITES),
        SOURCE,
        TARGET,
        *ANSWERS,
        attention_mask=MASK,
        metric=EVERY,
        progress=False,
        **options,
    )
    assert out.info["engine"] == options.get("engine", out.info["engine"])
    out.to_dataframe()
    return numbers(out)


def ablation(model: Any, **options: Any) -> dict[str, Tensor]:
    out = ablation_patching(
        model,
        Llama3,
        options.pop("sites", SITES),
        TARGET,
        *ANSWERS,
        attention_mask=MASK,
        metric=EVERY,
        progress=False,
        **options,
    )
    return numbers(out)


def attribution(model: Any, **options: Any) -> dict[str, Tensor]:
    out = attribution_patching(
        model,
        Llama3,
        SITES,
        options.pop("source", SOURCE),
        TARGET,
        *ANSWERS,
        attention_mask=MASK,
        progress=False,
        **options,
    )
    return numbers(out)


def own_trace(model: Any) -> dict[str, Tensor]:
    nnmodel, site = NNsight(model), Site.get_site(Llama3, "q", 1, head=2, seq_pos=[3])
    found = {}
    with nnmodel.trace(SOURCE):
        site.cache(nnmodel)
    with nnmodel.trace(TARGET):
        site.patch(nnmodel)
        found["patched"] = nnmodel.output.logits[:, -1].save()
    with nnmodel.trace(TARGET):
        site.patch(nnmodel, zero=True)
        found["ablated"] = nnmodel.output.logits[:, -1].save()
    return {**found, "value": site.value}


def plan(model: Any) -> dict[str, Tensor]:
    found = plan_sweep(model, Llama3, SITES, SOURCE, TARGET, attention_mask=MASK)
    return {"plan": torch.tensor([found.cells, found.elided, found.token_layers], device="cpu")}


def average(model: Any) -> dict[str, Tensor]:
    sites = [Site.get_site(Llama3, name, 1, seq_pos=[-1]) for name in ("q", "mlp")]
    cache_average(model, sites, [SOURCE, (TARGET, MASK)])
    return {site.name: site.value for site in sites}


def edges(model: Any, **options: Any) -> dict[str, Tensor]:
    out = edge_patching(
        model,
        Llama3,
        SOURCE,
        TARGET,
        *ANSWERS,
        senders=["input", "a0.h1", "m1"],
        receivers=options.pop("receivers", None),
        attention_mask=MASK,
        metric=options.pop("metric", EVERY),
        progress=False,
        **options,
    )
    found = numbers(out.outcome) | {"matrix": out.matrix, "exact": out.exact}
    return found | {f"position {edge}": out[edge] for edge in out if out.matrix.ndim > 2}


#: A circuit's prompts are of one length in both runs, as those of these masks are.
CIRCUITS = (SOURCE, TARGET, *ANSWERS)


def circuit(model: Any, **options: Any) -> dict[str, Tensor]:
    edges = [f"input->{node}" for node in ("a0.h1<k>", "m0", "m1")] + ["a0.h1->m1", "m1->logits"]
    found = evaluate_circuit(
        model,
        Llama3,
        Circuit.of(Nodes((4,) * 3, (2,) * 3, (False,) * 3), edges),
        *CIRCUITS,
        attention_mask=MASK,
        metric=EVERY,
        complement=True,
        random=1,
        progress=False,
        **options,
    )
    return numbers(found.outcome)


def found_circuit(model: Any) -> dict[str, Tensor]:
    words = [" red", " blue", " green", " black"]
    others = [*words[1:], words[0]]
    pairs = PromptPairs.from_texts(words, others, words, others, tiny_tokenizer(words))
    found = find_circuit(model, Llama3, pairs, method="eap", top_k=5, evaluations=9, progress=False)
    with pytest.warns(StatisticsWarning, match="too few"):
        curve = circuit_curve(
            model, Llama3, found.circuit, pairs, fractions=[0.3, 1], progress=False
        )
    assert found.reached
    # Which edges it has may hang by a last digit.
    return {"edges": found.edges.matrix, "curve": curve.faithfulness}


def inferred(model: Any) -> dict[str, Tensor]:
    adapter = infer_adapter(model, "Found")
    assert adapter.components == Llama3.components
    assert adapter.cone
    assert adapter.padding
    assert adapter.residual == "sum"
    return {}


def kit(model: Any) -> dict[str, Tensor]:
    for result in run_checks(Llama3, model):
        assert result.status == "passed", result
    return {}


def weights(model: Any) -> dict[str, Tensor]:
    """A model made here is the one that is made anywhere."""
    made = tiny_model("llama")
    found = dict(made.state_dict())
    assert {value.dtype for value in found.values()} == {torch.float32}
    return found


CALLS: dict[str, Callable[[Any], Mapping[str, Tensor]]] = {
    "activation, cone": functools.partial(activation, engine="cone"),
    "activation, full": functools.partial(activation, engine="full", sites=FEW),
    "activation, one by one": functools.partial(activation, batch_size=1, engine="cone"),
    "activation, screened": functools.partial(activation, screen="attribution", top_k=3),
    "activation, screened by AtP*": functools.partial(activation, screen="atp*", top_k=3),
    "ablation, zero": functools.partial(ablation, method="zero"),
    "ablation, mean": functools.partial(ablation, method="mean", per_position=True),
    "ablation, resample": functools.partial(ablation, method="resample"),
    "ablation, full": functools.partial(
        ablation, method="mean", reference=SOURCE, engine="full", sites=FEW
    ),
    "attribution": attribution,
    "attribution, integrated": functools.partial(attribution, steps=2),
    "attribution, QK fix": functools.partial(attribution, qk_fix=True),
    "attribution, GradDrop": functools.partial(attribution, grad_drop=True),
    "attribution, ablated": functools.partial(attribution, source=None, ablation="mean"),
    "edges, cone": functools.partial(edges, engine="cone"),
    "edges, full, of each position": functools.partial(
        edges,
        engine="full",
        receivers=["a1.h0<q>", "a2.h1<k>", "m2", "logits"],
        seq_pos_type="lastk",
        seq_pos=2,
    ),
    "edges, ablated, one by one": functools.partial(edges, ablation="resample", batch_size=1),
    "edges, by attribution": functools.partial(edges, method="eap"),
    "edges, by attribution on the way": functools.partial(
        edges, method="eap-ig-activations", steps=2, metric="logit_difference", ablation="mean"
    ),
    "edges, screened": functools.partial(
        edges, method="clean-corrupted", top_k=3, metric="logit_difference"
    ),
    "circuit": circuit,
    "circuit, others at their mean": functools.partial(circuit, ablation="mean", batch_size=1),
    "circuit, found by attribution": found_circuit,
    "own traces": own_trace,
    "plan": plan,
    "average": average,
    "inferred adapter": inferred,
    "kit": kit,
    "tiny model": weights,
}


@functools.cache
def expected(name: str) -> Mapping[str, Tensor]:
    return CALLS[name](tiny_model("llama"))


def assert_equal(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], atol: float = 0.0
) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].device == value.device, name
        torch.testing.assert_close(
            found[name].detach(), value.detach(), atol=atol, rtol=0, equal_nan=True, msg=name
        )


#: What is told instead: it keeps no graph there.
NO_GRAPH = [name for name in CALLS if "attribution" in name or "screened" in name]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("state", STATES)
def test_what_is_set_for_all_of_torch_changes_nothing(state: str, name: str) -> None:
    wanted, model = expected(name), tiny_model("llama")
    with STATES[state]():
        if state == "inference mode" and name in NO_GRAPH:
            with pytest.raises(GradientError, match=r"torch.inference_mode\(\) is on"):
                CALLS[name](model)
            found = wanted
        else:
            found = CALLS[name](model)
    if (state, name) != ("default device meta", "tiny model"):  # made without weights, as asked
        assert_equal(found, wanted)
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert not any(module.training for module in model.modules())
    # And nothing of it stays behind.
    model(SOURCE).logits.sum().backward()


# What is set on the model.


def training(model: Any) -> Any:
    model.train()
    model.model.layers[1].eval()
    return model


def frozen(model: Any) -> Any:
    return model.requires_grad_(False)


def frozen_embedding(model: Any) -> Any:
    model.get_input_embeddings().requires_grad_(False)
    return model


def all_but_the_embedding(model: Any) -> Any:
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    return model


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", [training, frozen, frozen_embedding, all_but_the_embedding])
def test_what_is_set_on_the_model_changes_nothing(mode: Callable[[Any], Any], name: str) -> None:
    wanted, model = expected(name), mode(tiny_model("llama", attention_dropout=0.5))
    asked = {path: weight.requires_grad for path, weight in model.named_parameters()}
    flags = {path: module.training for path, module in model.named_modules()}
    if mode is training and name == "own traces":
        pytest.skip("the user's own trace is a run in training mode")
    # Torch multiplies by a matrix in another way if that asks for no gradient: a last digit.
    assert_equal(CALLS[name](model), wanted, 0.0 if mode is training else 1e-5)
    assert {path: weight.requires_grad for path, weight in model.named_parameters()} == asked
    assert {path: module.training for path, module in model.named_modules()} == flags
    assert all(weight.grad is None for weight in model.parameters())


# Autocast, in which the model's own numbers are others.


@pytest.mark.parametrize("name", CALLS)
def test_autocast_is_for_the_model(name: str) -> None:
    wanted, model = expected(name), tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        found = CALLS[name](model)
        assert torch.is_autocast_enabled("cpu")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype or name == "own traces"
        torch.testing.assert_close(
            found[key].detach().float(), value.detach().float(), atol=0.1, rtol=0, equal_nan=True
        )


@pytest.mark.parametrize(("call", "options"), [(activation, {}), (ablation, {"method": "zero"})])
def test_the_engines_agree_under_autocast(call: Any, options: dict[str, Any]) -> None:
    """To the rounding of bfloat16, and with the model's numbers, not those without it."""
    model = tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        cone, full = (call(model, engine=engine, **options) for engine in ("cone", "full"))
    plain = call(model, engine="full", **options)
    for key, value in full.items():
        if not key.startswith("value"):
            torch.testing.assert_close(cone[key], value, atol=0.02, rtol=0, equal_nan=True)
    assert any(not torch.equal(full[key], plain[key]) for key in full)


@pytest.mark.parametrize("options", [{"steps": 2}, {"qk_fix": True}])
def test_sums_of_our_own_are_not_rounded(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast what is made of the model's numbers goes on in their type."""
    real, rounded = torch.einsum, []

    def spy(*arguments: Any) -> Tensor:
        rounded.append(torch.is_autocast_enabled("cpu"))
        return real(*arguments)

    monkeypatch.setattr(torch, "einsum", spy)
    with torch.autocast("cpu", torch.bfloat16):
        attribution(tiny_model("llama"), **options)
    assert rounded
    assert not any(rounded)


# The law, as far as the source tells.

#: What makes a tensor out of nothing: where torch's default device counts, and the default dtype.
MAKE_INTEGERS = {"arange", "as_tensor", "randint", "randperm", "tensor"}
MAKE = {"empty", "eye", "full", "linspace", "ones", "rand", "randn", "zeros"}


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("nnpatch_*/src/**/*.py")), ids=lambda path: path.name
)
def test_every_tensor_that_is_made_names_its_device_and_type(path: Path) -> None:
    unnamed = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        maker, owner = node.func.attr, node.func.value
        if not isinstance(owner, ast.Name) or owner.id != "torch":
            continue
        needed = {"device"} if maker in MAKE_INTEGERS else {"device", "dtype"}
        given = {keyword.arg for keyword in node.keywords}
        if maker in MAKE | MAKE_INTEGERS and not needed <= given:
            unnamed.append(f"line {node.lineno}: torch.{maker}")
    assert not unnamed
