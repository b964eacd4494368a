"""Engines are rows of a table: `auto` takes the first without a reason against it, then the next.

A plan is of the sweep that runs, in the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nnpatch_core import Outcome, Site, Sites, activation_patching, plan_sweep
from nnpatch_core._arrays import Booleans
from nnpatch_core.engine import Execution, Part, table
from nnpatch_core.engine.full import FullExecution, open_full
from nnpatch_core.errors import EngineError, EngineWarning, MemoryBudgetError, UnknownNameError
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.oracle import COMPONENTS

SOURCE = torch.tensor([[5, 6, 7, 8], [5, 6, 4, 8]])
TARGET = torch.tensor([[5, 9, 7, 8], [5, 3, 4, 8]])
ANSWERS = torch.tensor([20, 21]), torch.tensor([30, 31])
SITES = Sites(["resid", "mlp"], seq_pos_type="each")


@attrs.frozen(eq=False)
class Breaking(FullExecution):
    """A full engine that fails after some cells."""

    def parts(self, done: Booleans, columns: Tensor | None) -> Iterator[Part]:
        for number, part in enumerate(super().parts(done, columns)):
            if number == 2:
                raise EngineError("it stops in the middle")
            yield part


def breaking(*given: Any) -> Execution:
    opened = open_full(*given)
    return Breaking(*(getattr(opened, each.name) for each in attrs.fields(FullExecution)))


def closed(*given: Any) -> Execution:
    raise EngineError("it does not open")


def never(_: Any) -> None:
    return None


def swept(engine: str) -> Outcome:
    return activation_patching(
        tiny_model("llama"), tiny_api(), SITES, SOURCE, TARGET, *ANSWERS, engine=engine,
        progress=False,
    )  # fmt: skip


def row(name: str, opener: Any, why_not: Any = never) -> table.Engine:
    return table.Engine(name, why_not, never, opener)


def test_the_next_engine_goes_on_where_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, last = swept("full"), table.ENGINES[-1]
    rows = (
        row("unfit", open_full, lambda _: "it is not for this"),
        row("closed", closed),
        row("breaking", breaking),
        row("unfit too", closed, lambda _: "nor is this"),
        last,
    )
    monkeypatch.setattr(table, "ENGINES", rows)
    with pytest.warns(EngineWarning, match="it is not for this; it does not open") as warned:
        out = swept("auto")
    assert len(warned) == 1
    assert out.info["engine"] == "full"
    reasons = "it is not for this; it does not open; it stops in the middle"
    assert out.info["fallback"] == reasons
    for name in whole:
        assert torch.equal(out.patched(name), whole.patched(name))
    with pytest.raises(EngineError, match="'unfit' cannot run this sweep: it is not for this"):
        swept("unfit")
    with pytest.raises(EngineError, match="it stops in the middle"):
        swept("breaking")
    with pytest.raises(UnknownNameError, match="auto, unfit, closed, breaking, unfit too, full"):
        swept("cone")


def refusal(call: Callable[[], object]) -> str:
    """Why the budget does not do; "" if it does."""
    try:
        call()
    except MemoryBudgetError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("budget", range(80_000, 200_000, 8_000))
@pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")
def test_a_plan_is_cut_like_the_sweep(budget: int) -> None:
    """Where some places meet padding alone, too: they count before they are left out."""
    tokens = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    source, target = tokens[:1], tokens[1:]
    mask = torch.ones_like(source)
    mask[0, :4] = 0
    api, model = tiny_api(), tiny_model("llama")
    first = [Site.get_site(api, name, layer, None, [0]) for name in COMPONENTS for layer in (0, 1)]
    sites = Sites.from_sites([*first, Site.get_site(api, "mlp", 1, None, [-1])])
    given = {"attention_mask": mask, "memory_budget": budget}
    answers = torch.tensor([20]), torch.tensor([30])

    def swept() -> Outcome:
        return activation_patching(
            model, api, sites, source, target, *answers, progress=False, **given
        )

    def planned() -> object:
        return plan_sweep(model, api, sites, source, target, **given)

    assert refusal(planned) == refusal(swept)
