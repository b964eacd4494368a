"""The package `nnpatch`: the older library's names and defaults, and the numbers of core."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

import pytest
import torch
from nnsight import NNsight

import nnpatch
import nnpatch_core
from nnpatch import MultiSite, Site, Sites, activation_patching, attribution_patching
from nnpatch.api.llama import Llama3
from nnpatch_core import CustomConstant, Last
from nnpatch_core.errors import AdapterWarning, ConfidenceError, PositionError
from nnpatch_core.testing import tiny_model
from tests.helpers.refusals import raises

SOURCE = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
TARGET = torch.tensor([[5, 16, 7, 8], [9, 20, 11, 12]])
#: Of two lengths, which are compared position by position on purpose.
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")
NAMES = ["resid", "attn", "mlp", "o", "k", "q", "v"]
SWEEPS = [
    (activation_patching, nnpatch_core.activation_patching),
    (attribution_patching, nnpatch_core.attribution_patching),
]
ADAPTERS = [
    ("llama", "Llama3", "nnpatch-llama"),
    ("mistral", "Mistral", "nnpatch-mistral"),
    ("gemma", "Gemma2", "nnpatch-gemma"),
]


@pytest.fixture(scope="module")
def nnmodel() -> Any:
    return NNsight(tiny_model("llama"))


@pytest.fixture(scope="module")
def confident(nnmodel: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """For each prompt two tokens, of which the model prefers one in each run."""
    with torch.no_grad():
        source, target = (
            nnmodel._module(input_ids=each, attention_mask=MASK).logits[:, -1]
            for each in (SOURCE, TARGET)
        )
    pairs = [
        next(
            (a, b)
            for a in range(64)
            for b in range(64)
            if one[a] - one[b] > 0.05 and other[a] - other[b] < -0.05
        )
        for one, other in zip(source, target, strict=True)
    ]
    first, second = torch.tensor(pairs).T
    return first, second


def test_the_names() -> None:
    assert nnpatch.__all__ == sorted(nnpatch.__all__)
    assert (Site, MultiSite) == (nnpatch_core.Site, nnpatch_core.MultiSite)
    assert issubclass(Sites, nnpatch_core.Sites)


@pytest.mark.parametrize(("sweep", "core"), SWEEPS)
def test_the_arguments_are_those_of_core_but_for_one_default(sweep: Any, core: Any) -> None:
    found, known = (dict(inspect.signature(each).parameters) for each in (sweep, core))
    assert list(found) == list(known)
    different = {name for name in found if found[name].default != known[name].default}
    assert different == {"force_model_confidence"}
    assert found["force_model_confidence"].default is True
    assert core.__name__ in inspect.getdoc(sweep)


@pytest.mark.parametrize(("sweep", "core"), SWEEPS)
@pytest.mark.parametrize(
    "sites",
    [
        {"seq_pos_type": "each"},
        {"seq_pos_type": None},
        {"seq_pos_type": "last"},
        {"seq_pos_type": "lastk", "seq_pos": 2},
        {"seq_pos_type": "custom_constant", "seq_pos": [-3, -2]},
        {"seq_pos_type": "custom", "seq_pos": torch.tensor([-3, -2])},
    ],
    ids=str,
)
def test_a_script_of_the_older_library(
    nnmodel: Any, confident: Any, sweep: Any, core: Any, sites: dict[str, Any]
) -> None:
    target = {"input_ids": TARGET, "attention_mask": MASK}
    grid = Sites(site_names=NAMES, layers=[1, 2], **sites)
    out = sweep(
        nnmodel, Llama3, grid, SOURCE, target, *confident, attention_mask=MASK, progress=False
    )
    known = nnpatch_core.Sites(NAMES, [1, 2], **sites)
    options = {"attention_mask": MASK, "progress": False}
    expected = core(nnmodel, None, known, SOURCE, TARGET, *confident, **options)
    assert list(out) == NAMES
    by_position = [4] if grid.strategy.one_by_one else []
    for name in NAMES:
        heads = {"q": [4], "o": [4], "k": [2], "v": [2]}.get(name, [])
        assert list(out[name].shape) == [3, *by_position, *heads]
        assert torch.equal(out[name], expected[name])
        assert not out[name][0].any()
        assert out[name][1:].any()


@pytest.mark.parametrize(("sweep", "core"), SWEEPS)
def test_a_model_that_is_not_confident_is_an_error_by_default(
    nnmodel: Any, confident: Any, sweep: Any, core: Any
) -> None:
    arguments = nnmodel, Llama3, Sites("resid", "last"), SOURCE, TARGET, *reversed(confident)
    options = {"attention_mask": MASK, "progress": False}
    with raises(ConfidenceError, "2 of 2 prompts"):
        sweep(*arguments, **options)
    found = sweep(*arguments, **options, force_model_confidence=False)
    assert torch.equal(found["resid"], core(*arguments, **options)["resid"])


def test_arguments_of_sites_in_their_old_order() -> None:
    assert Sites("resid", "last").strategy == Last()
    sites = Sites(["q"], "custom_constant", torch.tensor([-2, 0]), [2, 1], [3])
    assert sites.strategy == CustomConstant((-2, 0))
    assert (sites.layers, sites.heads) == ((1, 2), (3,))
    with raises(PositionError, "'custom'", "needs seq_pos="):
        Sites("resid")
    assert repr(Sites("q", seq_pos=[1])).startswith("Sites(site_names=('q',)")


def test_a_warning_points_at_the_line_of_the_caller(confident: Any) -> None:
    """Nothing of the package stands between."""
    with pytest.warns(AdapterWarning) as caught:
        activation_patching(
            tiny_model("mistral"), Llama3, Sites("resid", "last"), SOURCE, TARGET, *confident,
            attention_mask=MASK, force_model_confidence=False, progress=False,
        )  # fmt: skip
    assert {each.filename for each in caught} == {__file__}


# Adapters.


@pytest.mark.parametrize(("module", "name", "distribution"), ADAPTERS)
def test_an_adapter_is_that_of_its_plugin(module: str, name: str, distribution: str) -> None:
    found = importlib.import_module(f"nnpatch.api.{module}")
    assert found.__all__ == [name]
    plugin = importlib.import_module(distribution.replace("-", "_"))
    assert getattr(found, name) is getattr(plugin, name)


@pytest.mark.parametrize(("module", "name", "distribution"), ADAPTERS)
def test_a_plugin_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, distribution: str
) -> None:
    monkeypatch.delitem(sys.modules, f"nnpatch.api.{module}", raising=False)
    monkeypatch.setitem(sys.modules, distribution.replace("-", "_"), None)
    with pytest.raises(ImportError, match=f"pip install {distribution}$") as caught:
        importlib.import_module(f"nnpatch.api.{module}")
    assert caught.value.name == distribution.replace("-", "_")


def test_a_plugin_that_lacks_something_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "nnpatch_llama.py").write_text("import einops_of_mars\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("nnpatch.api.llama", "nnpatch_llama"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ModuleNotFoundError, match="No module named 'einops_of_mars'"):
        importlib.import_module("nnpatch.api.llama")
