"""Cropping: lines that show nothing are left out of all panels alike."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import attrs

from nnpatch_core._ranges import ranges
from nnpatch_core.results.pictures.layout import are_wide
from nnpatch_core.results.pictures.panels import Panel

#: The longest text at a column.
_LETTERS = 24


@attrs.frozen(eq=False)
class Lines:
    """The places of an axis that panels share, as lines across them.

    Args:
        labels: a label for each.
        idle: for each the reason why it shows nothing in any panel; empty where it shows something.
        chosen: those that the user wants, in order; None leaves it to the picture.
    """

    labels: tuple[str, ...]
    idle: tuple[str, ...]
    chosen: Collection[int] | None = None

    @property
    def used(self) -> list[int]:
        """The places that show something; all of them where none does."""
        if self.chosen is not None:
            return list(self.chosen)
        every = range(len(self.labels))
        return [place for place in every if not self.idle[place]] or list(every)

    def left_out(self, what: str, kept: Collection[int]) -> list[str]:
        """The lines that are not kept, in words, with the reasons; of those that were chosen, all.

        Args:
            what: the word for one of them.
            kept: those that the panels show.
        """
        if self.chosen is not None:
            return []
        out = sorted(set(range(len(self.labels))) - set(kept))
        words = []
        for why in dict.fromkeys(self.idle[number] for number in out if self.idle[number]):
            numbers = [number for number in out if self.idle[number] == why]
            several = f"{what} {{}} is" if len(numbers) == 1 else f"{what}s {{}} are"
            words.append(f"{several.format(ranges(numbers))} left out: {why}")
        return words


def cropped(
    panels: Sequence[Panel], layers: Lines, positions: Lines, crop: bool | None
) -> tuple[Sequence[Panel], list[str]]:
    """The panels without the layers and positions that show nothing, and notes of these.

    Args:
        panels: the panels.
        layers: the layers of the model, for the panels that have them.
        positions: the positions of the prompts, for the panels that have them.
        crop: True leaves out, False does not; None leaves positions out where there is no room, and
            layers where most show nothing.
    """
    panels, below = _without_layers(panels, layers, crop)
    panels, beside = _without_positions(panels, positions, crop)
    return panels, [*beside, *below]


def _without_layers(
    panels: Sequence[Panel], layers: Lines, crop: bool | None
) -> tuple[Sequence[Panel], list[str]]:
    count, used = len(layers.labels), layers.used
    if layers.chosen is None and not crop and (crop is False or 2 * len(used) >= count):
        return panels, []
    return [each.keep_layers(used) for each in panels], layers.left_out("layer", used)


def _without_positions(
    panels: Sequence[Panel], positions: Lines, crop: bool | None
) -> tuple[Sequence[Panel], list[str]]:
    if not any(each.positions for each in panels):
        return panels, []
    count, wide = len(positions.labels), are_wide(panels)
    kept = list(range(count))
    if crop or positions.chosen is not None or (crop is None and wide):
        kept = positions.used
    if not wide and len(kept) == count:
        return panels, []
    # Not all columns are there or have room for a label, so that each label says its position.
    labels = [at_position(number, token) for number, token in enumerate(positions.labels)]
    shown = [each.keep_positions(kept, labels) for each in panels]
    return shown, positions.left_out("position", kept)


def at_position(number: int, token: str) -> str:
    """The label of a position where not all are there."""
    return f"{number} {short(token)}"


def short(text: str, letters: int = _LETTERS) -> str:
    """A label, cut where it is too long."""
    return text if len(text) <= letters else f"{text[: letters - 1]}…"
