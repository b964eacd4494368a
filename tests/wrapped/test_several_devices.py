"""A model over several devices, which are not there: tensors of two of them never meet.

`tests/helpers/pretended.py` tells how. The numbers must be those of the model as it is, which other
tests hold to oracles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from nnsight import NNsight
from torch import Tensor

from nnpatch_core import (
    Add,
    Circuit,
    MultiSite,
    Set,
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
    path_patching,
    reads_activations,
    reads_tokens,
    steer,
)
from nnpatch_core.errors import MemoryBudgetError
from nnpatch_core.plugins import find_adapter
from nnpatch_core.spaces import Subspace
from nnpatch_core.subspace import collect, evaluate_subspace
from nnpatch_core.testing import tiny_model
from tests.helpers.families import FAMILIES as TABLES
from tests.helpers.lessons import last, learned, some_pairs
from tests.helpers.oracle import COMPONENTS
from tests.helpers.pretended import DevicesMeetError, device_map, pretending, spread

pytestmark = [
    # Padding is a part of what is tested here, so that what it mixes needs no word.
    pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning"),
    pytest.mark.filterwarnings("ignore::nnpatch_core.errors.StatisticsWarning"),
]

SOURCE = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 1, 2, 3, 4]])
TARGET = torch.tensor([[5, 16, 7, 18, 9, 10], [0, 0, 1, 12, 3, 4]])
MASK = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
RUNS = SOURCE, TARGET, torch.tensor([20, 21]), torch.tensor([30, 31])
QUIET: dict[str, Any] = {"attention_mask": MASK, "progress": False}
EACH = Sites(COMPONENTS, seq_pos_type="each")
#: Where each cell is a whole forward: a position is an index there, and two will do.
TWO = Sites(COMPONENTS, seq_pos_type="custom", seq_pos=[-1, -3])
REFERENCE = {"reference": (SOURCE, MASK)}


def adapter(it: Any) -> Any:
    return find_adapter(None, getattr(it, "_module", it))


def api_of(it: Any) -> Any:
    """The adapter of a family that no plugin knows; else None."""
    kind = it.config.model_type
    return TABLES[kind].api if kind in ("gpt2", "gpt_neox", "mixtral", "phi3") else None


def activation(sites: Any = EACH, **options: Any) -> Any:
    return lambda it: activation_patching(it, api_of(it), sites, *RUNS, **QUIET, **options)


def ablation(sites: Any = EACH, **options: Any) -> Any:
    return lambda it: ablation_patching(
        it, api_of(it), sites, TARGET, *RUNS[2:], **QUIET, **options
    )


def attribution(sites: Any = EACH, **options: Any) -> Any:
    return lambda it: attribution_patching(it, api_of(it), sites, *RUNS, **QUIET, **options)


def edges(**options: Any) -> Any:
    return lambda it: edge_patching(it, api_of(it), *RUNS, **QUIET, **options).outcome


def paths(*nodes: Any, **options: Any) -> Any:
    return lambda it: path_patching(
        it, api_of(it), *(nodes or (None, None)), *RUNS, **QUIET, **options
    )


def jointly(run: Any, it: Any) -> Any:
    api = adapter(it)
    two = [Site.get_site(api, "mlp", 0), Site.get_site(api, "attn", 1)]
    return run(Sites.from_sites([MultiSite(two)]))(it)


def compared(logits: Tensor) -> Tensor:
    return logits[:, 3] - 0.5 * logits[:, 3].mean()


def steered_sweep(it: Any) -> Any:
    with steer(it, Site.get_site(adapter(it), "mlp", 1), Add(torch.full([32], 0.3))):
        return activation(TWO, engine="full")(it)


def generated(it: Any) -> dict[str, Tensor]:
    found = {}
    for layer in range(3):
        value = Set(torch.full([2, 1], 2.0))
        space = Subspace.random(32)
        site = Site.get_site(adapter(it), "resid", layer, seq_pos=[-1], subspace=space)
        with steer(it, site, value):
            out = it.generate(
                TARGET,
                attention_mask=MASK,
                max_new_tokens=3,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
        found[str(layer)] = torch.stack(out.logits)
    return found


def collected(it: Any) -> dict[str, Tensor]:
    found = {}
    for layer in range(3):
        site = Site.get_site(adapter(it), "resid", layer, subspace=Subspace.random(32, 2))
        rows = collect(it, site, (TARGET, MASK), progress=False)
        found[str(layer)] = torch.as_tensor(rows.values)
    return found


def averaged(it: Any) -> dict[str, Tensor]:
    sites = [
        Site.get_site(adapter(it), name, layer, seq_pos=[-1])
        for layer in range(3)
        for name in COMPONENTS
    ]
    cache_average(it, sites, [(SOURCE, MASK), (TARGET, MASK)])
    return {site.label: site.value.cpu() for site in sites}


def own_traces(it: Any) -> dict[str, Tensor]:
    """Values taken in one layer and put in another, in the user's own traces."""
    nnmodel, found = NNsight(it), {}
    with torch.no_grad():
        for layer in range(3):
            site = Site.get_site(adapter(it), "o", layer=layer, head=2, seq_pos=[-1])
            with nnmodel.trace(SOURCE[:1]):
                site.cache(nnmodel)
            with nnmodel.trace(TARGET[:1]):
                site.patch(nnmodel)
                found[str(layer)] = nnmodel.output.logits[0, -1].cpu().save()
    return found


def taught(engine: str, it: Any) -> dict[str, Tensor]:
    trained = learned(it, engine=engine, random_model=False)
    measured = evaluate_subspace(it, None, last(layer=2), some_pairs(), Subspace.random(32))
    losses = torch.tensor([each.held_out_loss for each in trained.history])
    rows = torch.tensor([measured[name].accuracy.value for name in measured])
    return {"basis": trained.subspace.basis, "losses": losses, "rows": rows}


@functools.cache
def circuit() -> Circuit:
    scored = edge_patching(tiny_model("llama"), None, *RUNS, **QUIET, method="eap")
    return Circuit.from_edges(scored, n=40)


def of_circuit(**options: Any) -> Any:
    return lambda it: evaluate_circuit(it, None, circuit(), *RUNS, **QUIET, **options).outcome


def curve(it: Any) -> dict[str, Tensor]:
    found = circuit_curve(it, None, circuit(), *RUNS, **QUIET, fractions=(0.01, 0.1, 1))
    return {"faithfulness": torch.tensor([*found.faithfulness])}


def found_circuit(it: Any) -> dict[str, Tensor]:
    found = find_circuit(it, None, some_pairs(2), 0.5, top_k=9, evaluations=3, progress=False)
    return {"kept": found.circuit.kept.float()}


SPACES = Sites(["resid", "attn", "mlp"], seq_pos_type="each", subspace=Subspace.random(32, 4))
MOVED = Sites(COMPONENTS, seq_pos_type="custom", seq_pos=[-1, -2], source_seq_pos=[-2, -1])
OWN = Sites(COMPONENTS, seq_pos_type="custom", seq_pos=torch.tensor([[-1, -2], [-3, -1]]))
SOME = {"senders": ["input", "a0.h1", "m1"], "receivers": ["a1.h2<q>", "m1", "m2", "logits"]}


def looking(it: Any) -> Any:
    """A metric that reads activations of two layers."""
    api = adapter(it)
    two = [
        Site.get_site(api, name, layer, seq_pos=[-1])
        for name, layer in (("resid", 0), ("mlp", 1), ("q", 2))
    ]

    @reads_activations(two)
    @reads_tokens(lambda context: context.source_answer_index)
    def metric(logits: Tensor, context: Any) -> Tensor:
        own = logits[:, 20]
        for site in two:
            own = own + context.activations[site].flatten(1).sum(1)
        return own

    return activation(metric=metric)(it)


#: How each is called, and what it gives.
ENTRIES: dict[str, Callable[[Any], Mapping[str, Tensor]]] = {
    "cone": activation(engine="cone"),
    "full": activation(TWO, engine="full"),
    "one prompt at a time": activation(batch_size=1),
    "all prompts together": activation(metric=compared),
    "every position": activation(metric="loss"),
    "answers of several tokens": activation(
        metric="sequence_log_probability",
        source_answer_tokens=torch.tensor([[20, 3], [21, -1]]),
        target_answer_tokens=torch.tensor([[30, 3], [31, -1]]),
    ),
    "activations read": looking,
    "positions of the source": activation(MOVED),
    "positions of each prompt": activation(OWN),
    "subspaces": activation(SPACES),
    "several sites": lambda it: jointly(activation, it),
    "screen": activation(screen="attribution", top_k=9),
    "zero": ablation(method="zero"),
    "mean": ablation(method="mean", **REFERENCE),
    "mean, full": ablation(TWO, method="mean", engine="full"),
    "mean at each position": ablation(method="mean", per_position=True),
    "resample": ablation(method="resample", seed=0, **REFERENCE),
    "attribution": attribution(),
    "attribution of one prompt at a time": attribution(batch_size=1),
    "attribution of subspaces": attribution(SPACES),
    "attribution of several sites": lambda it: jointly(attribution, it),
    "QK fix": attribution(qk_fix=True),
    "GradDrop": attribution(grad_drop=True),
    "AtP*": attribution(qk_fix=True, grad_drop=True),
    "integrated gradients": attribution(steps=2),
    "edges": edges(**SOME),
    "edges of one prompt at a time": edges(**SOME, batch_size=1),
    "edges, ablated": edges(**SOME, ablation="mean", **REFERENCE),
    "edges, the best": edges(method="eap", top_k=5),
    "eap": edges(method="eap"),
    "eap-ig-inputs": edges(method="eap-ig-inputs", steps=2),
    "eap-ig-activations": edges(method="eap-ig-activations", steps=2),
    "clean-corrupted": edges(method="clean-corrupted"),
    "paths": paths(["a0.h1", "m0"], ["a2.h1<q>", "m2", "logits"]),
    "paths through MLPs": paths(["a0.h1", "a1.h0"], ["a2.h1<v>", "logits"], through="mlps"),
    "longer paths": paths(path=["a0.h1", "m1", "a2.h1<q>", "logits"]),
    "longer paths through MLPs": paths(path=["a0.h1", "m1", "logits"], through="mlps"),
    "a circuit": of_circuit(complement=True, random=1, seed=0),
    "a circuit, ablated": of_circuit(ablation="mean", **REFERENCE),
    "a curve": curve,
    "a found circuit": found_circuit,
    "a sweep of a steered model": steered_sweep,
    "generation": generated,
    "coordinates": collected,
    "means": averaged,
    "one's own traces": own_traces,
    "a subspace": functools.partial(taught, "cone"),
    "a subspace, full": functools.partial(taught, "full"),
}
#: By the devices of the layers and of what comes after; the embedding is on another than the first.
MAPS = {"turn by turn": ((0, 1, 0), 1), "in halves": ((1, 1, 0), 0)}


def on_devices(model: Any, how: str) -> Any:
    layers, head = MAPS[how]
    return spread(model, device_map(model, layers, head))


def made(family: str) -> Any:
    model = tiny_model(family)
    # What sorts tokens by expert on a GPU does not run on a CPU.
    model.config._experts_implementation = "eager"
    return model


@functools.cache
def expected(family: str, entry: str) -> Mapping[str, Tensor]:
    return ENTRIES[entry](made(family))


def check(family: str, how: str, entry: str) -> None:
    wanted = expected(family, entry)
    model = on_devices(made(family), how)
    with pretending() as world:
        found = ENTRIES[entry](model)
    assert {str(device) for device in world.seen} >= {"cuda:0", "cuda:1"}
    if hasattr(wanted, "info"):
        assert found.info["engine"] == wanted.info["engine"]
    assert len(wanted) == len(found)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_tensors_of_two_devices_meet(entry: str) -> None:
    check("llama", "turn by turn", entry)


@pytest.mark.parametrize("entry", ["cone", "AtP*", "edges", "paths through MLPs", "a circuit"])
def test_where_several_layers_are_on_each_neither(entry: str) -> None:
    check("llama", "in halves", entry)


def test_an_adapter_is_inferred_and_passes_the_kit() -> None:
    """Each of the two layers is on a device of its own, so that all that meets does so there."""
    model: Any = tiny_model("llama", num_hidden_layers=2)
    spread(model, device_map(model, (0, 1), 0))
    with pretending() as world:
        found = infer_adapter(model)
    assert {str(device) for device in world.seen} >= {"cuda:0", "cuda:1"}
    assert dict(found.components) == dict(adapter(model).components)
    # What fails in the kit an adapter declares, or is refused for.
    assert (found.cone, found.padding, found.residual) == (True, True, "sum")


BUDGETED: dict[str, Callable[..., Any]] = {
    "activation": activation,
    "ablation": ablation,
    "attribution": attribution,
    "edges": functools.partial(edges, **SOME),
    "eap": functools.partial(edges, method="eap"),
    "paths": functools.partial(paths, ["a0.h1"], ["logits"]),
    "a circuit": of_circuit,
}


@pytest.mark.parametrize("name", BUDGETED)
def test_each_device_has_a_budget(name: str) -> None:
    wanted = BUDGETED[name]()(made("llama"))
    model = on_devices(made("llama"), "turn by turn")
    with pretending():
        for sizes in ({"cuda:0": 10**8, "cuda:1": "1 GiB"}, "64 MiB"):
            found = BUDGETED[name](memory_budget=sizes)(model)
            for label in wanted:
                torch.testing.assert_close(found[label], wanted[label], atol=2e-5, rtol=1e-4)
        for device, other in (("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")):
            sizes = {device: 1000, other: "1 GiB"}
            with pytest.raises(MemoryBudgetError, match=f"on {device}"):
                BUDGETED[name](memory_budget=sizes)(model)


def test_the_unembedding_gives_the_ids_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does on one device: a whole vocabulary for each row would fill it."""
    model, seen = on_devices(made("llama"), "turn by turn"), []
    real = torch.nn.functional.linear

    def noted(given: Tensor, weight: Tensor, *bias: Any) -> Tensor:
        found = real(given, weight, *bias)
        if weight.data_ptr() == model.lm_head.weight.data_ptr() or len(weight) == 4:
            seen.append((len(given), found.shape[-1]))
        return found

    monkeypatch.setattr("nnpatch_core.engine.cone.unembedding.linear", noted)
    with pretending():
        activation(engine="cone")(model)
    assert seen
    assert {width for _, width in seen} == {4}


#: Norms after the blocks, fused projections, parallel blocks, experts, tied weights.
FAMILIES = ("gemma2", "gpt2", "gpt_neox", "mixtral", "phi3")
MOST = ("cone", "AtP*", "edges", "eap-ig-activations")


@pytest.mark.parametrize("entry", MOST)
@pytest.mark.parametrize("family", FAMILIES)
def test_of_other_families_neither(family: str, entry: str) -> None:
    check(family, "turn by turn", entry)


# Devices that are not there ----------------------------------------------------------------------

MEETINGS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a sum": lambda one, other: one + other,
    "a sum in place": lambda one, other: one.add_(other),
    "a product": lambda one, other: one @ other.T,
    "joined": lambda one, other: torch.cat([one, other]),
    "stacked": lambda one, other: torch.stack([one, other]),
    "chosen by a mask": lambda one, other: torch.where(one > 0, other, 0.0),
    "compared": torch.equal,
    "at indices of another": lambda one, other: one[(other[:, 0] > 0).nonzero()[:, 0]],
    "put at indices": lambda one, other: one.__setitem__(torch.tensor([0]), other[:1]),
    "gathered": lambda one, other: one.gather(0, torch.zeros(1, 1, dtype=torch.int64)),
    "a number of another": lambda one, other: one + other.sum(),
    "read as an array": lambda one, other: one.numpy(),
    "a module elsewhere": lambda one, other: torch.nn.functional.linear(one, other),
}


@pytest.mark.parametrize("name", MEETINGS)
def test_what_torch_refuses_is_refused(name: str) -> None:
    with pretending():
        one, other = torch.ones(2, 3).to(0), torch.ones(2, 3).to("cuda:1")
        assert (str(one.device), str((2 * other[:, :1]).device)) == ("cuda:0", "cuda:1")
        with pytest.raises((DevicesMeetError, TypeError)):
            MEETINGS[name](one, other)


def test_what_torch_does_is_done() -> None:
    with pretending():
        one, other = torch.ones(2, 3).to(0), 2 * torch.ones(2, 3, device="cuda:1")
        # Numbers and indices of host memory, copies, and gradients across.
        assert (one + torch.tensor(1.0))[torch.tensor([1])].device == one.device
        one[:1] = other[:1]
        assert one.cpu().tolist() == [[2.0] * 3, [1.0] * 3]
        same = one.to("cuda:0")
        moved = one.to(other)
        moved += 1
        assert same is one
        assert one.sum().item() == 9
        leaf = torch.ones(2, 3, device="cuda:0", requires_grad=True)
        (gradient,) = torch.autograd.grad((leaf.to("cuda:1") * other).sum(), leaf)
        assert gradient.device == leaf.device
        assert gradient.cpu().tolist() == [[2.0] * 3] * 2


def test_a_meeting_in_the_model_is_found() -> None:
    """Without accelerate's hook a layer meets what the one before it gives."""
    model = on_devices(made("llama"), "turn by turn")
    for module in model.model.layers[1].modules():
        if hasattr(module, "_hf_hook"):
            module._hf_hook.execution_device = None
    with pretending(), pytest.raises(DevicesMeetError):
        model(input_ids=SOURCE.to(1), attention_mask=MASK.to(1))
