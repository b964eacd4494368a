"""What goes elsewhere, how often, and what of it is kept."""

from __future__ import annotations

import ast
import pickletools
import re
import sys
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from nnsight.schema.request import RequestModel

from nnpatch_core import Sites, ablation_patching, activation_patching
from nnpatch_core.errors import AdapterError, CheckpointError, CheckpointWarning, RemoteError
from nnpatch_core.subspace import Subspace
from nnpatch_core.testing import tiny_model
from nnpatch_core.tracing.elsewhere import body, requests
from nnpatch_gemma import Gemma2
from nnpatch_llama import Llama3
from nnpatch_mistral import Mistral
from tests.helpers.checkpoints import done, numbers
from tests.helpers.kit import GPT2, NEOX
from tests.helpers.samples import LONGER, THREE
from tests.helpers.served import TOKENIZER, Served

#: 105 cells: 3 layers at 5 positions, of which attention has 4 heads.
SITES = Sites(["resid", "attn", "mlp", "z"], seq_pos_type="lastk", seq_pos=5)


def swept(served: Served, remote: Any = None, **options: Any) -> Any:
    options = {"progress": False, "sites": SITES, "prompts": THREE, **options}
    source, target, answers = options.pop("prompts")
    call = Llama3, options.pop("sites"), source, target, *answers
    if remote is None:
        return activation_patching(served.here(), *call, engine="full", **options)
    return activation_patching(served.there(), *call, remote=remote, **options)


@pytest.mark.newest
def test_many_cells_go_in_each_request(served: Served) -> None:
    before = len(served.requests)
    out = swept(served, served.url)
    seen = served.requests[before:]
    cells = sum(len(out.cells[name].index) for name in out)
    # The source run, the target run, and 64 cells at a time.
    assert (cells, len(seen)) == (105, 2 + 2)
    assert {each["status"] for each in seen} == {"COMPLETED"}
    # Two columns of each cell and prompt come back, and no activation goes or comes.
    assert max(each["sent"] for each in seen) < 20_000
    assert max(each["returned"] for each in seen) < 4_000
    assert numbers(out).equal(numbers(swept(served)))


def test_logits_of_many_ids_come_back_in_more_requests(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "_BYTES", 10 * 4 * 3 * 64)
    before = len(served.requests)
    sites = Sites("resid", seq_pos_type="each")
    swept(served, served.url, metric="kl_divergence", sites=sites)
    # 18 cells of 3 prompts, and each with 64 logits.
    assert len(served.requests) - before == 2 + 2


def test_prompts_run_together_as_batch_size_says(served: Served) -> None:
    before = len(served.requests)
    out = swept(served, served.url, batch_size=1, sites=Sites("resid", seq_pos_type="last"))
    # For each prompt both unpatched runs, and then its cells.
    assert len(served.requests) - before == 3 * (2 + 1)
    here = swept(served, batch_size=1, sites=Sites("resid", seq_pos_type="last"))
    assert numbers(out).equal(numbers(here))


def test_prompts_that_run_together_where_nobody_says(served: Served) -> None:
    source, target = torch.full((200, 30), 7), torch.full((200, 30), 7)
    source[:, 3] = 9
    answers = torch.full((200,), 1), torch.full((200,), 2)
    before = len(served.requests)
    swept(served, served.url, prompts=(source, target, answers), sites=Sites("mlp", layers=[0]))
    # 4096 tokens are 136 such prompts.
    assert len(served.requests) - before == 2 * (2 + 1)


def test_no_weights_come_here(served: Served) -> None:
    model = served.there()
    source, target, answers = THREE
    activation_patching(
        model, Llama3, SITES, source, target, *answers, remote=served.url, progress=False
    )
    assert not model.dispatched
    assert all(weight.is_meta for weight in model._module.parameters())
    with pytest.raises(Exception, match=r"no file named|does not appear"):
        model.dispatch()


def test_an_outcome_says_where_it_comes_from(served: Served) -> None:
    out = swept(served, served.url)
    assert out.info["engine"] == "full"
    assert out.info["fallback"].startswith(f"remote='{served.url}' runs it without nnpatch")
    assert out.info["remote"].startswith(f"{served.url}, as nnsight.modeling.transformers.Trans")
    assert out.info["weights"] == f"those of {served.url}, not seen"
    assert out.info["dtype"] == f"as {served.url} has it (torch.float32 by its config)"
    assert "remote" not in swept(served).info


@pytest.mark.parametrize("fails_at", [3, 4])
def test_a_sweep_goes_on_from_its_checkpoint(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    path, whole = tmp_path / "sweep", swept(served)
    asked, own = [], requests.travelling

    def failing(name: str) -> Any:
        asked.append(name)
        if len(asked) == fails_at:
            raise ConnectionResetError("the line is dead")
        return own(name)

    monkeypatch.setattr(requests, "travelling", failing)
    with pytest.raises(RemoteError, match=r"ConnectionResetError: the line is dead.*checkpoint="):
        swept(served, served.url, checkpoint=path)
    monkeypatch.setattr(requests, "travelling", own)
    measured = done(path) if path.exists() else 0
    assert measured == {3: 0, 4: 64 * 3}[fails_at]
    before = len(served.requests)
    told = pytest.warns(CheckpointWarning, match="the weights and the releases of http")
    if path.exists():
        with told:
            out = swept(served, served.url, checkpoint=path)
    else:
        out = swept(served, served.url, checkpoint=path)
    assert len(served.requests) - before == {3: 4, 4: 3}[fails_at]
    assert numbers(out).equal(numbers(whole))
    # What was measured elsewhere is no part of a sweep here.
    with pytest.raises(CheckpointError, match=r"model: .* then, .*remote: http.* then, none now"):
        swept(served, checkpoint=path)


def test_a_rehearsal_and_a_sweep_here_share_a_checkpoint(served: Served, tmp_path: Path) -> None:
    source, target, answers = LONGER
    call = served.here(), Llama3, Sites("resid"), source, target, *answers
    options = {"checkpoint": tmp_path / "sweep", "memory_budget": "1 GiB", "progress": False}
    one = activation_patching(*call, remote="local", engine="full", **options)
    other = activation_patching(*call, engine="full", **options)
    assert numbers(one).equal(numbers(other))
    assert "resumed" in other.info


def test_the_order_of_the_path_is_kept(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/nowhere", *sys.path])
    before = [*sys.path]
    source, target, answers = LONGER
    call = served.here(), Llama3, Sites("resid"), source, target, *answers
    activation_patching(*call, remote="local", progress=False)
    assert sys.path == before


@pytest.mark.parametrize(
    ("family", "api"),
    [("gemma2", Gemma2), ("gpt2", GPT2), ("gpt_neox", NEOX), ("mistral", Mistral)],
)
def test_families(family: str, api: Any) -> None:
    """Tuples, inputs, fused projections, caps on logits."""
    source, target, answers = THREE
    model = nnsight.TransformersModel(tiny_model(family), tokenizer=TOKENIZER)
    names = ["resid_pre", "q", "k", "v", "o", "attn", "mlp", "resid"]
    call = model, api, Sites(names, seq_pos_type="last"), source, target, *answers
    here = activation_patching(*call, engine="full", progress=False)
    there = activation_patching(*call, remote="local", progress=False)
    assert numbers(there).equal(numbers(here))


def test_lasting_edits_of_nnsight_go_along(served: Served) -> None:
    def edited(model: Any) -> Any:
        with model.edit(inplace=True):
            model.model.layers[0].mlp.output = model.model.layers[0].mlp.output * 0.5
        return model

    source, target, answers = LONGER
    call = Llama3, Sites("resid", seq_pos_type="last"), source, target, *answers
    plain = activation_patching(served.here(), *call, engine="full", progress=False)
    here = activation_patching(edited(served.here()), *call, engine="full", progress=False)
    assert not numbers(here).equal(numbers(plain))
    there = edited(served.there())
    out = activation_patching(there, *call, remote=served.url, progress=False)
    assert numbers(out).equal(numbers(here))


def test_what_travels_names_torch_alone() -> None:
    tree = ast.parse(Path(body.__file__).read_text("utf-8"))
    imported = {
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {"__future__", "collections.abc", "typing", "torch"}
    function = requests.travelling("run_cells")
    assert set(function.__globals__) >= {"torch", "_read", "_put"}
    assert function.__annotations__ == {}
    assert re.fullmatch(r"<nnpatch run_cells [0-9a-f]{12}>", function.__code__.co_filename)


def test_a_request_names_what_every_server_has(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs: list[bytes] = []
    own = RequestModel.serialize

    def kept(tracer: Any, compress: bool = False) -> bytes:
        blobs.append(own(tracer, compress))
        return blobs[-1]

    monkeypatch.setattr(RequestModel, "serialize", kept)
    source, target, answers = LONGER
    space = Subspace.random(32)
    sites = Sites("resid", seq_pos_type="last", subspace=space)
    call = served.here(), Llama3, sites, source, target, *answers
    activation_patching(*call, remote="local", progress=False)
    means = Llama3, Sites("mlp"), source, *answers
    ablation_patching(served.here(), *means, method="mean", remote="local", progress=False)
    assert len(blobs) == 6
    named: set[str] = set()
    for blob in blobs:
        texts: list[str] = []
        for code, argument, _ in pickletools.genops(blob):
            if "UNICODE" in code.name:
                texts.append(str(argument))
            elif code.name == "STACK_GLOBAL":
                # The module and the name were put on the stack last, if not taken from the memo.
                named |= {text for text in texts[-2:] if text in sys.modules}
            elif code.name == "GLOBAL":
                named.add(str(argument).split()[0])
    roots = {name.partition(".")[0] for name in named}
    assert roots == {"cloudpickle", "collections", "nnsight", "torch"}


def test_a_rehearsal_loads_weights(served: Served) -> None:
    folder = str(served.folder / "weights")
    model = nnsight.TransformersModel(folder, task="text-generation", tokenizer=TOKENIZER)
    source, target, answers = LONGER
    call = Llama3, SITES, source, target, *answers
    there = activation_patching(model, *call, remote="local", progress=False)
    assert model.dispatched
    here = activation_patching(served.here(), *call, engine="full", progress=False)
    assert numbers(there).equal(numbers(here))
    with pytest.raises(AdapterError, match="TransformersModel cannot load its weights"):
        activation_patching(served.there(), *call, remote="local", progress=False)


def test_what_travels_is_known_by_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it runs, what nnsight has read of one release is not taken for another's."""
    first = requests.travelling("add_up").__code__.co_filename
    requests.travelling.cache_clear()
    source = Path(body.__file__).read_text("utf-8")
    monkeypatch.setattr("inspect.getsource", lambda _: f"{source}\n_OTHER = 1\n")
    assert requests.travelling("add_up").__code__.co_filename != first
    requests.travelling.cache_clear()
