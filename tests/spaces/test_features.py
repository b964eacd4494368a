"""Features of autoencoders of several kinds: what they miss stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nnpatch_core.errors import SubspaceError
from nnpatch_core.spaces import Features
from tests.helpers.refusals import cases, raises

WIDTH, MANY = 8, 24
#: What is left of numbers of size 1 in the type in which an autoencoder computes.
ATOL = 1e-5


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Relu:
    """An autoencoder that is no module; it misses much of what it is given."""

    threshold = 0.0

    def __init__(self) -> None:
        self.down = drawn(WIDTH, MANY, seed=1) / 2
        self.up = drawn(MANY, WIDTH, seed=2) / 2
        self.bias = drawn(WIDTH, seed=3) / 4

    def encode(self, x: Tensor) -> Tensor:
        found = (x - self.bias.to(x)) @ self.down.to(x)
        return torch.where(found > self.threshold, found, 0.0)

    def decode(self, c: Tensor) -> Tensor:
        return c @ self.up.to(c) + self.bias.to(c)


class JumpRelu(Relu):
    threshold = 0.3


class TopK(Relu):
    """So that a feature depends on which others there are."""

    def encode(self, x: Tensor) -> Tensor:
        found = super().encode(x)
        values, where = found.topk(4, -1)
        return torch.zeros_like(found).scatter(-1, where, values)


class Normed(Relu):
    """It scales what it is given, and remembers by how much until it decodes."""

    scale: Tensor

    def encode(self, x: Tensor) -> Tensor:
        self.scale = x.norm(dim=-1, keepdim=True) + 1e-3
        return super().encode(x / self.scale)

    def decode(self, c: Tensor) -> Tensor:
        return super().decode(c) * self.scale


class Module(nn.Module):
    """One with weights that want gradients."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.down = nn.Parameter(drawn(WIDTH, MANY, seed=1, dtype=dtype))
        self.up = nn.Parameter(drawn(MANY, WIDTH, seed=2, dtype=dtype))

    def encode(self, x: Tensor) -> Tensor:
        return (x @ self.down).relu()

    def decode(self, c: Tensor) -> Tensor:
        return c @ self.up


class Told(Module):
    """It says in which type it computes."""

    dtype = torch.float64

    def __init__(self) -> None:
        super().__init__(torch.float64)


KINDS: dict[str, Callable[[], Any]] = {
    "ReLU": Relu,
    "JumpReLU": JumpRelu,
    "top k": TopK,
    "normed": Normed,
    "module": Module,
    "module in float64": lambda: Module(torch.float64),
    "module in bfloat16": lambda: Module(torch.bfloat16),
    "says its type": Told,
}
kinds = pytest.mark.parametrize("kind", KINDS)
HALF = {"module in bfloat16"}


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [None, [0], [3, 5, 23]])
@pytest.mark.parametrize("grad", [False, True])
def test_a_value_interchanged_with_itself_is_itself_bitwise(
    kind: str, dtype: torch.dtype, features: Any, grad: bool
) -> None:
    value = drawn(5, 7, WIDTH, dtype=dtype)
    value[0, 0] = -0.0
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}[value.element_size()]
    space = Features(KINDS[kind](), features)
    with torch.set_grad_enabled(grad):
        found = space.interchange(value, value), space.set(value, space.encode(value))
    for each in found:
        assert each.dtype == dtype
        if grad and isinstance(space.autoencoder, nn.Module):
            # Where a gradient is kept, up to the sign of 0.
            assert each.equal(value)
        else:
            assert each.view(whole).equal(value.view(whole))


@kinds
def test_the_chosen_features_alone_move_what_they_decode_to(kind: str) -> None:
    """By hand: what the autoencoder misses is kept, and so are other features."""
    chosen = [3, 5, 23]
    source, target = drawn(2, 4, WIDTH, seed=5), drawn(2, 4, WIDTH, seed=6)
    coder = KINDS[kind]()
    kind_of = next(coder.parameters()).dtype if isinstance(coder, nn.Module) else torch.float32
    with torch.no_grad():
        new = coder.encode(source.to(kind_of))[..., chosen]
        before = coder.encode(target.to(kind_of))
        after = before.clone()
        after[..., chosen] = new
        moved = coder.decode(after) - coder.decode(before)
        expected = target + moved.float()
        found = Features(coder, chosen).interchange(source, target)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
    assert moved.abs().max() > 0.1
    # The error term is no small one here.
    assert (coder.decode(before).float() - target).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["ReLU", "JumpReLU", "normed", "module"])
def test_all_features_move_the_whole_reconstruction(kind: str) -> None:
    source, target = drawn(3, WIDTH, seed=5), drawn(3, WIDTH, seed=6)
    coder = KINDS[kind]()
    with torch.no_grad():
        new = coder.encode(source)
        own = coder.encode(target)
        expected = target + coder.decode(new) - coder.decode(own)
        found = Features(coder).interchange(source, target)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


@kinds
@given(st.lists(st.integers(0, 3), max_size=3), st.integers(0, 999))
@settings(max_examples=15)
def test_a_batch_of_any_shape_is_one_by_one(kind: str, shape: list[int], seed: int) -> None:
    space = Features(KINDS[kind](), [1, 4, 9, 16])
    source, target = drawn(*shape, WIDTH, seed=seed), drawn(*shape, WIDTH, seed=seed + 1)
    with torch.no_grad():
        found = space.interchange(source, target)
        assert found.shape == target.shape
        rows = zip(
            source.view(-1, WIDTH), target.view(-1, WIDTH), found.view(-1, WIDTH), strict=True
        )
        atol = 0.05 if kind in HALF else ATOL
        for one, other, row in rows:
            torch.testing.assert_close(space.interchange(one, other), row, atol=atol, rtol=0)


@kinds
def test_coordinates_can_be_set_and_decoded(kind: str) -> None:
    space = Features(KINDS[kind](), [2, 7], width=WIDTH)
    target = drawn(3, WIDTH)
    with torch.no_grad():
        values = space.encode(drawn(3, WIDTH, seed=1))
        assert (space.rank, values.shape) == (2, (3, 2))
        same = space.interchange(drawn(3, WIDTH, seed=1), target)
        torch.testing.assert_close(space.set(target, values), same, atol=ATOL, rtol=0)
        one = space.set(target, values[:1])
        torch.testing.assert_close(one[:1], same[:1], atol=ATOL, rtol=0)
        whole = values.new_zeros(3, MANY)
        whole[:, [2, 7]] = values
        space.encode(torch.zeros(WIDTH))
        expected = space.autoencoder.decode(whole)
        torch.testing.assert_close(space.decode(values), expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_narrow_autoencoder_does_not_narrow_the_activation(dtype: torch.dtype) -> None:
    """Only what it moves is as coarse as it is."""
    target = drawn(64, WIDTH, dtype=torch.float64).to(torch.float32) * 1000
    space = Features(Module(dtype), [0])
    with torch.no_grad():
        found = space.set(target, space.encode(target) + 1.0)
    moved = (found - target - space.autoencoder.up[0].float()).abs()
    fine = Features(Module(torch.float64), [0])
    with torch.no_grad():
        exact = fine.set(target.double(), fine.encode(target.double()) + 1.0)
    assert moved.shape == exact.shape
    if dtype == torch.float32:
        torch.testing.assert_close(found.double(), exact, atol=1e-2, rtol=0)
    # Where it moves nothing, the activation keeps all of its digits.
    still = Features(Module(dtype), [0])
    with torch.no_grad():
        assert still.set(target, still.encode(target)).equal(target)


def test_the_users_autocast_is_for_the_model() -> None:
    source, target = drawn(3, WIDTH, seed=5), drawn(3, WIDTH, seed=6)
    space = Features(Module(), [3, 5])
    plain = space.interchange(source, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert space.interchange(source, target).equal(plain)


def test_names() -> None:
    assert repr(Features(Relu())) == "Features(all of Relu)"
    assert repr(Features(Relu(), range(7))) == "Features(0, 1, 2, 3, 4, … of Relu)"
    assert Features(Relu(), [1]).rank == 1
    assert Features(Relu()).rank is None


class Scalar(Relu):
    def encode(self, x: Tensor) -> Tensor:
        return x.sum()


class Flat(Relu):
    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x).flatten()


class Numpy(Relu):
    def encode(self, x: Tensor) -> Any:
        return super().encode(x).numpy()


class Breaks(Relu):
    def encode(self, x: Tensor) -> Tensor:
        return x @ torch.ones(5, 5)


class Narrow(Relu):
    def decode(self, c: Tensor) -> Tensor:
        return super().decode(c)[..., :1]


class Nothing(Relu):
    def decode(self, c: Tensor) -> Any:
        return None


class NoDecode:
    def encode(self, x: Tensor) -> Tensor:
        return x


X, Y = drawn(3, WIDTH), drawn(3, WIDTH, seed=1)
REFUSED: list[tuple[Callable[[], Any], list[str]]] = [
    (lambda: Features(NoDecode()), ["encode and decode", "no decode"]),
    (lambda: Features(Relu), ["encode and decode", "<class"]),
    (lambda: Features(nn.Linear(2, 2)), ["encode and decode", "Linear"]),
    (lambda: Features(None), ["encode and decode", "None"]),
    (lambda: Features(Module().to("meta")), ["Module has no weights", "meta"]),
    (lambda: Features(Relu(), [-1]), ["numbered from 0", "-1"]),
    (lambda: Features(Relu(), []), ["features"]),
    (lambda: Features(Relu(), [1, 1]), ["features", "1"]),
    (lambda: Features(Relu(), ["1"]), ["features", "integer"]),
    (lambda: Features(Relu(), 3), ["features"]),
    (lambda: Features(Relu(), width=0), ["width must be at least 1", "0"]),
    (lambda: Features(Relu(), width=8.0), ["width", "integer"]),
    (lambda: Features(Relu(), [24]).interchange(X, Y), ["has 24 features", "24 was asked for"]),
    (lambda: Features(Relu(), width=9).interchange(X, Y), ["9 wide", "8 wide"]),
    (lambda: Features(Relu()).encode(X.long()), ["real numbers", "int64"]),
    (lambda: Features(Relu()).interchange(X[:2], Y), ["source", "[3, 8]", "[2, 8]"]),
    (lambda: Features(Relu()).interchange([1.0], Y), ["source", "[1.0]"]),
    (lambda: Features(Relu(), [1, 2]).set(X, torch.ones(3)), ["values", "[3, 2]", "[3]"]),
    (lambda: Features(Relu(), [1, 2]).set(X, 1.0), ["values", "1.0"]),
    (lambda: Features(Relu(), [1]).decode(torch.ones(1)), ["width="]),
    (lambda: Features(Scalar()).interchange(X, Y), ["encodes [3, 8] as []", "[3, any]"]),
    (lambda: Features(Flat()).interchange(X, Y), ["encodes [3, 8] as [72]", "[3, any]"]),
    (lambda: Features(Numpy()).interchange(X, Y), ["encodes [3, 8] as ndarray, no tensor"]),
    (lambda: Features(Breaks()).interchange(X, Y), ["fails as it encodes", "[3, 8]", "5x5"]),
    (lambda: Features(Narrow()).interchange(X, Y), ["decodes [2, 3, 24] as [2, 3, 1]"]),
    (lambda: Features(Nothing()).interchange(X, Y), ["decodes", "NoneType, no tensor"]),
]  # fmt: skip


@cases(("call", "parts"), REFUSED)
def test_what_is_none_is_refused(call: Callable[[], Any], parts: list[str]) -> None:
    with raises(SubspaceError, *parts):
        call()


def test_a_lack_of_memory_stays_one() -> None:
    """So that whoever runs less at once may try again."""

    class Full(Relu):
        def encode(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("none left")

    with pytest.raises(torch.OutOfMemoryError):
        Features(Full()).interchange(X, Y)


def test_the_advice_works() -> None:
    with raises(SubspaceError, "give it the argument width="):
        Features(Relu(), [1]).decode(torch.ones(1))
    assert Features(Relu(), [1], width=WIDTH).decode(torch.ones(1)).shape == (WIDTH,)
