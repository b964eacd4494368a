"""The algebra of subspaces, in float64 and as models have it, and what is refused."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nnpatch_core import Site
from nnpatch_core.errors import LayerError, SubspaceError
from nnpatch_core.spaces import Features, SiteRecord, Subspace, as_space, by_layer
from nnpatch_core.testing import tiny_api, tiny_tokenizer
from tests.helpers.refusals import raises, shown
from tests.helpers.strategies import subspace

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
#: What is left of a number of size 1, after it was rounded to the type.
ROUNDED = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


def bits(value: Tensor) -> list[Any]:
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}[value.element_size()]
    return value.contiguous().view(whole).flatten().tolist()


@st.composite
def cases(draw: st.DrawFn) -> tuple[Subspace, Tensor, Tensor]:
    """A subspace in float64, and two activations in a batch of any shape."""
    width = draw(st.integers(1, 12))
    rank = draw(st.integers(1, width))
    seed = draw(st.integers(0, 10_000))
    basis = torch.linalg.qr(drawn(width, rank, seed=seed)).Q
    mean = draw(st.none() | st.just(drawn(width, seed=seed + 1)))
    shape = (*draw(st.lists(st.integers(0, 3), max_size=3)), width)
    return Subspace(basis, mean=mean), drawn(*shape, seed=seed + 2), drawn(*shape, seed=seed + 3)


# Algebra.


@given(cases())
@settings(max_examples=60)
def test_what_is_put_is_a_projection(case: tuple[Subspace, Tensor, Tensor]) -> None:
    """Symmetric, idempotent, of the right rank; whatever the mean is."""
    space, source, target = case
    every = torch.eye(space.width, dtype=torch.float64)
    projector = space.interchange(every, torch.zeros_like(every))
    torch.testing.assert_close(projector, projector.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(projector @ projector, projector, atol=1e-12, rtol=0)
    assert float(projector.trace()) == pytest.approx(space.rank, abs=1e-9)
    found = space.interchange(source, target)
    expected = target + (source - target) @ projector
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
    again = space.interchange(source, found)
    torch.testing.assert_close(again, found, atol=1e-11, rtol=0)


@given(cases())
def test_coordinates_are_the_source_s_and_the_rest_is_the_target_s(
    case: tuple[Subspace, Tensor, Tensor],
) -> None:
    space, source, target = case
    found = space.interchange(source, target)
    assert (found.shape, found.dtype) == (target.shape, target.dtype)
    close = lambda one, other: torch.testing.assert_close(one, other, atol=1e-11, rtol=0)  # noqa: E731
    close(space.project(found), space.project(source))
    close(space.encode(source), space.project(source))
    close(found - space.decode(space.project(found)), target - space.decode(space.project(target)))
    close(space.set(target, space.project(source)), found)
    # A mean is where coordinates start, and no part of what is put.
    close(Subspace(space.basis).interchange(source, target), found)


@given(cases(), st.data())
def test_any_coordinates_can_be_set(
    case: tuple[Subspace, Tensor, Tensor], data: st.DataObject
) -> None:
    space, _, target = case
    values = drawn(*target.shape[:-1], space.rank, seed=data.draw(st.integers(0, 99)))
    close = lambda one, other: torch.testing.assert_close(one, other, atol=1e-11, rtol=0)  # noqa: E731
    close(space.project(space.set(target, values)), values)
    close(space.project(space.decode(values)), values)
    close(space.set(space.decode(values), values), space.decode(values))
    # One for all.
    same = space.set(target, values.new_zeros(space.rank))
    close(space.project(same), torch.zeros_like(values))
    if space.mean is not None:
        close(space.project(space.mean), torch.zeros(space.rank, dtype=torch.float64))
        close(space.decode(values.new_zeros(space.rank)), space.mean)


@given(st.integers(1, 12), st.integers(0, 999))
def test_full_rank_is_the_source_and_rank_one_the_formula(width: int, seed: int) -> None:
    source, target = drawn(2, 3, width, seed=seed), drawn(2, 3, width, seed=seed + 1)
    whole = Subspace(torch.linalg.qr(drawn(width, width, seed=seed)).Q)
    torch.testing.assert_close(whole.interchange(source, target), source, atol=1e-11, rtol=0)
    vector = drawn(width, seed=seed + 2)
    one = Subspace((vector / vector.norm())[:, None])
    share = ((source - target) * vector).sum(-1) / vector.square().sum()
    expected = target + share[..., None] * vector
    torch.testing.assert_close(one.interchange(source, target), expected, atol=1e-11, rtol=0)


@given(cases(), st.integers(0, 999))
def test_which_basis_a_subspace_has_does_not_matter(
    case: tuple[Subspace, Tensor, Tensor], seed: int
) -> None:
    space, source, target = case
    turn = torch.linalg.qr(drawn(space.rank, space.rank, seed=seed)).Q
    turned = Subspace(space.basis @ turn, mean=space.mean)
    close = lambda one, other: torch.testing.assert_close(one, other, atol=1e-11, rtol=0)  # noqa: E731
    close(turned.interchange(source, target), space.interchange(source, target))
    close(turned.project(source), space.project(source) @ turn)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [None, torch.linspace(-1, 1, 16)])
def test_a_value_interchanged_with_itself_is_itself_bitwise(
    dtype: torch.dtype, mean: Tensor | None
) -> None:
    """Of any type, numbers of any size, -0.0 too."""
    space = Subspace(subspace(16, 5).basis.float(), mean=mean)
    value = (drawn(64, 16) * 10 ** torch.linspace(-6, 4, 64)[:, None].double()).to(dtype)
    value[0] = -0.0
    assert bits(space.interchange(value, value)) == bits(value)
    # Of two that differ only outside of it, what is put differs by rounding alone.
    other = value[:1].double() + drawn(16) - space.decode(space.project(drawn(16)))
    assert other.shape == (1, 16)
    own = space.set(value.double(), space.project(value.double()))
    assert bits(own) == bits(value.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("basis", [torch.float32, torch.float64])
def test_activations_keep_their_type_and_the_basis_its_precision(
    dtype: torch.dtype, basis: torch.dtype
) -> None:
    space = Subspace(subspace(16, 3).basis.to(basis), mean=torch.ones(16))
    source, target = drawn(5, 16).to(dtype), drawn(5, 16, seed=1).to(dtype)
    exact = Subspace(space.basis, mean=torch.ones(16).to(basis))
    expected = exact.interchange(source.double(), target.double())
    found = space.interchange(source, target)
    assert found.dtype == dtype
    gap = (found.double() - expected).abs().max()
    assert gap <= max(ROUNDED[dtype], ROUNDED[basis])
    if dtype in (torch.bfloat16, torch.float16):
        # It is rounded once, at the end.
        assert (found == expected.to(dtype)).float().mean() > 0.98
    assert space.project(source).dtype == torch.promote_types(dtype, basis)
    mixed = space.interchange(source.double(), target)
    assert mixed.dtype == dtype


@contextmanager
def ambient(how: str) -> Iterator[None]:
    """What users may have switched on around a call."""
    dtype = torch.get_default_dtype()
    try:
        if how == "meta":
            torch.set_default_device("meta")
        elif how in ("float64", "bfloat16"):
            torch.set_default_dtype(getattr(torch, how))
        with (
            torch.inference_mode(how == "inference"),
            torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"),
        ):
            yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)


AMBIENT = ("meta", "float64", "bfloat16", "inference", "autocast")


@pytest.mark.parametrize("how", AMBIENT)
def test_what_is_switched_on_around_it_changes_no_bit(how: str) -> None:
    x, y = drawn(7, 6).float(), drawn(9, 6, seed=1).float()
    codes = Subspace(subspace(6, 2).basis.float()), subspace(6, 2).basis.float()

    def everything() -> list[Tensor]:
        made = [
            Subspace.random(6, 2, seed=3),
            Subspace.pca(x, 2),
            Subspace.mean_difference(x, y),
            Subspace(codes[1], mean=x[0]),
        ]
        found = []
        for space in made:
            middle = [] if space.mean is None else [space.mean]
            found += [space.basis, *middle, space.project(x), space.decode(space.project(x))]
            found += [space.interchange(x, y[:7]), space.set(x, space.project(y[:7]))]
        return found

    plain = everything()
    with ambient(how):
        found = everything()
    for one, other in zip(plain, found, strict=True):
        assert (one.dtype, one.device) == (other.dtype, other.device)
        assert bits(one) == bits(other.clone())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_go_through_also_after_inference(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        made = Subspace(subspace(6, 2).basis.float(), mean=torch.ones(6))
    for space in (made, Subspace(subspace(6, 2).basis.float(), mean=torch.ones(6))):
        with torch.inference_mode():
            space.project(drawn(3, 6).to(dtype))
        x = drawn(3, 6).to(dtype).requires_grad_()
        space.project(x).sum().backward()
        assert x.grad is not None
        expected = space.basis.sum(1).expand(3, 6).to(dtype)
        torch.testing.assert_close(x.grad, expected, atol=0.02, rtol=0)


def test_gradients_of_what_is_put_are_those_of_its_parts() -> None:
    """Also where both are the same, and nothing moves."""
    space = subspace(6, 2)
    projector = space.basis @ space.basis.T
    for other in (drawn(4, 6, seed=1), drawn(4, 6)):
        source, target = other.clone().requires_grad_(), drawn(4, 6).requires_grad_()
        weights = drawn(4, 6, seed=2)
        (space.interchange(source, target) * weights).sum().backward()
        assert source.grad is not None
        assert target.grad is not None
        torch.testing.assert_close(source.grad, weights @ projector)
        torch.testing.assert_close(target.grad, weights - weights @ projector)


def test_a_basis_is_a_copy_without_a_graph() -> None:
    basis = subspace(6, 2).basis.clone().requires_grad_()
    mean = torch.ones(6, dtype=torch.float64)
    space = Subspace(basis, mean=mean)
    assert not space.basis.requires_grad
    with torch.no_grad():
        basis.zero_()
        mean.zero_()
    assert space.basis.abs().max() > 0
    assert space.mean is not None
    assert space.mean.abs().max() > 0
    assert not space.project(drawn(3, 6)).requires_grad


class Sizes(TorchDispatchMode):
    """How many numbers the largest tensor has that torch makes."""

    largest = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **kwargs or {})
        for each in found if isinstance(found, tuple | list) else [found]:
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.numel())
        return found


def test_no_matrix_of_the_width_squared_is_made() -> None:
    width = 16_384
    x, y = torch.ones(3, width), torch.zeros(3, width)
    with Sizes() as seen:
        space = Subspace.random(width, 1)
        for each in (space, Subspace.pca(torch.eye(3, width)), Subspace.mean_difference(x, y)):
            each.interchange(x, y)
            each.set(x, each.project(y))
            each.decode(each.project(x))
    assert seen.largest <= 10 * width


def test_copies_and_pickles_are_the_same() -> None:
    space = Subspace(subspace(6, 2).basis, mean=torch.ones(6), info={"found": "here"})
    space.project(drawn(3, 6))
    for other in (copy.deepcopy(space), pickle.loads(pickle.dumps(space))):
        assert bits(other.interchange(drawn(6), drawn(6, seed=1))) == bits(
            space.interchange(drawn(6), drawn(6, seed=1))
        )
        assert other.info == space.info


# Where bases come from.


def test_random_is_of_its_seed_and_of_no_direction_more_than_another() -> None:
    assert bits(Subspace.random(8, 2, seed=1).basis) == bits(Subspace.random(8, 2, seed=1).basis)
    state = torch.get_rng_state()
    many = torch.stack([Subspace.random(5, 2, seed=seed).basis for seed in range(600)])
    assert torch.equal(state, torch.get_rng_state())
    products = torch.einsum("nwr,nvr->wv", many, many) / len(many)
    torch.testing.assert_close(products, 0.4 * torch.eye(5), atol=0.06, rtol=0)
    assert many.mean(0).abs().max() < 0.1


@given(st.integers(4, 20), st.integers(2, 6), st.integers(1, 3), st.integers(0, 999))
def test_pca_is_that_of_numpy(many: int, width: int, rank: int, seed: int) -> None:
    rank = min(rank, width, many - 1)
    x = drawn(many, width, seed=seed) + 3
    space = Subspace.pca(x, rank)
    values, vectors = np.linalg.eigh(np.cov(x.numpy().T).reshape(width, width))
    assert space.mean is not None
    np.testing.assert_allclose(space.mean.numpy(), x.numpy().mean(0), atol=1e-5)
    variances = space.project(x).var(0)
    np.testing.assert_allclose(variances.numpy(), values[::-1][:rank], rtol=1e-4, atol=1e-5)
    if np.diff(values).min(initial=1) > 1e-2:
        same = np.abs(np.diag(space.basis.numpy().T @ vectors[:, ::-1][:, :rank]))
        np.testing.assert_allclose(same, 1, atol=1e-4)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(0, 999))
def test_mean_difference_is_that_of_numpy(one: int, other: int, width: int, seed: int) -> None:
    x, y = drawn(one, width, seed=seed) + 1, drawn(other, width, seed=seed + 1)
    space = Subspace.mean_difference(x, y)
    difference = x.numpy().mean(0) - y.numpy().mean(0)
    direction = difference / np.linalg.norm(difference)
    np.testing.assert_allclose(space.basis[:, 0].numpy(), direction, atol=1e-5)
    # From their middle, so that means are as far from 0 on both sides.
    ends = [float(space.project(each.mean(0))) for each in (x, y)]
    half = float(np.linalg.norm(difference)) / 2
    assert ends == pytest.approx([half, -half], abs=1e-4)
    assert bits(Subspace.mean_difference(x[None], y[:, None]).basis) == bits(space.basis)


def test_a_record_tells_where_it_was_made() -> None:
    site = Site.get_site(tiny_api(), "q", 1, 2, [-1, -2])
    space = Subspace.random(8, 2, site=site)
    assert space.site == SiteRecord("q", 1, 2, (-1, -2))
    assert repr(space) == "Subspace(rank 2 of width 8 at q L1 H2 [-1, -2])"
    own = Site.get_site(tiny_api(), "resid", 1, None, [[1], [2]])
    assert str(Subspace.random(8, site=own).site) == "resid L1 positions of each prompt"


# What is refused, and what is said.

SKEWED = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
REFUSED: list[tuple[Callable[[], Any], list[str]]] = [
    (lambda: Subspace([[1.0]]), ["basis", "tensor [width, rank]"]),
    (lambda: Subspace(torch.ones(3)), ["[width, rank]", "basis[:, None]"]),
    (lambda: Subspace(torch.ones(1, 3, 3)), ["[width, rank]", "[1, 3, 3]"]),
    (lambda: Subspace(torch.ones(3, 0)), ["[width, rank]", "[3, 0]"]),
    (lambda: Subspace(torch.eye(3)[:2]), ["at most", "basis.T"]),
    (lambda: Subspace(torch.eye(3).long()), ["real numbers", "int64"]),
    (lambda: Subspace(torch.eye(3).cfloat()), ["real numbers", "complex64"]),
    (lambda: Subspace(torch.eye(3, device="meta")), ["no numbers"]),
    (lambda: Subspace(torch.eye(3) * float("nan")), ["basis", "not finite"]),
    (lambda: Subspace(2 * torch.eye(3)), ["not orthonormal", "vector 0 has the length 2"]),
    (lambda: Subspace(SKEWED), ["not orthonormal", "qr"]),
    (lambda: Subspace(torch.eye(3), mean=torch.ones(2)), ["mean", "[width] = [3]", "[2]"]),
    (lambda: Subspace(torch.eye(3), mean=[1.0] * 3), ["mean", "tensor"]),
    (lambda: Subspace(torch.eye(3), mean=torch.ones(3).long()), ["mean", "real numbers"]),
    (lambda: Subspace(torch.eye(3), mean=torch.ones(3) / 0), ["mean", "not finite"]),
    (lambda: Subspace(torch.eye(3), mean=torch.ones(3, device="meta")), ["mean"]),
    (lambda: Subspace(torch.eye(3), site="resid"), ["site must be a Site", "'resid'"]),
    (lambda: Subspace.random(4, 5), ["rank must be from 1 to the width 4", "5"]),
    (lambda: Subspace.random(4, 0), ["rank must be from 1", "0"]),
    (lambda: Subspace.random(4, 1.0), ["rank", "integer", "1.0"]),
    (lambda: Subspace.random("4"), ["width", "integer"]),
    (lambda: Subspace.random(0), ["width", "0"]),
    (lambda: Subspace.random(-3), ["width", "-3"]),
    (lambda: Subspace.pca(torch.ones(3)), ["activations", "[many, width]", "[3]"]),
    (lambda: Subspace.pca(torch.ones(3, 2)), ["vary in 0 directions", "rank=1"]),
    (lambda: Subspace.pca(torch.eye(2, 4), 2), ["vary in 1 direction,", "rank=2"]),
    (lambda: Subspace.pca(torch.ones(0, 2)), ["no activations"]),
    (lambda: Subspace.pca(torch.ones(3, 0)), ["activations", "[3, 0]"]),
    (lambda: Subspace.pca(torch.ones(3, 2) / 0), ["activations", "not finite"]),
    (lambda: Subspace.pca(torch.ones(3, 2, device="meta")), ["activations", "no numbers"]),
    (lambda: Subspace.pca([[1.0]]), ["activations", "[[1.0]]"]),
    (lambda: Subspace.mean_difference(torch.ones(2, 3), torch.ones(5, 3)), ["the same"]),
    (lambda: Subspace.mean_difference(torch.ones(2, 3), torch.ones(2, 4)), ["3 wide", "4"]),
    (lambda: Subspace.random(4).project(torch.ones(2, 5)), ["4 wide", "5 wide"]),
    (lambda: Subspace.random(4).project(torch.tensor(1.0)), ["[..., width]", "float32 []"]),
    (lambda: Subspace.random(4).project(torch.ones(4).long()), ["int64"]),
    (lambda: Subspace.random(4).project([1.0] * 4), ["tensor"]),
    (lambda: Subspace.random(4, 2).decode(torch.ones(3)), ["2 coordinates", "[3]"]),
    (lambda: Subspace.random(4, 2).decode(torch.ones(2).long()), ["real numbers", "int64 [2]"]),
    (lambda: Subspace.random(4, 2).decode([1.0, 2.0]), ["[1.0, 2.0]"]),
    (lambda: Subspace.random(4).interchange(torch.ones(5), torch.ones(4)), ["4 wide", "5 wide"]),
    (lambda: Subspace.random(4).interchange(torch.ones(1), torch.ones(4)), ["4 wide", "1 wide"]),
    (lambda: Subspace.random(4).interchange(torch.ones(4), torch.ones(5)), ["4 wide", "5 wide"]),
    (lambda: Subspace.random(4).interchange(torch.ones(2, 4), torch.ones(4)), ["[2, 4]", "[4]"]),
    (lambda: Subspace.random(4, 2).set(torch.ones(4), torch.ones(3)), ["[3]", "[2]"]),
    (lambda: Subspace.random(4, 2).set(torch.ones(4), torch.ones(3, 2)), ["[3, 2]", "[2]"]),
    (lambda: Subspace.random(4).set(torch.ones(5), torch.ones(1)), ["4 wide", "5 wide"]),
    (lambda: Subspace.random(4).set(torch.ones(4), 1.0), ["values", "1.0"]),
]


@pytest.mark.parametrize(("call", "parts"), REFUSED, ids=shown)
def test_what_is_none_is_refused(call: Callable[[], Any], parts: list[str]) -> None:
    with raises(SubspaceError, *parts):
        call()


def test_the_advice_works() -> None:
    with raises(SubspaceError, advice := "torch.linalg.qr(basis.double()).Q"):
        Subspace(SKEWED)
    made = Subspace(eval(advice, {"torch": torch, "basis": SKEWED}))
    torch.testing.assert_close(made.interchange(SKEWED.T, torch.zeros(2, 3)), SKEWED.T)
    for wrong, advice in ((torch.eye(3)[0], "basis[:, None]"), (torch.eye(3)[:2], "basis.T")):
        with raises(SubspaceError, advice):
            Subspace(wrong)
        assert Subspace(eval(advice, {"basis": wrong})).width == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_basis_may_be_off_by_the_rounding_of_its_type(dtype: torch.dtype) -> None:
    """Not by more: a half type keeps no basis that is orthonormal."""
    exact = torch.linalg.qr(drawn(512, 8)).Q
    if dtype in (torch.float64, torch.float32):
        assert Subspace(exact.to(dtype)).basis.dtype == dtype
    else:
        with raises(SubspaceError, "not orthonormal"):
            Subspace(exact.to(dtype))
        mended = torch.linalg.qr(exact.to(dtype).double()).Q
        assert (Subspace(mended).project(exact.T).abs() - torch.eye(8)).abs().max() < 0.01


class Coded:
    """An autoencoder of two numbers."""

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, c: Tensor) -> Tensor:
        return c


def test_what_a_site_takes_as_a_subspace() -> None:
    space = Subspace.random(4)
    assert as_space(None) is None
    assert as_space(space) is space
    trained = type("Trained", (), {"subspace": space})()
    assert as_space(trained) is space
    assert isinstance(as_space(Coded()), Features)
    assert by_layer({0: space, 2: Coded()}).keys() == {0, 2}


@pytest.mark.parametrize(
    "value",
    [
        *(Subspace, Coded, torch.eye(3), nn.Linear(3, 3), "S", b"S", 0, False, [], {0: None}),
        # It has methods of these names.
        tiny_tokenizer(["a"]),
    ],
    ids=lambda each: re.sub(r"\W.*", "", str(each)) or "empty",
)
def test_anything_else_is_refused(value: Any) -> None:
    with raises(SubspaceError, "subspace must be a Subspace, or an object with encode and decode"):
        as_space(value)
    with raises(SubspaceError, "subspace must be"):
        Site.get_site(tiny_api(), "resid", 1, subspace=value)


@pytest.mark.parametrize(
    ("value", "error", "parts"),
    [
        ({}, SubspaceError, ["empty mapping"]),
        ({0: None}, SubspaceError, ["None for layer 0", "leave the layer out"]),
        ({-1: Coded()}, LayerError, ["-1", "from 0"]),
        ({"0": Coded()}, LayerError, ["integer", "'0'"]),
        ({0: "S"}, SubspaceError, ["subspace must be", "'S'"]),
    ],
)
def test_mappings_are_looked_at(value: Any, error: type[Exception], parts: list[str]) -> None:
    with raises(error, *parts):
        by_layer(value)
