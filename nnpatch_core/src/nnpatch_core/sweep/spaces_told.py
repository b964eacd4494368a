"""The subspaces of a sweep in words: for its outcome, and for its checkpoint."""

from __future__ import annotations

from typing import Any

import attrs

from nnpatch_core.spaces import Space, Subspace
from nnpatch_core.sweep.checksum import digest
from nnpatch_core.sweep.fingerprint import Fingerprint, fingerprint
from nnpatch_core.tracing import Patches


@attrs.frozen
class SpacesTold:
    """The spaces that sites are limited to.

    Args:
        words: each of them in words, with a word for its numbers.
        number: of each space, by identity, which of them it is.
        untold: what they depend on and was not looked into.
    """

    words: tuple[str, ...]
    number: dict[int, int]
    untold: tuple[str, ...]


def spaces_told(patches: Patches) -> SpacesTold | None:
    """The spaces of a sweep, in the order in which they are met; None where there are none."""
    used = (patches.cells.spaces[number] for number in patches.cells.used("space"))
    spaces = {id(space): space for space in used if space is not None}
    if not spaces:
        return None
    told = [space_word(space) for space in spaces.values()]
    words = [
        f"{_named(space)} {each.digest}" for space, each in zip(spaces.values(), told, strict=True)
    ]
    untold = {name: None for each in told for name in each.untold}
    return SpacesTold(tuple(words), {at: number for number, at in enumerate(spaces)}, tuple(untold))


def _named(space: Space) -> str:
    """A space in words, which another process has for it too."""
    kind = type(space)
    unnamed = kind.__str__ is object.__str__ and kind.__repr__ is object.__repr__
    return kind.__name__ if unnamed else str(space)


def space_word(space: Space) -> Fingerprint:
    """A word for the numbers of a space."""
    if isinstance(space, Subspace):
        return Fingerprint(digest(*space_parts(space)), ())
    return fingerprint(space)


def space_parts(space: Space | None) -> tuple[Any, ...]:
    """The parts of a space that its numbers depend on; of one of another's making, itself."""
    if isinstance(space, Subspace):
        return (space.basis,) if space.mean is None else (space.basis, space.mean)
    return (space,)
