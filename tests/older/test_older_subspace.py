"""`nnpatch.subspace`: the older library's projection and hooks, against their formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnsight import NNsight
from safetensors.torch import load_file
from torch import Tensor

import nnpatch.subspace
from nnpatch.subspace import (
    BinaryHook,
    FeatureCollectionHook,
    LowRankOrthogonalProjection,
    SteerHook,
    Subspace,
)
from nnpatch_core import Site
from nnpatch_core.errors import LayerError, SubspaceError
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.paths import ROOT
from tests.helpers.refusals import raises

FILES = ROOT / "tests" / "spaces" / "files" / "older"
LAYER, IDS = 1, torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture
def projection(model: Any) -> LowRankOrthogonalProjection:
    torch.manual_seed(0)
    return LowRankOrthogonalProjection(model.config.hidden_size)


def outputs(model: Any, ids: Tensor = IDS) -> tuple[Tensor, Tensor]:
    """The layer's output, and the logits."""
    found = []
    layer = model.model.layers[LAYER]

    def note(_: Any, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = layer.register_forward_hook(note)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    handle.remove()
    return found[0], logits


def plainly(basis: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The older library's formula, by matrices of the width by the width."""
    whole = basis @ basis.T
    return target @ (torch.eye(len(basis)) - whole).T + source @ whole.T


# The projection.


def test_the_names() -> None:
    assert nnpatch.subspace.__all__ == sorted(nnpatch.subspace.__all__)


@settings(deadline=None)
@given(st.integers(1, 9), st.data())
def test_a_projection_is_the_older_formula(width: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, width))
    torch.manual_seed(data.draw(st.integers(0, 100)))
    projection = LowRankOrthogonalProjection(width, rank)
    basis = projection.weight.detach()
    assert torch.allclose(basis.T @ basis, torch.eye(rank), atol=1e-5)
    source, target = torch.randn(2, 3, 4, width)
    with torch.no_grad():
        found = projection(source, target)
        steered = projection.constant_forward(projection.project(source[:, 0]), target[:, 0])
    assert torch.allclose(found, plainly(basis, source, target), atol=1e-5)
    assert torch.allclose(steered, plainly(basis, source[:, 0], target[:, 0]), atol=1e-5)
    assert torch.allclose(projection.project(target), target @ basis, atol=1e-6)


def test_each_prompt_has_its_constant_at_all_its_tokens() -> None:
    projection = LowRankOrthogonalProjection(6)
    target = torch.randn(2, 2, 6)
    with torch.no_grad():
        found = projection.constant_forward(torch.tensor([3.0, -4.0]), target)
        coordinates = projection.project(found)[..., 0]
    assert torch.allclose(coordinates, torch.tensor([[3.0, 3.0], [-4.0, -4.0]]), atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_what_is_learned_stays_orthonormal(rank: int) -> None:
    projection = LowRankOrthogonalProjection(6, rank)
    optimizer = torch.optim.Adam(projection.parameters(), lr=0.1)
    source, target = torch.randn(2, 5, 6)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (projection(source, target) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert rank == 6 or losses[-1] < losses[0]
    assert projection.subspace.rank == rank


def test_without_orthogonalize_the_weight_is_free() -> None:
    projection = LowRankOrthogonalProjection(4, 2, orthogonalize=False)
    with torch.no_grad():
        projection.weight.mul_(2)
    with raises(SubspaceError, "not orthonormal"):
        _ = projection.subspace


def test_a_basis_is_kept() -> None:
    basis = Subspace.random(7, 3).basis
    projection = LowRankOrthogonalProjection.from_subspace_basis(basis)
    assert torch.allclose(projection.weight, basis, atol=1e-6)
    with raises(SubspaceError, "vector 0 has the length 2"):
        LowRankOrthogonalProjection.from_subspace_basis(2 * basis)
    with raises(SubspaceError, "rank must be from 1 to the width 2, got 3"):
        LowRankOrthogonalProjection(2, 3)


def test_its_state_has_no_matrix_of_the_width_by_the_width() -> None:
    state = LowRankOrthogonalProjection(16, 2).state_dict()
    assert [list(each.shape) for each in state.values()] == [[16, 2]]


@pytest.mark.parametrize("name", ["rank1", "rank3", "square", "plain"])
def test_the_older_files(name: str) -> None:
    expected = load_file(FILES / name / "expected.safetensors")
    projection = LowRankOrthogonalProjection.from_pretrained(FILES / name)
    with torch.no_grad():
        found = projection(expected["source"], expected["target"])
    assert torch.allclose(found, expected["result"], atol=1e-5)


def test_load_pretrained_is_older_still() -> None:
    file = FILES / "rank3" / "projection.pt"
    with pytest.warns(DeprecationWarning, match="use from_pretrained"):
        projection = LowRankOrthogonalProjection.load_pretrained(file)
    known = LowRankOrthogonalProjection.from_pretrained(FILES / "rank3")
    assert torch.allclose(projection.weight, known.weight)


def test_it_is_saved_as_a_subspace(tmp_path: Path) -> None:
    projection = LowRankOrthogonalProjection(5, 2)
    projection.save_pretrained(tmp_path)
    assert torch.equal(Subspace.from_pretrained(tmp_path).basis, projection.subspace.basis)
    again = LowRankOrthogonalProjection.from_pretrained(tmp_path)
    assert torch.allclose(again.weight, projection.weight, atol=1e-6)
    mean = Subspace(projection.subspace.basis, mean=torch.ones(5))
    mean.save_pretrained(tmp_path)
    with raises(SubspaceError, "has a mean"):
        LowRankOrthogonalProjection.from_pretrained(tmp_path)


def test_a_site_takes_a_projection(projection: LowRankOrthogonalProjection) -> None:
    site = Site.get_site(tiny_api(), "resid", LAYER, subspace=projection)
    assert torch.equal(site.subspace.basis, projection.subspace.basis)


def test_activations_of_another_width(projection: LowRankOrthogonalProjection) -> None:
    own = torch.zeros(2, len(projection.weight))
    for call in (
        lambda: projection.project(torch.zeros(2, 3)),
        lambda: projection(torch.zeros(2, 3), own),
        lambda: projection(own, torch.zeros(2, 3)),
    ):
        with raises(SubspaceError, "3 wide, and the projection"):
            call()
    with raises(SubspaceError, "needs a value for each prompt"):
        projection.constant_forward(torch.zeros(3), own)


# Hooks.


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("last_token_only", [False, True])
def test_steering(
    model: Any, projection: LowRankOrthogonalProjection, wrapped: bool, last_token_only: bool
) -> None:
    before, logits = outputs(model)
    values = torch.tensor([3.0, -2.0])
    hook = SteerHook(projection, LAYER, values, last_token_only=last_token_only)
    hook.attach(NNsight(model) if wrapped else model)
    after, changed = outputs(model)
    basis = projection.weight.detach()
    expected = before + (values[:, None, None] - before @ basis) @ basis.T
    if last_token_only:
        expected[:, :-1] = before[:, :-1]
    assert torch.allclose(after, expected, atol=1e-5)
    assert not torch.allclose(changed, logits)
    hook.deactivate()
    assert torch.equal(outputs(model)[1], logits)
    hook.set_value(torch.tensor([3.0, -2.0]))
    assert torch.equal(outputs(model)[1], changed)
    hook.remove()
    assert torch.equal(outputs(model)[1], logits)


def test_each_pass_of_generation_is_steered(
    model: Any, projection: LowRankOrthogonalProjection
) -> None:
    """With a cache the result is that of steering each pass's last token."""
    hook = SteerHook(projection, LAYER, 40.0)
    hook.attach(model)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    seen = []
    watch = model.model.layers[LAYER].register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)
    watch.remove()
    hook.remove()
    assert [each.shape[1] for each in seen] == [4, 1, 1, 1]
    for each in seen:
        assert torch.allclose(projection.project(each[:, -1]), torch.tensor(40.0), atol=1e-3)


def test_a_hook_of_two_values(model: Any, projection: LowRankOrthogonalProjection) -> None:
    hook = BinaryHook(projection, LAYER, value_a=5.0, value_b=-7.0)
    hook.attach(model)

    def coordinates() -> list[float]:
        last = outputs(model)[0][:, -1]
        found: list[float] = projection.project(last)[:, 0].detach().round(decimals=3).tolist()
        return found

    assert coordinates() == [5.0, 5.0]
    hook.set_constant_b()
    assert coordinates() == [-7.0, -7.0]
    hook.set_constant_a()
    assert coordinates() == [5.0, 5.0]
    hook.deactivate()
    hook.set_binary(torch.tensor([True, False]))
    assert coordinates() == [-7.0, 5.0]
    with raises(SubspaceError, "each true or false"):
        hook.set_binary(torch.tensor([0.5, 1.0]))


def test_collecting(model: Any, projection: LowRankOrthogonalProjection) -> None:
    hook = FeatureCollectionHook(projection, LAYER)
    with raises(SubspaceError, "nothing was collected yet"):
        _ = hook.features
    hook.attach(model)
    before, logits = outputs(model)
    assert hook.hook is None
    assert torch.allclose(hook.features, projection.project(before[:, -1]))
    assert not hook.features.requires_grad
    many = FeatureCollectionHook(projection, LAYER, last_token_only=False, only_one_forward=False)
    many.attach(model)
    outputs(model)
    assert torch.equal(outputs(model)[1], logits)
    assert list(many.features.shape) == [4, 4, 1]
    outputs(model, IDS[:, :2])
    with raises(SubspaceError, "of the shapes"):
        _ = many.features
    many.remove()


def test_hooks_at_the_wrong_time_or_place(
    model: Any, projection: LowRankOrthogonalProjection
) -> None:
    hook = SteerHook(projection, LAYER)
    with raises(SubspaceError, "stands on no layer"):
        hook.remove()
    hook.attach(model)
    with raises(SubspaceError, "stands on a layer already"):
        hook.attach(model)
    with raises(SubspaceError, "no value was set"):
        outputs(model)
    hook.set_value(torch.tensor([1.0, 2.0, 3.0]))
    with raises(SubspaceError, "needs a value for each prompt"):
        outputs(model)
    hook.remove()
    with raises(LayerError, "layer 9 is out of range"):
        SteerHook(projection, 9).attach(model)
    with raises(SubspaceError, "has no model.model.layers"):
        SteerHook(projection, 0).attach(tiny_model("gpt2"))


def test_numbers_of_half_precision_stay_so(projection: LowRankOrthogonalProjection) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    hook = SteerHook(projection, LAYER, 2.0)
    hook.attach(model)
    after, _ = outputs(model)
    hook.remove()
    assert after.dtype == torch.bfloat16
    assert projection.weight.dtype == torch.float32
