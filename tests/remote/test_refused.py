"""What cannot run elsewhere is refused before anything is sent, and what fails there is told."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import nnsight
import pytest
import torch
from nnsight.modeling import huggingface

from nnpatch_core import (
    Add,
    PromptPairs,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    edge_patching,
    path_patching,
    plan_sweep,
    steer,
)
from nnpatch_core.errors import EngineError, MemoryBudgetError, RemoteError, WorkerError
from nnpatch_core.interventions.constants import RecordedElsewhere
from nnpatch_core.metrics import reads_activations
from nnpatch_core.subspace import evaluate_subspace, train_subspace
from nnpatch_core.testing import tiny_model
from nnpatch_core.tracing import model_for
from nnpatch_llama import Llama3
from tests.helpers.samples import ONE
from tests.helpers.served import TOKENIZER, Served

SITES = Sites("resid", seq_pos_type="last")


@pytest.fixture
def nothing_sent(served: Served) -> Iterator[None]:
    before = len(served.requests)
    yield
    assert len(served.requests) == before


def swept(model: Any, remote: Any, sites: Any = SITES, **options: Any) -> Any:
    source, target, answers = ONE
    options.setdefault("api", Llama3)
    options = {"progress": False, **options}
    api = options.pop("api")
    return activation_patching(
        model, api, sites, source, target, *answers, remote=remote, **options
    )


def refusal(error: type[Exception], *args: Any, **options: Any) -> str:
    with pytest.raises(error) as raised:
        swept(*args, **options)
    return str(raised.value)


@pytest.mark.usefixtures("nothing_sent")
@pytest.mark.parametrize("remote", [None, 1, "ndif", "ftp://there", ["local"], 0])
def test_what_is_no_place(served: Served, remote: Any) -> None:
    told = refusal(RemoteError, served.there(), remote)
    assert told.startswith("remote must be False, True (NDIF), 'local' (a rehearsal in this")
    assert repr(remote) in told


@pytest.mark.parametrize("remote", ["local", True])
@pytest.mark.parametrize(
    ("wrapped", "named"),
    [(lambda model: model, "LlamaForCausalLM"), (nnsight.NNsight, "NNsight")],
)
def test_models_that_no_server_knows(wrapped: Callable[..., Any], named: str, remote: Any) -> None:
    told = refusal(RemoteError, wrapped(tiny_model("llama")), remote)
    assert f"remote={remote!r} takes nnsight's TransformersModel" in told
    assert f"got {named}: pass TransformersModel('owner/name'" in told


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_in_wrappers() -> None:
    model = nnsight.TransformersModel(torch.compile(tiny_model("llama")), tokenizer=TOKENIZER)
    assert "got TransformersModel around a wrapper: pass" in refusal(RemoteError, model, "local")


@pytest.mark.usefixtures("nothing_sent")
def test_models_whose_name_is_not_to_be_had(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = served.there()
    monkeypatch.setattr(huggingface, "_ID_CACHE", {})
    told = refusal(RemoteError, model, served.url)
    assert f"by which name {served.url} knows the model cannot be told: " in told
    # A rehearsal needs no name.
    swept(served.here(), "local")


@pytest.mark.usefixtures("nothing_sent")
def test_the_cone_engine(served: Served) -> None:
    told = refusal(EngineError, served.there(), served.url, engine="cone")
    assert told == (
        f"engine='cone' cannot run this sweep: remote='{served.url}' runs it without nnpatch, "
        "and this engine needs a cache of its own there"
    )


@pytest.mark.usefixtures("nothing_sent")
def test_screens(served: Served) -> None:
    told = refusal(RemoteError, served.there(), served.url, screen="attribution", top_k=1)
    assert told.startswith("screen='attribution' estimates by gradients, which do not come back")


@pytest.mark.usefixtures("nothing_sent")
def test_hooks_of_ones_own(served: Served) -> None:
    def halved(module: Any, args: Any, output: Any) -> Any:
        return output * 0.5

    model = served.there()
    model._module.model.layers[0].mlp.register_forward_hook(halved)
    told = refusal(RemoteError, model, served.url)
    assert "the forward hook `halved` on 'model.layers.0.mlp'; take them away" in told


def test_steering(served: Served) -> None:
    model = served.here()
    site = Site.get_site(Llama3, "resid", layer=1)
    with steer(model, site, Add(torch.ones(32))):
        told = refusal(RemoteError, model, "local")
    assert "does not go with hooks of your own" in told


@pytest.mark.usefixtures("nothing_sent")
def test_parts_of_activations_that_are_code(served: Served) -> None:
    class Own:
        width, rank = 32, 1

        def encode(self, x: Any) -> Any:
            return x[..., :1]

        def decode(self, c: Any) -> Any:
            return c.expand(*c.shape[:-1], 32)

        def interchange(self, source: Any, target: Any) -> Any:
            return source

        def set(self, target: Any, values: Any) -> Any:
            return target

    sites = Sites("resid", seq_pos_type="last", subspace=Own())
    told = refusal(RemoteError, served.there(), served.url, sites)
    assert f"remote='{served.url}' sends numbers, and " in told
    assert "is code, and not a Subspace" in told


@pytest.mark.usefixtures("nothing_sent")
def test_metrics_that_read_activations(served: Served) -> None:
    site = Site.get_site(Llama3, "resid", layer=1, seq_pos=[-1])

    @reads_activations([site])
    def size(logits: Any, context: Any) -> Any:
        return context.activations[site].norm(dim=-1).flatten()

    told = refusal(RemoteError, served.there(), served.url, metric=size)
    assert "brings logits back, and a metric reads activations" in told


@pytest.mark.usefixtures("nothing_sent")
def test_adapters_are_not_inferred_without_weights(served: Served) -> None:
    family = served.there()
    family._module.config.model_type = "unheard_of"
    with pytest.raises(ValueError, match=r"weights|meta"):
        swept(family, served.url, api=None)
    assert not family.dispatched


@pytest.mark.usefixtures("nothing_sent")
def test_what_comes_back_must_fit_in_memory(served: Served) -> None:
    assert "memory_budget is 10 B" in refusal(
        MemoryBudgetError, served.there(), served.url, memory_budget=10
    )


def test_workers_have_the_model_themselves() -> None:
    class Pool:
        def swept(self, sweep: Any, given: Any) -> Any:
            raise AssertionError

    assert "leave out remote=" in refusal(WorkerError, Pool(), "local")


@pytest.mark.parametrize(
    "function",
    [
        attribution_patching,
        edge_patching,
        evaluate_subspace,
        path_patching,
        plan_sweep,
        train_subspace,
    ],
)
def test_others_do_not_have_it(function: Callable[..., Any]) -> None:
    told = rf"^{function.__name__}\(\) got an unexpected keyword argument 'remote'"
    with pytest.raises(TypeError, match=told):
        function(tiny_model("llama"), Llama3, SITES, *ONE[:2], remote=True)


def test_what_puts_code_is_not_sent(served: Served) -> None:
    from nnpatch_core.batch import Batch
    from nnpatch_core.engine.full import FullExecution
    from nnpatch_core.tracing import Patches, forward

    model = model_for(served.here(), "local")
    batch = Batch(ONE.target, torch.ones_like(ONE.target))
    none: Any = None
    execution = FullExecution(Patches(model, []), batch, none, none)
    with pytest.raises(EngineError, match="what NoneType puts is code, which a run elsewhere"):
        [*execution.parts(torch.zeros(1, 1).bool().numpy(), None)]
    with pytest.raises(RemoteError, match="cannot be sent elsewhere: leave out remote="):
        forward(model, batch, lambda _: None)
    with pytest.raises(EngineError, match="are elsewhere"):
        RecordedElsewhere(batch, batch.mask).patched(
            attrs.make_class("P", ["name"])("q"), none, none
        )


def test_no_server_answers(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    told = refusal(RemoteError, served.there(), "http://127.0.0.1:9")
    assert told == (
        "a run failed that was sent to http://127.0.0.1:9: ConnectionRefusedError: [Errno 111] "
        "Connection refused. nnsight.status() says which models run on NDIF, and nnsight knows no "
        "API key: nnsight.login() keeps yours. What was measured is kept with checkpoint=, from "
        "where the same call goes on"
    )


def test_true_is_the_server_that_nnsight_is_set_up_for(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", served.url)
    before = len(served.requests)
    out = swept(served.there(), True)
    assert out.info["remote"].startswith(served.url)
    assert len(served.requests) == before + 3


def test_a_server_that_wants_a_key(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Served.start(tmp_path_factory.mktemp("locked"), "llama", "secret", num_hidden_layers=1)
    try:
        monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
        told = refusal(RemoteError, other.there(), other.url)
        assert "RemoteError: Failed to send request: Missing or invalid API key.. nns" in told
        assert "nnsight knows no API key: nnsight.login() keeps yours" in told
        monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "secret")
        swept(other.there(), other.url)
        # Of what fails there the last line is told, and the rest is the cause.
        told = refusal(RemoteError, other.there(num_hidden_layers=2), other.url)
        assert re.search(r"UnknownPersistentIdError: Module:model\.model\.layers\.1", told)
        assert "API key" not in told
    finally:
        other.stop()


def test_a_model_without_logits() -> None:
    model = nnsight.TransformersModel(
        tiny_model("llama").model, tokenizer=TOKENIZER, task="feature-extraction"
    )
    with pytest.raises(RemoteError, match="gives hidden states, where a language model gives"):
        swept(model, "local", api=attrs.evolve(Llama3, layers="layers"))


def test_streams_of_batches(served: Served) -> None:
    pairs = PromptPairs.from_texts([" a b c"], [" a d c"], [" e"], [" f"], TOKENIZER)
    with pytest.raises(RemoteError, match="remote must be"):
        ablation_patching(served.there(), Llama3, SITES, [pairs], remote="nowhere")
    here = ablation_patching(
        served.here(), Llama3, SITES, [pairs, pairs], engine="full", progress=False
    )
    away = {"remote": served.url, "progress": False}
    there = ablation_patching(served.there(), Llama3, SITES, [pairs, pairs], **away)
    assert torch.equal(here["resid"], there["resid"])
