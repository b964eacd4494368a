"""A basis that is learned: orthonormal at every step, by torch's parametrisation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from nnpatch_core._rounding import as_typed
from nnpatch_core.errors import SubspaceError
from nnpatch_core.spaces import interchange_by


class Basis(nn.Module):
    """An orthonormal basis `[width, rank]`, as a product of Householder reflections.

    Nothing that is `[width, width]` is ever formed.

    Args:
        initial: `[width, rank]`, orthonormal: where learning begins.
    """

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(initial.clone())
        orthogonal(self, orthogonal_map="householder")
        # The parametrisation finds the point that gives this basis.
        self.weight = initial.clone()  # type: ignore[assignment]

    @property
    def parameter(self) -> nn.Parameter:
        """The only parameter there is, `[width, rank]`, free of any constraint."""
        (own,) = self.parameters()
        return own

    def now(self) -> Learned:
        """The basis as it is now, with its graph."""
        return Learned(self.weight)


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
        raise SubspaceError("a basis in the midst of learning is interchange_by, and nothing else")
