"""Models whose weights are elsewhere until they are needed run as their plain forward does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from nnsight import NNsight
from torch import nn

from nnpatch_core import (
    MultiSite,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    cache_average,
    edge_patching,
    infer_adapter,
    plan_sweep,
)
from nnpatch_core._models import input_device
from nnpatch_core.errors import AdapterError, CheckpointError
from nnpatch_core.memory import needs_of
from nnpatch_core.plugins import find_adapter
from nnpatch_core.sites import bind_cells
from nnpatch_core.sweep.checksum import checksum
from nnpatch_core.testing import tiny_model
from tests.helpers.oracle import COMPONENTS, Oracle, Place

#: That some weights are offloaded, of which this is about.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:accelerate"),
    # Padding is a part of what is tested here, so that what it mixes needs no word.
    pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning"),
]

SITES = Sites(COMPONENTS, seq_pos_type="custom", seq_pos=[-1, -3])
SOURCE = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 1, 2, 3, 4]])
TARGET = torch.tensor([[5, 16, 7, 18, 9, 10], [0, 0, 1, 12, 3, 4]])
MASK = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
ANSWERS = torch.tensor([20, 21]), torch.tensor([30, 31])
OPTIONS: dict[str, Any] = {"attention_mask": MASK, "progress": False}
ROUNDING = 5e-6


def all_in_host_memory(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device="cpu")


def buffers_too(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


def all_on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, folder, execution_device="cpu")


def embedding_on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return dispatched(model, folder, {"model.embed_tokens": "disk"})


def all_but_the_embedding_on_disk(model: nn.Module, folder: Path) -> nn.Module:
    layers = {f"model.layers.{layer}": "disk" for layer in range(3)}
    return dispatched(model, folder, {**layers, "lm_head": "disk"})


def moved_as_a_whole(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload_with_hook(model, execution_device="cpu")[0]


def dispatched(model: nn.Module, folder: Path, places: dict[str, str]) -> nn.Module:
    names = ["model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb"]
    names += [f"model.layers.{layer}" for layer in range(3)]
    return accelerate.dispatch_model(
        model,
        device_map={**dict.fromkeys(names, "cpu"), **places},
        offload_dir=folder,
        main_device="cpu",
        force_hooks=True,
    )


ON_META = (all_in_host_memory, buffers_too, all_on_disk, embedding_on_disk)
PLACES = (*ON_META, all_but_the_embedding_on_disk, moved_as_a_whole)


def adapter_of(nnmodel: Any) -> Any:
    return find_adapter(None, getattr(nnmodel, "_module", nnmodel))


def jointly(nnmodel: Any) -> Any:
    api = adapter_of(nnmodel)
    two = [Site.get_site(api, "mlp", 0), Site.get_site(api, "attn", 1)]
    return Sites.from_sites([MultiSite(two)])


def activation(nnmodel: Any, **options: Any) -> Any:
    return activation_patching(
        nnmodel, None, SITES, SOURCE, TARGET, *ANSWERS, **{**OPTIONS, **options}
    )


def attribution(nnmodel: Any, sites: Sites = SITES, **options: Any) -> Any:
    return attribution_patching(
        nnmodel, None, sites, SOURCE, TARGET, *ANSWERS, **{**OPTIONS, **options}
    )


def edges(nnmodel: Any, **options: Any) -> Any:
    nodes = {"senders": ["input", "a0.h1", "m1"], "receivers": ["a1.h2<q>", "m1", "logits"]}
    return edge_patching(
        nnmodel, None, SOURCE, TARGET, *ANSWERS, **{**OPTIONS, **nodes, **options}
    ).outcome


def plan(nnmodel: Any) -> Any:
    options = {"attention_mask": MASK, "memory_budget": "1 GiB"}
    return plan_sweep(nnmodel, None, SITES, SOURCE, TARGET, **options)


ENTRIES: dict[str, Callable[[Any], Any]] = {
    "cone": lambda it: activation(it, engine="cone"),
    "full": lambda it: activation(it, engine="full"),
    "one prompt at a time": lambda it: activation(it, batch_size=1),
    "ablation": lambda it: ablation_patching(
        it, None, SITES, TARGET, *ANSWERS, method="mean", **OPTIONS
    ),
    "attribution": attribution,
    "AtP*": lambda it: attribution(it, qk_fix=True, grad_drop=True),
    "integrated gradients": lambda it: attribution(it, steps=2),
    "several sites": lambda it: attribution(it, jointly(it)),
    "screen": lambda it: activation(it, screen="attribution", top_k=9),
    "edges": edges,
    "edges, estimated": lambda it: edges(it, method="eap-ig-activations", steps=2),
}


@functools.cache
def expected(family: str, entry: str) -> Any:
    """Of the model as it is, which test_oracle.py holds to the oracle."""
    return ENTRIES[entry](tiny_model(family))


def meta(model: nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.is_meta}


SOME = ("cone", "full", "AtP*")


@pytest.mark.parametrize(
    ("family", "wrap", "entries"),
    [
        ("llama", lambda model: model, tuple(ENTRIES)),
        ("llama", NNsight, SOME),
        # Its embedding is its head, too.
        ("gemma3_text", NNsight, SOME),
    ],
)
@pytest.mark.parametrize("place", PLACES)
def test_every_entry_point(
    family: str, place: Any, wrap: Any, entries: tuple[str, ...], tmp_path: Path
) -> None:
    model = place(tiny_model(family), tmp_path)
    if family == "llama":
        assert next(model.parameters()).is_meta == (place in ON_META)
    with torch.no_grad():
        model(input_ids=SOURCE)
    # A tied weight that accelerate has brought in once may stay.
    before = meta(model)
    nnmodel = wrap(model)
    for entry in entries:
        found, wanted = ENTRIES[entry](nnmodel), expected(family, entry)
        assert found.info["engine"] == wanted.info["engine"]
        for name in wanted:
            assert wanted[name].abs().max() > 1e-3
            torch.testing.assert_close(found[name], wanted[name], atol=2e-5, rtol=1e-4)
    assert meta(model) == before


@pytest.mark.parametrize("place", ON_META)
def test_activation_patching_is_that_of_plain_hooks(place: Any, tmp_path: Path) -> None:
    model = place(tiny_model("llama"), tmp_path)
    out, oracle = activation(model), Oracle(tiny_model("llama"), "llama")
    source, target = (tuple(tokens[0].tolist()) for tokens in (SOURCE, TARGET))
    for name in COMPONENTS:
        for head in oracle.heads(name):
            logits = oracle.patched(target, source, Place(name, 1, head, (3,)))
            wanted = logits[ANSWERS[0][0]] - logits[ANSWERS[1][0]]
            found = out.patched(name)[(1, 3) if head is None else (1, 3, head)][0]
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_the_kit_inference_and_means(tmp_path: Path) -> None:
    family = "llama"
    model = all_on_disk(tiny_model(family), tmp_path)
    api = adapter_of(model)
    # It is put through the kit, on all three layers; what fails there, it declares or is refused.
    found = infer_adapter(model)
    assert dict(found.components) == dict(api.components)
    assert (found.cone, found.padding, found.residual) == (True, True, "sum")
    sites = [Site.get_site(api, "q", layer=1, head=2, seq_pos=[-1]) for _ in range(2)]
    for site, it in zip(sites, (model, tiny_model(family)), strict=True):
        cache_average(it, [site], [(SOURCE, MASK), (TARGET, MASK)])
    torch.testing.assert_close(sites[0].value, sites[1].value, atol=ROUNDING, rtol=0)
    plans = [plan(it) for it in (model, tiny_model(family))]
    assert plans[0].token_layers == plans[1].token_layers
    # What runs in host memory is measured by it, wherever its weights lie.
    places = [Site.get_site(api, name, layer=1) for name in COMPONENTS]
    models = [NNsight(it) for it in (model, tiny_model(family))]
    needs = [needs_of(bind_cells(places, it, 6), 6, whole=True) for it in models]
    assert needs[0] == needs[1]


@pytest.mark.parametrize("place", ON_META)
def test_in_ones_own_trace(place: Any, tmp_path: Path) -> None:
    """The page says how: nnsight moves a trace's inputs to the first weight, where it runs on."""
    model = place(tiny_model("llama"), tmp_path)
    nnmodel = NNsight(model)
    site = Site.get_site("Llama3", "o", layer=1, head=2, seq_pos=[-1])

    def run(tokens: torch.Tensor) -> Callable[..., Any]:
        return lambda *_: model(input_ids=tokens)

    with torch.no_grad():
        with nnmodel.trace(SOURCE[:1], fn=run(SOURCE[:1])):
            site.cache(nnmodel)
        with nnmodel.trace(TARGET[:1], fn=run(TARGET[:1])):
            site.patch(nnmodel)
            logits = nnmodel.output.logits[0, -1].save()
    oracle = Oracle(tiny_model("llama"), "llama")
    prompts = (tuple(tokens[0].tolist()) for tokens in (TARGET, SOURCE))
    wanted = oracle.patched(*prompts, Place("o", 1, 2, (1,)))
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("place", [*ON_META, all_but_the_embedding_on_disk])
def test_a_checkpoint_knows_weights_that_are_elsewhere(place: Any, tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(3)]
    models = [
        place(tiny_model("llama", seed=seed), folder)
        for seed, folder in zip((0, 0, 1), folders, strict=True)
    ]
    assert checksum(models[0]) == checksum(models[1]) == checksum(tiny_model("llama"))
    assert checksum(models[2]) == checksum(tiny_model("llama", seed=1)) != checksum(models[0])
    file = tmp_path / "checkpoint.safetensors"
    for model in models[:2]:
        activation(model, checkpoint=file)
    with pytest.raises(CheckpointError, match="model"):
        activation(models[2], checkpoint=file)


def test_tokens_go_where_the_embedding_will_be(tmp_path: Path) -> None:
    assert input_device(tiny_model("llama")) == torch.device("cpu")
    for place in PLACES:
        found = input_device(place(tiny_model("llama"), tmp_path / place.__name__))
        assert found == torch.device("cpu")
    with torch.device("meta"):
        assert input_device(tiny_model("llama")) is None


# Weights that are nowhere.


def weightless() -> nn.Module:
    return tiny_model("llama").to("meta")


def one_weight_missing() -> nn.Module:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.to("meta")
    return model


@pytest.mark.parametrize("wrap", [lambda model: model, NNsight])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (weightless, "model.embed_tokens.weight"),
        (one_weight_missing, "model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_model_without_weights_is_refused(make: Any, name: str, wrap: Any) -> None:
    nnmodel = wrap(make())
    entries = {
        **ENTRIES,
        "means": lambda it: cache_average(it, [Site.get_site("Llama3", "mlp", 1)], TARGET[:1]),
        "inference": infer_adapter,
    }
    for run in entries.values():
        with pytest.raises(AdapterError, match=f"no weights.*{name}.*from_pretrained.*plan_sweep"):
            run(nnmodel)


def test_a_plan_needs_no_weights() -> None:
    assert plan(weightless()).cells == plan(tiny_model("llama")).cells
