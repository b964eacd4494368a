"""A projection whose basis is a parameter."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from nnpatch_core.errors import SubspaceError
from nnpatch_core.subspace import Subspace


class LowRankOrthogonalProjection(nn.Module):
    """A subspace of activations as a module: its parameter `weight` is the basis.

    Computed as `nnpatch_core.subspace.Subspace` does it, without matrices of the width by the
    width. Where a subspace is asked for, as by `Site.get_site(..., subspace=)`, it may be given.

    Args:
        embed_dim: the width of the activations.
        rank: how many basis vectors.
        orthogonalize: whether the weight stays orthonormal, whatever is put into it or learned.

    Raises:
        SubspaceError: the rank is not from 1 to the width.

    Examples:
        >>> projection = LowRankOrthogonalProjection.from_subspace_basis(torch.eye(3)[:, :1])
        >>> source, target = torch.tensor([[5.0, 6.0, 7.0]]), torch.tensor([[1.0, 2.0, 3.0]])
        >>> projection(source, target).detach()
        tensor([[5., 2., 3.]])
        >>> projection.constant_forward(torch.tensor([9.0]), target).detach()
        tensor([[9., 2., 3.]])
    """

    weight: Tensor

    def __init__(self, embed_dim: int, rank: int = 1, orthogonalize: bool = True) -> None:
        super().__init__()
        # It checks the numbers as well.
        seed = int(torch.randint(2**31, (), device="cpu"))
        drawn = Subspace.random(embed_dim, rank, seed=seed).basis
        self.weight = nn.Parameter(drawn.clone())
        if orthogonalize:
            # Without the base that torch keeps by default, of the width by the width.
            orthogonal(self, orthogonal_map="householder", use_trivialization=False)

    @property
    def subspace(self) -> Subspace:
        """The subspace as it stands now, by a copy of the basis.

        Raises:
            SubspaceError: the weight is not orthonormal.
        """
        return Subspace(self.weight.detach())

    def project(self, x: Tensor) -> Tensor:
        """The coordinates `[..., rank]` of activations `[..., width]`."""
        basis = self.weight
        return _own("x", x, basis) @ basis

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """`target` `[..., width]`, with the coordinates of `source`, in the weight's dtype."""
        # The parametrisation computes it anew each time.
        basis = self.weight
        own = _own("target", target, basis)
        return own + ((_own("source", source, basis) - own) @ basis) @ basis.T

    def constant_forward(self, source_constant: Tensor, target: Tensor) -> Tensor:
        """`target` with coordinates that are given, in the weight's dtype.

        Args:
            source_constant: `[batch]`, or `[batch, rank]`.
            target: `[batch, width]`, or `[batch, seq, width]`: each token gets its prompt's.

        Raises:
            SubspaceError: they do not fit together.
        """
        basis = self.weight
        own = _own("target", target, basis)
        values = source_constant.to(basis)
        if values.ndim == 1:
            values = values[:, None]
        if values.shape != (own.shape[0], basis.shape[1]) or own.ndim not in (2, 3):
            raise SubspaceError(
                f"a projection of rank {basis.shape[1]} needs a value for each prompt and "
                f"coordinate, got {list(source_constant.shape)} for {list(target.shape)}"
            )
        if own.ndim == 3:
            values = values[:, None]
        return own + (values - own @ basis) @ basis.T

    @classmethod
    def from_subspace_basis(cls, subspace_basis: Tensor) -> LowRankOrthogonalProjection:
        """The projection on the span of `[width, rank]`, whose columns are orthonormal.

        Raises:
            SubspaceError: they are not.
        """
        basis = Subspace(subspace_basis).basis
        width, rank = basis.shape
        projection = cls(width, rank, orthogonalize=False)
        projection.weight = nn.Parameter(basis.clone())
        orthogonal(projection, orthogonal_map="householder", use_trivialization=False)
        return projection

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], **options: Any
    ) -> LowRankOrthogonalProjection:
        """Read a projection that the older library saved, or any file of a subspace.

        Args:
            name: see `Subspace.from_pretrained`, which also says what raises.
            options: of `Subspace.from_pretrained`.

        Raises:
            SubspaceError: as there; or the subspace has a mean, which a projection has not.
        """
        found = Subspace.from_pretrained(name, **options)
        if found.mean is not None:
            raise SubspaceError(
                f"{found} has a mean, from which its coordinates count, and a projection has none: "
                "use it as a Subspace"
            )
        return cls.from_subspace_basis(found.basis)

    @classmethod
    def load_pretrained(cls, path: str | os.PathLike[str]) -> LowRankOrthogonalProjection:
        """The older name of `from_pretrained`, for files."""
        warnings.warn(
            "load_pretrained is an older name: use from_pretrained",
            DeprecationWarning,
            stacklevel=2,
        )
        return cls.from_pretrained(path)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """As `Subspace.save_pretrained`."""
        self.subspace.save_pretrained(folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """As `Subspace.push_to_hub`."""
        return self.subspace.push_to_hub(repo_id, **options)

    def extra_repr(self) -> str:
        """The sizes, for its representation."""
        width, rank = self.weight.shape
        return f"rank {rank} of width {width}"


def _own(name: str, x: Tensor, basis: Tensor) -> Tensor:
    """Activations in the basis's dtype, where they are as wide as it."""
    if x.shape[-1] != len(basis):
        raise SubspaceError(f"{name} is {x.shape[-1]} wide, and the projection {len(basis)}")
    return x.to(basis.dtype)
