"""Pictures of learning: loss and accuracy over epochs, accuracy over layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnpatch_core.results import GUIDE, distinct, new_picture
from nnpatch_core.subspace.learning import Epoch
from nnpatch_core.subspace.proportion import Proportion

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
#: Controls whose bands would hide the others.
_PLAIN = ("random subspace", "difference of means", "random labels", "random model", "nothing")


def plot_history(history: Sequence[Epoch], best: int) -> Any:
    """Loss and accuracy over epochs, as a matplotlib figure.

    Args:
        history: the epochs.
        best: the number of the epoch that was kept.

    Raises:
        OutcomeError: matplotlib is not installed.
    """
    figure = new_picture(8.0, 3.2)
    epochs = [each.epoch for each in history]
    panels = {
        "loss [nats]": ("loss", "held_out_loss"),
        "interchange accuracy": ("accuracy", "held_out_accuracy"),
    }
    for axes, (title, (own, held)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name, label, colour in (
            (own, "learned from", GUIDE),
            (held, "held out", distinct(1)[0]),
        ):
            values = [getattr(each, name) for each in history]
            axes.plot(epochs, values, color=colour, marker="o", markersize=3, label=label)
        axes.axvline(best, color=GUIDE, linewidth=0.8, linestyle=":", label=f"kept: epoch {best}")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].set_ylim(-0.03, 1.03)
    figure.axes[0].set_ylim(bottom=0.0)
    figure.axes[1].legend(frameon=False, fontsize=8)
    return figure


def plot_layers(rows: Mapping[str, Mapping[int, Proportion]], title: str) -> Any:
    """Accuracy over layers, a line with its intervals for each of `rows`, by layer.

    Raises:
        OutcomeError: matplotlib is not installed.
    """
    figure = new_picture(7.6, 3.6)
    axes = figure.subplots()
    for number, (name, by_layer) in enumerate(rows.items()):
        colour, marker = distinct(len(rows))[number], _MARKERS[number % len(_MARKERS)]
        layers, shares = list(by_layer), list(by_layer.values())
        values = [each.value for each in shares]
        banded = name not in _PLAIN
        style = "-" if banded else ":"
        axes.plot(layers, values, style, color=colour, marker=marker, markersize=4, label=name)
        if banded:
            low, high = [each.low for each in shares], [each.high for each in shares]
            axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("layer (bands: 95 percent intervals)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("interchange accuracy")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure
