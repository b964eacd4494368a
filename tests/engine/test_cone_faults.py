"""The cone engine with faults planted in it: each shows, or is found before there is an outcome."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nnpatch_core import Outcome, Sites
from nnpatch_core.engine.cone import ascent, controls, entries, target, unembedding
from nnpatch_core.errors import EngineError, EngineWarning
from nnpatch_core.tracing import trace
from tests.helpers.engines import check_cone, cut_by, gap_of
from tests.helpers.oracle import COMPONENTS, random_prompts
from tests.helpers.pairs import LAYERS, Pairs

#: Padding is what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

Plant = Callable[[pytest.MonkeyPatch], None]
PLANTS: dict[str, Plant] = {}
#: Which of them an unpatched row can show.
SEEN_UNPATCHED: list[str] = []


def fault(name: str, *, unpatched: bool = False) -> Callable[[Plant], Plant]:
    def planted(plant: Plant) -> Plant:
        PLANTS[name] = plant
        if unpatched:
            SEEN_UNPATCHED.append(name)
        return plant

    return planted


def other_prefix(patch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    prefix = ascent.prefix
    patch.setattr(ascent, "prefix", lambda *given: prefix(*change(*given)))


def other_ascent(patch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    start = ascent.Ascent.__init__

    def changed(self: Any, *given: Any) -> None:
        start(self, *given)
        change(self)

    patch.setattr(ascent.Ascent, "__init__", changed)


def other_arguments(patch: pytest.MonkeyPatch, change: Callable[..., None]) -> None:
    """Of forwards that run from the middle."""
    arguments = trace.forward_arguments

    def changed(model: Any, batch: Any, cache: Any = None, start: int = 0) -> dict[str, Any]:
        found = arguments(model, batch, cache, start)
        if start:
            change(found, start)
        return found

    patch.setattr(trace, "forward_arguments", changed)


def other_edits(patch: pytest.MonkeyPatch, **changes: Callable[[Any], Any]) -> None:
    of_bucket = ascent.edits_of

    def changed(*given: Any) -> Any:
        found = of_bucket(*given)
        return {
            stage: [
                attrs.evolve(edit, **{key: f(getattr(edit, key)) for key, f in changes.items()})
                for edit in several
            ]
            for stage, several in found.items()
        }

    patch.setattr(ascent, "edits_of", changed)


def other_tokens(patch: pytest.MonkeyPatch, **changes: Callable[[Tensor], Tensor]) -> None:
    def change(tokens: Any) -> Any:
        return attrs.evolve(tokens, **{key: f(getattr(tokens, key)) for key, f in changes.items()})

    other_edits(patch, tokens=change)


@fault("the prefix ends a token early")
def _(patch: pytest.MonkeyPatch) -> None:
    other_prefix(patch, lambda kept, start, prompts: (kept, max(start - 1, 0), prompts))


@fault("the prefix ends a token late")
def _(patch: pytest.MonkeyPatch) -> None:
    other_prefix(patch, lambda kept, start, prompts: (kept, start + 1, prompts))


@fault("the prefix is that of the token before", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    def change(kept: Any, start: int, prompts: Any) -> Any:
        moved = [(keys.roll(1, 2), values.roll(1, 2)) for keys, values in kept]
        return moved, start, prompts

    other_prefix(patch, change)


@fault("keys of the wrong prompt", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    def change(kept: Any, start: int, prompts: list[Tensor]) -> Any:
        return kept, start, [each.roll(1) for each in prompts]

    other_prefix(patch, change)


@fault("keys and values swapped between layers", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    other_prefix(patch, lambda kept, start, prompts: (kept[::-1], start, prompts))


@fault("rows enter as the wrong prompt", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    def change(self: Any) -> None:
        self.prompts = self.prompts.roll(1)
        self.entries = entries.Entries(self.target, self.start, self.prompts, self.present)

    other_ascent(patch, change)


@fault("masks and positions of the wrong prompt", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    other_ascent(patch, lambda self: setattr(self, "which", self.which.roll(1)))


@fault("rows enter a stage late")
def _(patch: pytest.MonkeyPatch) -> None:
    def change(self: Any) -> None:
        self.present = [0, *self.present[:-1]]
        self.entries = entries.Entries(self.target, self.start, self.prompts, self.present)

    other_ascent(patch, change)


def other_entries(patch: pytest.MonkeyPatch, change: Callable[[int, int], int]) -> None:
    """Rows enter as another layer, of which something is kept, has them."""
    recorded = entries.Entries._recorded

    def changed(self: Any, number: int) -> Tensor:
        layer, after = divmod(number, 2)
        return recorded(self, 2 * change(layer, LAYERS - 1) + after)

    patch.setattr(entries.Entries, "_recorded", changed)


@fault("rows enter as the layer before")
def _(patch: pytest.MonkeyPatch) -> None:
    other_entries(patch, lambda layer, _: max(layer - 1, 0))


@fault("rows enter as the layer after", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    other_entries(patch, lambda layer, last: min(layer + 1, last))


@fault("padding is not masked", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    def change(found: dict[str, Any], start: int) -> None:
        found["attention_mask"] = torch.ones_like(found["attention_mask"])

    other_arguments(patch, change)


@fault("positions begin anew", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    def change(found: dict[str, Any], start: int) -> None:
        found["position_ids"] = found["position_ids"] - found["position_ids"][:, :1]

    other_arguments(patch, change)


@fault("positions count padding", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    def change(found: dict[str, Any], start: int) -> None:
        count = found["position_ids"].shape[1]
        found["position_ids"] = torch.arange(start, start + count).expand_as(found["position_ids"])

    other_arguments(patch, change)


@fault("edits of the row before")
def _(patch: pytest.MonkeyPatch) -> None:
    other_tokens(patch, rows=lambda rows: (rows - 1).clamp(min=0))


@fault("edits of the token after")
def _(patch: pytest.MonkeyPatch) -> None:
    other_tokens(patch, positions=lambda positions: (positions + 1).clamp(max=FAULTY.width - 1))


@fault("values of the wrong prompt")
def _(patch: pytest.MonkeyPatch) -> None:
    other_tokens(patch, prompts=lambda prompts: (prompts + 1) % 3)


@fault("values of the wrong head")
def _(patch: pytest.MonkeyPatch) -> None:
    other_edits(patch, heads=lambda heads: None if heads is None else 1 - heads)


@fault("no edits inside of a layer")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ascent.Ascent, "_edit_inside", lambda self, traced, layer: None)


@fault("elided though something differs")
def _(patch: pytest.MonkeyPatch) -> None:
    differs = target.differs

    def changed(*given: Any) -> Any:
        found = differs(*given).clone()
        found[1, -1] = False
        return found

    patch.setattr(target, "differs", changed)


@fault("columns in another order", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    restrict = unembedding.Unembedding.restrict
    patch.setattr(
        unembedding.Unembedding,
        "restrict",
        lambda self, traced, ids: restrict(self, traced, ids.flip(0)),
    )


@fault("logits of the row before", unpatched=True)
def _(patch: pytest.MonkeyPatch) -> None:
    run = ascent.Ascent.run
    patch.setattr(ascent.Ascent, "run", lambda self: run(self).roll(1, 0))


#: Padded prompts, and none that sees all of its prefix as another one does.
FAULTY = Pairs("llama", random_prompts((9, 6, 8), seed=1), random_prompts((9, 6, 8), seed=2))
FAULTY_SITES = Sites(COMPONENTS, seq_pos_type="custom", seq_pos=[-1, -2, -4, -5], heads=[0, 1])


@functools.cache
def without_fault() -> Outcome:
    return FAULTY.sweep(FAULTY_SITES, "full")


def test_without_a_fault_there_is_no_gap() -> None:
    with cut_by(0.0, 2048):
        check_cone(FAULTY.sweep(FAULTY_SITES, "cone"), without_fault())


@pytest.mark.parametrize("name", PLANTS)
def test_a_fault_shows_against_whole_forwards(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no unpatched row that could have seen it first."""
    monkeypatch.setattr(controls, "rounding", lambda weight: float("inf"))
    PLANTS[name](monkeypatch)
    with cut_by(0.0, 2048):
        try:
            found = FAULTY.sweep(FAULTY_SITES, "cone")
        except EngineError:
            return
    assert gap_of(found, without_fault()) > 1e-3


@pytest.mark.parametrize("name", SEEN_UNPATCHED)
def test_a_fault_that_an_unpatched_row_sees_is_no_outcome(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    PLANTS[name](monkeypatch)
    with cut_by(0.0, 2048):
        with pytest.raises(EngineError, match="gives other logits than run as a whole"):
            FAULTY.sweep(FAULTY_SITES, "cone")
        with pytest.warns(EngineWarning, match="gives other logits than run as a whole"):
            out = FAULTY.sweep(FAULTY_SITES, "auto")
    assert out.info["engine"] == "full"
    assert "gives other logits than run as a whole: off by" in out.info["fallback"]
    assert gap_of(out, without_fault()) == 0
    assert not any(out.cells[name].elided.any() for name in out)
