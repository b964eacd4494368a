"""A basis that is learned: orthonormal at every step, as reflections of the first one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnpatch_core._rounding import as_typed
from nnpatch_core.errors import SubspaceError
from nnpatch_core.spaces import interchange_by


class Basis:
    """An orthonormal basis `[width, rank]`, as a product of Householder reflections.

    Its parameter is 0 where learning begins, and of the numbers in it those below the diagonal
    count. So decay pulls towards the first basis, and two that begin alike learn alike. Nothing
    that is `[width, width]` is ever formed.

    Optimisers such as AdamW scale each coordinate by itself, and activations are large along a few
    axes. So the coordinates are mixed: none of them is an axis of the activation.

    Args:
        initial: `[width, rank]`, orthonormal: where learning begins.
    """

    def __init__(self, initial: Tensor) -> None:
        self.parameter = nn.Parameter(torch.zeros_like(initial))
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(0, 2, (len(initial), 1), generator=generator, device="cpu")
        self._mixing = (2 * drawn - 1).to(initial)
        #: The rotation of the whole space that takes the first axes to the first basis, mixed.
        self._turn = torch.geqrf(_hartley(self._mixing * initial))
        self._signs = -self._turn[0].diagonal().sign()

    def now(self) -> Learned:
        """The basis as it is now, with its graph."""
        with as_typed(self.parameter):
            width, rank = self.parameter.shape
            start = torch.eye(width, rank, dtype=self.parameter.dtype, device=self.parameter.device)
            vectors = self.parameter.tril(-1) + start
            # The reflections of all these vectors, one after the other, as one product.
            products = vectors.T @ vectors
            factor = products.triu(1) + (products.diagonal() / 2).diag()
            ahead = torch.linalg.solve_triangular(factor, vectors[:rank].T, upper=True)
            mixed = torch.ormqr(*self._turn, start - vectors @ ahead) * self._signs
            return Learned(self._mixing * _hartley(mixed))


def _hartley(columns: Tensor) -> Tensor:
    """The discrete Hartley transform of columns `[width, rank]`: orthogonal, its own inverse."""
    waves = torch.fft.fft(columns, dim=0, norm="ortho")
    found: Tensor = waves.real - waves.imag
    return found


class Learned:
    """A basis in the midst of learning, as a space: it need not be checked, and has its graph.

    Args:
        basis: `[width, rank]`.
    """

    def __init__(self, basis: Tensor) -> None:
        self.basis = basis

    @property
    def width(self) -> int:
        """See `Space.width`."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """See `Space.rank`."""
        return self.basis.shape[1]

    def encode(self, x: Tensor) -> Tensor:
        """See `Space.encode`."""
        with as_typed(x):
            return x.to(self.basis.dtype) @ self.basis

    def decode(self, c: Tensor) -> Tensor:
        """See `Space.decode`."""
        with as_typed(c):
            return c @ self.basis.T

    def interchange(self, source: Tensor, target: Tensor) -> Tensor:
        """See `Space.interchange`."""
        return interchange_by(self.basis, source, target)

    def set(self, target: Tensor, values: Tensor) -> Tensor:
        """See `Space.set`."""
        raise SubspaceError("a basis in the midst of learning is interchanged, and nothing else")
