"""A linear subspace of activations, by an orthonormal basis."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._integers import strict_int, strict_seed
from nnpatch_core._printable import shown
from nnpatch_core._rounding import as_typed
from nnpatch_core.components import canonical_name
from nnpatch_core.errors import SubspaceError
from nnpatch_core.spaces.files import Content, push, read, save
from nnpatch_core.spaces.space import check_activation, check_expands

#: By type, how far the products of basis vectors may be from 0 and 1.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}


@attrs.frozen
class SiteRecord:
    """Where a subspace was made: a site, without the adapter and the positions of each prompt.

    Args:
        component: the component's name.
        layer: 0 is the first.
        head: one head, or None for the component as a whole.
        seq_pos: the positions, if all prompts have the same; None is all of them, or positions that
            `where` tells of.
        where: what the positions are, in words.
    """

    component: str = attrs.field(converter=canonical_name)
    layer: int
    head: int | None = None
    seq_pos: tuple[int, ...] | None = None
    where: str | None = None

    def __str__(self) -> str:
        head = "" if self.head is None else f" H{self.head}"
        at = "" if self.seq_pos is None else f" {list(self.seq_pos)}"
        return (
            f"{self.component} L{self.layer}{head}{at if self.where is None else ' ' + self.where}"
        )


def site_record(site: Any) -> SiteRecord | None:
    """The record of a `Site`; a record stays, and None.

    Raises:
        SubspaceError: it is no site.
    """
    if site is None or isinstance(site, SiteRecord):
        return site
    if not all(hasattr(site, name) for name in ("component", "layer", "head", "seq_pos")):
        raise SubspaceError(f"site must be a Site, got {shown(site)}")
    positions = site.seq_pos
    own = positions is None or all(isinstance(each, int) for each in positions)
    named = getattr(site, "where", None)
    where = repr(named) if named is not None else None if own else "positions of each prompt"
    return SiteRecord(site.component, site.layer, site.head, positions if own else None, where)


def _basis(value: Any) -> Tensor:
    """A basis as it was given, in float32 at least: a copy, so that nobody changes it later."""
    if not isinstance(value, Tensor):
        raise SubspaceError(f"a basis must be a tensor [width, rank], got {shown(value)}")
    if value.is_meta or not value.is_floating_point():
        got = "no numbers" if value.is_meta else str(value.dtype)
        raise SubspaceError(f"a basis must be real numbers [width, rank], got {got}")
    if value.ndim != 2 or not value.shape[1]:
        raise SubspaceError(
            f"a basis must have the shape [width, rank], got {list(value.shape)}"
            + ("; a single vector is basis[:, None]" if value.ndim == 1 else "")
        )
    width, rank = value.shape
    if rank > width:
        raise SubspaceError(
            f"a basis [width, rank] has at most as many vectors as they are wide, got "
            f"{rank} of width {width}; basis.T has the shape {[rank, width]}"
        )
    kind = torch.promote_types(value.dtype, torch.float32)
    own: Tensor = value.detach().to("cpu", kind, copy=True).contiguous()
    return own


def check_rank(rank: Any, width: int) -> int:
    """`rank` as an integer from 1 to `width`, or `SubspaceError`."""
    number = strict_int(rank, "rank", SubspaceError)
    if not 1 <= number <= width:
        raise SubspaceError(f"rank must be from 1 to the width {width}, got {number}")
    return number


def as_vectors(name: str, value: Any) -> Tensor:
    """Activations `[..., width]` as `[many, width]` in float64, or `SubspaceError`."""
    shaped = isinstance(value, Tensor) and value.ndim > 1 and value.shape[-1] > 0
    if not shaped or not value.is_floating_point():
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else shown(value)
        raise SubspaceError(f"{name} must be activations [many, width], got {got}")
    if value.is_meta:
        raise SubspaceError(f"{name} has no numbers: it is on the meta device")
    flat: Tensor = value.detach().to("cpu", torch.float64).flatten(0, -2)
    if not len(flat):
        raise SubspaceError(f"{name} has no activations")
    if not bool(flat.isfinite().all()):
        raise SubspaceError(f"{name} has numbers that are not finite")
    return flat


@attrs.frozen(eq=False, repr=False, init=False)
class Subspace:
    """A linear subspace of activations.

    Args:
        basis: `[width, rank]`, orthonormal columns. It is never made so silently: others are
            refused.
        mean: `[width]`, the activation whose coordinates are 0; None is the zero vector.
        site: the `Site` where it was made; only its names and numbers are kept.
        info: what a model card says of it, by name: text, numbers, and lists of them.

    Raises:
        SubspaceError: the basis or the mean is of a wrong shape or type, or not orthonormal; `info`
            is no mapping.

    Examples:
        >>> s = Subspace(torch.tensor([[1.0], [0.0], [0.0]]))
        >>> s.project(torch.tensor([3.0, 4.0, 5.0]))
        tensor([3.])
        >>> s.interchange(torch.tensor([3.0, 4.0, 5.0]), torch.tensor([0.0, 1.0, 2.0]))
        tensor([3., 1., 2.])
    """

    basis: Tensor
    mean: Tensor | None
    site: SiteRecord | None
    info: Mapping[str, Any]
    _placed: dict[Any, tuple[Tensor, Tensor | None]] = attrs.field(
        factory=dict, init=False, metadata={"cache": True}
    )

    def __init__(
        self,
        basis: Tensor,
        *,
        mean: Tensor | None = None,
        site: Any = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        with torch.inference_mode(False):
            own = _basis(basis)
            middle = _mean(mean, own)
        _check_orthonormal(own)
        self.__attrs_init__(own, middle, site_record(site), _info(info))

    @classmethod
    def random(cls, width: int, rank: int = 1, seed: int = 0, *, site: Any = None) -> Subspace:
        """A subspace drawn at random, each as likely as another.

        Args:
            width: of the activations.
            rank: how many basis vectors.
            seed: of the draw.
            site: see `Subspace`.

        Examples:
            >>> Subspace.random(8, rank=2)
            Subspace(rank 2 of width 8)
        """
        width = strict_int(width, "width", SubspaceError)
        rank = check_rank(rank, width)
        generator = torch.Generator().manual_seed(strict_seed(seed))
        drawn = torch.randn(width, rank, generator=generator, dtype=torch.float64, device="cpu")
        info = {"method": "drawn at random"}
        return cls(_orthonormal(drawn).float(), site=site, info=info)

    @classmethod
    def pca(cls, activations: Tensor, rank: int = 1, *, site: Any = None) -> Subspace:
        """The directions in which activations vary most, from their mean: principal components.

        Args:
            activations: `[..., width]`.
            rank: how many directions, at most as many as there are activations less one.
            site: see `Subspace`.

        Raises:
            SubspaceError: there are too few activations, or they vary in fewer directions.

        Examples:
            >>> x = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.1, 0.0], [-0.1, 0.0]])
            >>> Subspace.pca(x).basis.abs().round()
            tensor([[0.],
                    [1.]])
        """
        flat = as_vectors("activations", activations)
        rank = check_rank(rank, flat.shape[1])
        mean = flat.mean(0)
        _, sizes, directions = torch.linalg.svd(flat - mean, full_matrices=False)
        floor = 1e-7 * float(sizes.max()) if len(sizes) else 0.0
        varied = int((sizes > floor).sum())
        if rank > varied:
            raise SubspaceError(
                f"{len(flat)} activations vary in {varied} direction{'s' * (varied != 1)}, and "
                f"rank={rank} was asked for: give more of them, or a lower rank"
            )
        info = {"method": "principal components (PCA)"}
        return cls(directions[:rank].T.float(), mean=mean.float(), site=site, info=info)

    @classmethod
    def mean_difference(cls, source: Tensor, target: Tensor, *, site: Any = None) -> Subspace:
        """The direction from the mean of some activations to that of others, from their middle.

        Args:
            source: `[..., width]`.
            target: `[..., width]`; there may be another number of them.
            site: see `Subspace`.

        Raises:
            SubspaceError: both means are the same.

        Examples:
            >>> one, other = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
            >>> Subspace.mean_difference(one, other).basis
            tensor([[1.],
                    [0.]])
        """
        one, other = as_vectors("source", source), as_vectors("target", target)
        if one.shape[1] != other.shape[1]:
            raise SubspaceError(
                f"source is {one.shape[1]} wide, and target {other.shape[1]}: give activations of "
                "one site"
            )
        difference = one.mean(0) - other.mean(0)
        size = float(difference.norm())
        if size <= 1e-7 * max(float(one.norm(dim=1).max()), float(other.norm(dim=1).max())):
            raise SubspaceError(
                "the means of source and target are the same: no direction parts them"
            )
        middle = (one.mean(0) + other.mean(0)) / 2
        basis, info = (difference / size)[:, None].float(), {"method": "difference of means"}
        return cls(basis, mean=middle.float(), site=site, info=info)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        filename: str | None = None,
        part: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Subspace:
        """Read a subspace from a folder, a file, or a repository on the hub of Hugging Face.

        Three kinds of files are known, and told apart by what is in them: those of
        `save_pretrained`, projections of the older library nnpatch, and the rotations of pyvene
        that exchange a subspace. No code of a file runs.

        Args:
            name: of a folder or file; if there is none, of a repository, `owner/name`.
            filename: the file in it, where `config.json` tells of several, or of none.
            part: of pyvene's interventions with a partition, which group of coordinates.
            revision: a branch, tag or commit of the repository.
            token: for private repositories; None is the one that huggingface_hub knows.
            cache_dir: where downloads are kept; None is huggingface_hub's usual place.
            local_files_only: take what was downloaded before, or fail.

        Raises:
            SubspaceError: there is nothing of that name, or no subspace in it: the message says
                which file it is, and what is wrong with it.

        Examples:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     Subspace.random(8, rank=2).save_pretrained(folder)
            ...     Subspace.from_pretrained(folder)
            Subspace(rank 2 of width 8)
        """
        found = read(
            name,
            filename=filename,
            part=part,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        try:
            site = None if found.site is None else SiteRecord(**found.site)
            return cls(found.basis, mean=found.mean, site=site, info=found.info)
        except SubspaceError as error:
            raise SubspaceError(f"{found.file} cannot be read as a subspace: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder: `model.safetensors`, `config.json`, and a model card, `README.md`.

        The tensors are kept bit by bit, `info` as JSON has it (tuples are lists then). A subspace
        that was saved there is replaced.

        Args:
            folder: made if there is none; it may hold other files.

        Raises:
            SubspaceError: it cannot be written, one of these files is there and no subspace's, or
                `info` has something else than text, finite numbers, and mappings and lists of them.
        """
        save(folder, self._content())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Put the files of `save_pretrained` into a repository on the hub of Hugging Face.

        Args:
            repo_id: `owner/name`; it is made if there is none.
            private: whether one that is made is private; None is the owner's default.
            token: with the right to write; None is the one that huggingface_hub knows.
            commit_message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            SubspaceError: as for `save_pretrained`, or the hub refuses, or cannot be reached.
        """
        return push(
            repo_id,
            self._content(),
            private=private,
            token=token,
            commit_message=commit_message,
        )

    def _content(self) -> Content:
        site = None if self.site is None else attrs.asdict(self.site)
        return Content(self.basis, self.mean, site, self.info)

    @property
    def width(self) -> int:
        """The width of the activations."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """How many coordinates there are."""
        return self.basis.shape[1]

    def project(self, x: Tensor) -> Tensor:
        """The coordinates `[..., rank]` of activations `[..., width]`: (x - mean) B."""
        basis, mean = self._at(x)
        with as_typed(x):
            x = x.to(basis.dtype)
            return (x if mean is None else x - mean) @ basis

    def encode(self, x: Tensor) -> Tensor:
        """The same as `project`."""
        return self.project(x)

    def decode(self, c: Tensor) -> Tensor:
        """The point `[..., width]` of the subspace that has coordinates `[..., rank]`."""
        if not isinstance(c, Tensor) or not c.is_floating_point() or c.shape[-1:] != (self.rank,):
            got = f"{c.dtype} {list(c.shape)}" if isinstance(c, Tensor) else shown(c)
            raise SubspaceError(
                f"{self} has {self.rank} coordinate{'s' * (self.rank != 1)}, a tensor of real "
                f"numbers [..., rank], got {got}"
            )
        basis, mean = self._placed_at(c)
        with as_typed(c):
            point = c.to(basis.dtype) @ basis.T
        return point if mean is None else point + mean

    def interchange(self, source: Tensor, target: Tensor) -> Tensor:
        """`target` with the coordinates of `source`: target + (source - target) B B^T.

        Args:
            source: `[..., width]`.
            target: `[..., width]`.

        Returns:
            `[..., width]`, in the dtype of `target`.

        Raises:
            SubspaceError: one of them is of another width, or `source` of another shape.
        """
        basis, _ = self._at(target)
        check_activation(self, source, "the source's activation")
        check_expands("source", source, target.shape)
        return interchange_by(basis, source, target)

    def set(self, target: Tensor, values: Tensor) -> Tensor:
        """`target` with other coordinates: target + (values - project(target)) B^T.

        Args:
            target: `[..., width]`.
            values: `[..., rank]`, or what can be expanded to it.

        Returns:
            `[..., width]`, in the dtype of `target`.

        Raises:
            SubspaceError: `target` is of another width, or `values` of another shape.
        """
        basis, _ = self._at(target)
        check_expands("values", values, (*target.shape[:-1], self.rank))
        with as_typed(target):
            moved = values.to(target.device, basis.dtype) - self.project(target)
            return added(target, moved @ basis.T)

    def _at(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Basis and mean for these activations."""
        check_activation(self, x, "the activation")
        return self._placed_at(x)

    def _placed_at(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Basis and mean where `x` is, in a type that loses nothing of either."""
        key = x.device, torch.promote_types(x.dtype, self.basis.dtype)
        if key not in self._placed:
            # They serve later calls too, which may want gradients.
            with torch.inference_mode(False):
                mean = None if self.mean is None else self.mean.to(*key)
                self._placed[key] = self.basis.to(*key), mean
        return self._placed[key]

    def __repr__(self) -> str:
        at = "" if self.site is None else f" at {self.site}"
        return f"Subspace(rank {self.rank} of width {self.width}{at})"


def interchange_by(basis: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Target + (source - target) B B^T `[..., width]`, in the dtype of `target`."""
    kind = torch.promote_types(target.dtype, basis.dtype)
    basis = basis.to(target.device, kind)
    with as_typed(target):
        moved = source.to(target.device, kind) - target.to(kind)
        return added(target, (moved @ basis) @ basis.T)


def added(target: Tensor, moved: Tensor) -> Tensor:
    """`target` and what moves it, in the dtype of `target`; bitwise itself where nothing does."""
    kind = torch.promote_types(target.dtype, moved.dtype)
    whole = (target.to(kind) + moved).to(target.dtype)
    if whole.requires_grad:
        # Chosen by `where`, what stays would pass no gradient on to what might move it.
        return whole
    # Of -0.0 and 0.0 the sum is another number.
    return torch.where(moved == 0, target, whole)


def _orthonormal(vectors: Tensor) -> Tensor:
    """An orthonormal basis of the span of `[width, rank]`, of which none is preferred."""
    basis, factor = torch.linalg.qr(vectors)
    own: Tensor = basis * factor.diagonal().sign()
    return own


def _check_orthonormal(basis: Tensor) -> None:
    """Raise `SubspaceError` unless columns have the length 1 and are at right angles."""
    if not bool(basis.isfinite().all()):
        raise SubspaceError("the basis has numbers that are not finite")
    with as_typed(basis):
        products = basis.T @ basis
    gap = (products - torch.eye(len(products), dtype=basis.dtype, device="cpu")).abs()
    tolerance = _TOLERANCES[basis.dtype]
    if float(gap.max()) <= tolerance:
        return
    row, column = divmod(int(gap.argmax()), len(products))
    told = (
        f"vector {row} has the length {math.sqrt(float(products[row, row])):.6g}"
        if row == column
        else f"vectors {row} and {column} have the product {float(products[row, column]):.3g}"
    )
    raise SubspaceError(
        f"the basis is not orthonormal: {told}, beyond {tolerance:g}; if you mean the subspace "
        "that it spans, give torch.linalg.qr(basis.double()).Q"
    )


def _info(info: Any) -> dict[str, Any]:
    if info is None:
        return {}
    if not isinstance(info, Mapping):
        raise SubspaceError(f"info must be a mapping of names to what is known, got {shown(info)}")
    return dict(info)


def _mean(mean: Any, basis: Tensor) -> Tensor | None:
    if mean is None:
        return None
    if not isinstance(mean, Tensor) or mean.is_meta or not mean.is_floating_point():
        raise SubspaceError(f"mean must be a tensor of real numbers [width], got {shown(mean)}")
    if mean.shape != basis.shape[:1]:
        raise SubspaceError(
            f"mean must have the shape [width] = [{len(basis)}], got {list(mean.shape)}"
        )
    own = mean.detach().to("cpu", basis.dtype, copy=True)
    if not bool(own.isfinite().all()):
        raise SubspaceError("the mean has numbers that are not finite")
    return own
