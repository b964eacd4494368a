"""Values to steer with, as users give them, and as they are put."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arguments import listed
from nnpatch_core._printable import shown
from nnpatch_core.batch import has_numbers, where_of
from nnpatch_core.errors import SteeringError
from nnpatch_core.spaces import Space

Kind: TypeAlias = Literal["set", "add", "scale"]


@attrs.frozen(eq=False)
class Set:
    """Let a subspace have these coordinates, or an activation this value.

    Args:
        values: with a subspace its coordinates: a number (for each of them), `[rank]` for all
            prompts, or `[batch, rank]`, those of each; of a subspace of rank 1 `[batch]` too.
            Without, the whole activation: `[width]` or `[batch, width]`.

    Examples:
        >>> Set(2.0)
        Set(values=2.0)
    """

    values: Any


@attrs.frozen(eq=False)
class Add:
    """Add to the coordinates in a subspace, or to an activation.

    Args:
        values: as of `Set`.

    Examples:
        >>> Add([0.5, -1.0])
        Add(values=[0.5, -1.0])
    """

    values: Any


@attrs.frozen(eq=False)
class Scale:
    """Multiply the coordinates in a subspace, from its mean, or an activation.

    Args:
        factor: with a subspace as the values of `Set`; without, one number.

    Examples:
        >>> Scale(0)
        Scale(factor=0)
    """

    factor: Any


@attrs.frozen(eq=False)
class Amount:
    """A value to steer with, read.

    Args:
        kind: how.
        values: `[1 or batch, 1 or coordinates]`, on the device on which they were given.
        space: the part of the activation that it is about; None is all of it.
    """

    kind: Kind
    values: Tensor
    space: Space | None

    @property
    def prompts(self) -> int | None:
        """For how many prompts there are values; None where one is for all."""
        return len(self.values) if len(self.values) > 1 else None

    def put(self, there: Tensor, prompts: Tensor | None) -> Tensor:
        """The activations as steered.

        Args:
            there: `[tokens, columns]`, as they stand.
            prompts: `[tokens]`, the prompt of each; None where one value is for all.

        Returns:
            `[tokens, columns]`, in the dtype of `there`.
        """
        # The type first, as not every device has all of them.
        kind = torch.promote_types(there.dtype, torch.float32)
        values = self.values.to(kind).to(there.device)
        if prompts is not None and self.prompts is not None:
            values = values[prompts.to(there.device)]
        # Under the user's autocast too: sums and products of elements keep their type there.
        if self.space is not None:
            return self._in_space(self.space, there, values)
        return self._whole(there, values)

    def _whole(self, there: Tensor, values: Tensor) -> Tensor:
        if values.shape[1] not in (1, there.shape[1]):
            raise SteeringError(
                f"the values are {values.shape[1]} wide, and the activation is "
                f"{there.shape[1]} wide: give a vector [width] of the site"
            )
        if self.kind == "set":
            return values.expand_as(there).to(there.dtype)
        wide = there.to(values.dtype)
        return (wide + values if self.kind == "add" else wide * values).to(there.dtype)

    def _in_space(self, space: Space, there: Tensor, values: Tensor) -> Tensor:
        coordinates = space.encode(there)
        if values.shape[1] not in (1, coordinates.shape[1]):
            raise SteeringError(
                f"the values are of {values.shape[1]} coordinates, and {space} has "
                f"{coordinates.shape[1]}"
            )
        values = values.to(coordinates.dtype).expand_as(coordinates)
        if self.kind == "add":
            values = coordinates + values
        elif self.kind == "scale":
            values = coordinates * values
        return space.set(there, values).to(there.dtype)


def amount_of(value: Any, space: Space | None, width: int | None, label: str) -> Amount:
    """Read a value against the site that it is for.

    Args:
        value: a `Set`, `Add` or `Scale`; a number or a tensor `[batch]`, to which the coordinate of
            a subspace of rank 1 is set.
        space: the subspace of the site, if it has one.
        width: the width of the activation, or of the head; None where only a run can tell.
        label: of the site, for errors.

    Raises:
        SteeringError: it is no value for this site.
    """
    if isinstance(value, Set | Add | Scale):
        kind: Kind = "set" if isinstance(value, Set) else "add"
        if isinstance(value, Scale):
            return _read("scale", value.factor, space, width, label)
        return _read(kind, value.values, space, width, label)
    if isinstance(value, type) and issubclass(value, Set | Add | Scale):
        raise SteeringError(f"value is the class {value.__name__}: give it a value, as in Set(2.0)")
    found = _tensor(value, "value")
    if space is None:
        raise SteeringError(
            f"value {shown(value)} alone is the coordinate of a subspace, and site {label} has "
            "none: name one, by subspace=, or say what is to be done with the activation, by "
            "Set(vector), Add(vector) or Scale(number)"
        )
    if space.rank != 1:
        many = "features" if space.rank is None else f"{space.rank} coordinates"
        raise SteeringError(
            f"value {shown(value)} alone is the coordinate of a subspace of rank 1, and the one of "
            f"site {label} has {many}: give a Set, an Add or a Scale"
        )
    if found.ndim > 1:
        raise SteeringError(
            f"value alone must be a number or a tensor [batch], got {list(found.shape)}"
        )
    return _read("set", value, space, width, label)


def _read(kind: Kind, given: Any, space: Space | None, width: int | None, label: str) -> Amount:
    name = {"set": "the values of Set", "add": "the values of Add", "scale": "the factor of Scale"}
    what = name[kind]
    values = _tensor(given, what)
    shape = list(values.shape)
    if space is None:
        if kind == "scale":
            if values.ndim:
                raise SteeringError(
                    f"{what} must be a number where the site {label} has no subspace, got {shape}"
                )
            return Amount(kind, values[None, None], None)
        if not values.ndim:
            raise SteeringError(
                f"{what} must be a vector [width] where the site has no subspace, got "
                f"{shown(given)}: name a subspace of site {label}, by subspace=, or give a vector"
                + (f", such as torch.full([{width}], {float(values.detach()):g})" if width else "")
            )
        return Amount(kind, _rows(values, width, what, f"site {label}", "width"), None)
    if not values.ndim:
        return Amount(kind, values[None, None], space)
    if values.ndim == 1 and space.rank == 1:
        values = values[:, None]
    return Amount(kind, _rows(values, space.rank, what, str(space), "rank"), space)


def _rows(values: Tensor, size: int | None, what: str, owner: str, name: str) -> Tensor:
    """Values as `[1 or batch, size]`, or `SteeringError`."""
    known = name if size is None else f"{name} = {size}"
    if values.ndim > 2 or 0 in values.shape or values.shape[-1] != (size or values.shape[-1]):
        every = ", [batch]" if size == 1 else ""
        raise SteeringError(
            f"{what} for {owner} must have the shape [{known}]{every} or [batch, {known}], got "
            f"{list(values.shape)}"
        )
    return values if values.ndim == 2 else values[None]


def _tensor(given: Any, what: str) -> Tensor:
    """Numbers as a tensor, with the graph that they have; or `SteeringError`."""
    if isinstance(given, Tensor):
        if not has_numbers(given):
            raise SteeringError(
                f"{what} has no numbers that can be read: it is on {where_of(given)}"
            )
        values = given
    else:
        values = _made(given, what)
    if values.is_complex() or values.dtype == torch.bool:
        raise SteeringError(f"{what} must be real numbers, got {values.dtype}")
    values = values if values.is_floating_point() else values.double()
    if not bool(values.detach().isfinite().all()):
        raise SteeringError(f"{what} must be finite, got {shown(given)}")
    return values


def _made(given: Any, what: str) -> Tensor:
    numbers = given if isinstance(given, int | float | np.number | np.ndarray) else listed(given)
    try:
        array = None if numbers is None else np.asarray(numbers)
    except (TypeError, ValueError, RuntimeError):
        array = None
    if array is None or array.dtype.kind not in "iufb" or isinstance(given, str | bytes | dict):
        raise SteeringError(f"{what} must be a number, or a tensor of them, got {shown(given)}")
    kind = array.dtype if array.dtype.kind == "b" else np.float64
    return torch.tensor(array.astype(kind), device="cpu")
