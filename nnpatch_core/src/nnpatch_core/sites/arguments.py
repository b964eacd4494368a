"""The arguments of `Sites`, read and checked."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from nnpatch_core._arguments import listed
from nnpatch_core._integers import strict_ints
from nnpatch_core._printable import shown
from nnpatch_core.components import canonical_name
from nnpatch_core.errors import PatchingError, PositionError, SubspaceError, UnknownNameError
from nnpatch_core.plugins import find_seq_pos
from nnpatch_core.seq_pos import PlacedSeqPos, SeqPos


def ascending(
    numbers: Sequence[int] | None, what: str, error: type[PatchingError]
) -> tuple[int, ...] | None:
    """In execution order, whatever order they were named in."""
    return None if numbers is None else tuple(sorted(strict_ints(numbers, what, error)))


def layers_of(spaces: Any, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The layers that are swept: those that have a space of their own, where each has one."""
    if not isinstance(spaces, Mapping):
        return layers
    lacking = sorted(set(layers or ()) - set(spaces))
    if lacking:
        raise SubspaceError(
            f"subspace= has none for layers {lacking}; it has those of layers {sorted(spaces)}"
        )
    return tuple(sorted(spaces)) if layers is None else layers


def named_components(names: Any) -> tuple[str, ...]:
    """Names of components, or one, as they were asked for.

    Raises:
        UnknownNameError: they are none, or one component is named twice.
    """
    given = (names,) if isinstance(names, str) else listed(names)
    if given is None:
        raise UnknownNameError(f"site_names must be component names, got {shown(names)}")
    if not given:
        raise UnknownNameError("site_names is empty; name at least one component")
    for name in given:
        if not isinstance(name, str):
            raise UnknownNameError(f"a component is named by a string, got {shown(name)}")
    canonical = [canonical_name(name) for name in given]
    for name in canonical:
        if canonical.count(name) > 1:
            raise UnknownNameError(f"site_names names {name!r} more than once: {list(given)}")
    return given


def strategy_of(seq_pos_type: Any, seq_pos: Any, source: Any = None) -> SeqPos | PlacedSeqPos:
    """The strategy that the arguments of `Sites` stand for.

    Raises:
        UnknownNameError: `seq_pos_type` is none.
        PositionError: the others do not go with it.
    """
    if isinstance(seq_pos_type, str) or seq_pos_type is None:
        return make_strategy("all" if seq_pos_type is None else seq_pos_type, seq_pos, source)
    if isinstance(seq_pos_type, type) or not isinstance(seq_pos_type, SeqPos | PlacedSeqPos):
        raise UnknownNameError(
            f"seq_pos_type must be a strategy, the name of one or None, got {shown(seq_pos_type)}"
        )
    for name, value in (("seq_pos", seq_pos), ("source_seq_pos", source)):
        if value is not None:
            raise PositionError(
                f"{name}={shown(value)} means nothing beside the strategy object "
                f"{shown(seq_pos_type)}"
            )
    return seq_pos_type


def make_strategy(name: str, seq_pos: Any = None, source: Any = None) -> SeqPos | PlacedSeqPos:
    """The strategy that `seq_pos_type=name, seq_pos=seq_pos, source_seq_pos=source` stands for.

    Raises:
        UnknownNameError: no such strategy.
        PositionError: an argument is missing, malformed, or given where it means nothing.
    """
    factory = find_seq_pos(name)
    parameters = inspect.signature(factory).parameters
    named = "None" if name == "all" else repr(name)
    if seq_pos is None and any(each.default is each.empty for each in parameters.values()):
        raise PositionError(f"seq_pos_type={named} needs seq_pos=")
    if seq_pos is not None and not parameters:
        raise PositionError(f"seq_pos={shown(seq_pos)} means nothing with seq_pos_type={named}")
    given = [] if seq_pos is None else [seq_pos]
    if source is not None:
        if "source" not in parameters:
            raise PositionError(
                f"source_seq_pos={shown(source)} means nothing with seq_pos_type={named}: it goes "
                "with 'custom' and 'custom_constant'"
            )
        given.append(source)
    strategy = factory(*given)
    if not isinstance(strategy, SeqPos | PlacedSeqPos):
        raise PositionError(f"seq_pos_type={named} stands for {strategy!r}, which is no strategy")
    return strategy
