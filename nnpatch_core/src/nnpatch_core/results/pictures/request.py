"""The arguments of a picture, read once and without trust."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, cast, get_args

import attrs

from nnpatch_core._arguments import check_flags, listed
from nnpatch_core._integers import strict_int
from nnpatch_core._printable import shown
from nnpatch_core.errors import OutcomeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The kinds of pictures of an outcome.
PictureKind: TypeAlias = Literal["heatmap", "lines", "bars"]
#: The widest and highest picture that is drawn, in inches.
_LARGEST = 200.0
#: Inches: what stands above and below a chart.
_AROUND = 1.4


class PlotOptions(TypedDict, total=False):
    """The keywords of `Outcome.plot` that every figure takes, for type checkers."""

    sites: Sequence[str] | None
    metrics: str | Sequence[str] | None
    kind: PictureKind | None
    title: str | None
    limit: float | Literal["largest"] | None
    crop: bool | None
    layers: Sequence[int] | None
    positions: Sequence[int] | None
    size: tuple[float, float] | None
    values: bool | None
    mark: int
    mute: float | None
    ax: Axes | None


@attrs.frozen(eq=False)
class Request:
    """The arguments of a picture; see `Outcome.plot`."""

    kind: PictureKind | None
    interactive: bool
    title: str | None
    limit: float | Literal["largest"] | None
    crop: bool | None
    layers: tuple[int, ...] | None
    positions: tuple[int, ...] | None
    size: tuple[float, float] | None
    values: bool | None
    mark: int
    mute: float | None
    ax: Any

    def room(self, height: float) -> int:
        """How many lines of so many inches the user's size or axes have room for, one at least."""
        if self.ax is not None:
            inches = self.ax.get_window_extent().height / self.ax.figure.figure.dpi
        elif self.size is not None:
            inches = self.size[1] - _AROUND
        else:
            return sys.maxsize
        return max(1, int(inches / height))


def read_request(
    *,
    kind: Any,
    interactive: Any,
    title: Any,
    limit: Any,
    crop: Any,
    layers: Any,
    positions: Any,
    size: Any,
    values: Any,
    mark: Any,
    mute: Any,
    ax: Any,
) -> Request:
    """Read the arguments of a picture.

    Raises:
        OutcomeError: one of them is none, or two that exclude each other.
    """
    check_flags(interactive=interactive)
    # A list has no hash, and is no name.
    if kind is not None and (not isinstance(kind, str) or kind not in get_args(PictureKind)):
        raise OutcomeError(f"kind must be 'heatmap', 'lines', 'bars' or None, got {shown(kind)}")
    check_title(title)
    check_limit(limit, "limit")
    for name, value in (("crop", crop), ("values", values)):
        if not isinstance(value, bool | None):
            raise OutcomeError(f"{name} must be True, False or None, got {shown(value)}")
    count = strict_int(mark, "mark", OutcomeError)
    if count < 0:
        raise OutcomeError(f"mark must be at least 0, got {count}")
    if mute is not None and not (_is_number(mute) and 0 < mute < 1):
        raise OutcomeError(f"mute must be a level such as 0.95, or None, got {shown(mute)}")
    if ax is not None and (interactive or size is not None):
        other = "interactive=True" if interactive else "size="
        raise OutcomeError(f"ax= is a place in a matplotlib figure: leave out {other}")
    if ax is not None and not (hasattr(ax, "imshow") and hasattr(ax, "figure")):
        raise OutcomeError(f"ax must be the axes of a matplotlib figure, got {shown(ax)}")
    return Request(
        kind=cast(PictureKind | None, kind),
        interactive=bool(interactive),
        title=title,
        limit=limit,
        crop=crop,
        layers=_numbers(layers, "layers"),
        positions=_numbers(positions, "positions"),
        size=_size(size),
        values=values,
        mark=count,
        mute=mute,
        ax=ax,
    )


def check_title(title: Any) -> None:
    """Raise `OutcomeError` for a title that is no text."""
    if title is not None and not isinstance(title, str):
        raise OutcomeError(f"title must be a text, got {shown(title)}")


def check_limit(limit: Any, name: str) -> None:
    """Raise `OutcomeError` for what is no limit of colours."""
    if limit is None or (isinstance(limit, str) and limit == "largest"):
        return
    if not _is_number(limit) or not 0 < limit <= sys.float_info.max:
        raise OutcomeError(f"{name} must be a positive number or 'largest', got {shown(limit)}")


def chosen(asked: Sequence[int] | None, count: int, name: str) -> Collection[int] | None:
    """Those asked for of so many layers or positions; None is as the picture likes.

    Negative ones count from the end.

    Raises:
        OutcomeError: one that there is not.
    """
    if asked is None or not count:
        return None
    for number in asked:
        if not -count <= number < count:
            raise OutcomeError(f"{name} are 0 to {count - 1}, got {number}")
    return sorted({number % count for number in asked})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(asked: Any, name: str) -> tuple[int, ...] | None:
    if asked is None:
        return None
    given = listed(asked)
    if not given or isinstance(asked, str):
        raise OutcomeError(f"{name} must be numbers such as range(5, 20), got {shown(asked)}")
    return tuple(strict_int(number, name, OutcomeError) for number in given)


def _size(size: Any) -> tuple[float, float] | None:
    if size is None:
        return None
    given = listed(size)
    if (
        given is None
        or len(given) != 2
        or not all(_is_number(side) and 1 <= side <= _LARGEST for side in given)
    ):
        raise OutcomeError(
            f"size must be (width, height), each from 1 to {_LARGEST:.0f} inches, got {shown(size)}"
        )
    return (float(given[0]), float(given[1]))
