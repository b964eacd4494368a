"""A sweep that is killed goes on from its checkpoint, and from no other sweep's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nnpatch_core import MetricContext, Outcome, Sites, ablation_patching, reads_tokens
from nnpatch_core.errors import CheckpointError
from nnpatch_core.testing import tiny_api, tiny_model, traces
from tests.helpers.checkpoints import ANSWERS, BUDGET, SITES, TARGET, numbers, sweep
from tests.helpers.engines import from_the_middle
from tests.helpers.faults import broken_after
from tests.helpers.killed import killed
from tests.helpers.paths import ROOT

#: Large enough for all prompts at once.
LARGE = 10_000_000


SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {folder!r})
from tests.helpers.checkpoints import sweep
from tests.helpers.faults import slow_down
slow_down(0.05)
sweep({path!r})
print("finished")
"""


def test_survives_being_killed_more_than_once(tmp_path: Path) -> None:
    path = tmp_path / "sweep.ckpt"
    model = tiny_model("llama")
    with traces(model) as seen:
        unbroken = sweep(model=model)
    whole = len(from_the_middle(seen))
    code = SCRIPT.format(folder=str(ROOT), path=str(path))
    before = 0
    for _ in range(2):
        now = killed(code, path, before)
        assert before < now < unbroken.patched("q").numel() * 4
        before = now
    with traces(model) as seen:
        resumed = sweep(path, model)
    assert 0 < len(from_the_middle(seen)) < whole - 1
    assert numbers(resumed).equal(numbers(unbroken))
    for name in unbroken:
        assert resumed.cells[name].elided.equal(unbroken.cells[name].elided)
    # Only the file itself is left, and it has all of the sweep.
    assert [each.name for each in tmp_path.iterdir()] == ["sweep.ckpt"]
    with traces(model) as seen:
        assert numbers(sweep(path, model)).equal(numbers(unbroken))
    assert seen
    assert from_the_middle(seen) == []


@pytest.mark.parametrize("stop", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"metric": "kl_divergence"}])
def test_resumes_bitwise_wherever_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, options: dict[str, Any]
) -> None:
    unbroken = sweep(**options)
    mend = broken_after(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "c", **options)
    mend()
    assert numbers(sweep(tmp_path / "c", **options)).equal(numbers(unbroken))


def test_full_engine_resumes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = sweep(engine="full")
    mend = broken_after(monkeypatch, 7, "full")
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "c", engine="full")
    mend()
    model = tiny_model("llama")
    with traces(model) as seen:
        assert numbers(sweep(tmp_path / "c", model, engine="full")).equal(numbers(unbroken))
    # Once more, now that nothing is left to do: the unpatched runs.
    with traces(model) as unpatched:
        sweep(tmp_path / "c", model, engine="full")
    # Each cell of each prompt, as the budget lets one prompt run at a time, but for the seven.
    cells = sum(len(cells.index) for cells in unbroken.cells.values())
    assert len(seen) - len(unpatched) == 3 * cells - 7


@pytest.mark.parametrize("method", ["zero", "mean", "resample"])
def test_ablation_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def ablate(path: Path | None) -> Outcome:
        return ablation_patching(
            tiny_model("llama"),
            tiny_api(),
            SITES,
            TARGET,
            *ANSWERS,
            method=method,
            memory_budget=BUDGET,
            checkpoint=path,
            progress=False,
        )

    unbroken = ablate(None)
    mend = broken_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        ablate(tmp_path / "c")
    mend()
    assert numbers(ablate(tmp_path / "c")).equal(numbers(unbroken))


def test_default_budget_is_that_of_the_first_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnpatch_core.memory import limits

    first = sweep(tmp_path / "c", memory_budget=None)
    monkeypatch.setattr(limits, "memory_budget", lambda given, model: given or BUDGET)
    again = sweep(tmp_path / "c", memory_budget=None)
    assert numbers(again).equal(numbers(first))


def other_model() -> Any:
    model = tiny_model("llama")
    with torch.no_grad():
        # The smallest change there is, of one weight that the answers do not depend on.
        weight = model.lm_head.weight
        weight[50, 0] = torch.nextafter(weight[50, 0], torch.tensor(9.0))
    return model


@reads_tokens(lambda context: context.source_answer_index[:, None])
def source_logit(logits: Tensor, context: MetricContext) -> torch.Tensor:
    return logits.gather(1, context.source_answer_index[:, None])[:, 0]


def target_logit(logits: Tensor, context: Any) -> Tensor:
    return logits.gather(1, context.target_answer_index[:, None])[:, 0]


target_logit.__name__ = "source_logit"

DIFFERENT = {
    "model": {"model": other_model},
    "source prompts": {"source": TARGET.flip(0)},
    "answers": {"answers": (ANSWERS[0], torch.tensor([4, 5, 7]))},
    "sites": {"sites": Sites(["q", "v", "mlp", "resid"], layers=[0, 1], seq_pos_type="each")},
    "metric": {"metric": "kl_divergence"},
    "engine": {"engine": "cone"},
    "prompts at once": {"batch_size": 2},
    "memory_budget": {"memory_budget": LARGE + 1},
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_sweep_is_refused_and_nothing_is_lost(tmp_path: Path, what: str) -> None:
    sweep(tmp_path / "c", memory_budget=LARGE)
    before = (tmp_path / "c").read_bytes()
    changed = {key: value() if callable(value) else value for key, value in DIFFERENT[what].items()}
    changed.setdefault("memory_budget", LARGE)
    with pytest.raises(CheckpointError, match=f"another sweep .*{what}: .* then, .* now"):
        sweep(tmp_path / "c", **changed)
    assert (tmp_path / "c").read_bytes() == before


def test_two_metrics_of_one_name_are_told_apart(tmp_path: Path) -> None:
    sweep(tmp_path / "c", metric=source_logit)
    with pytest.raises(CheckpointError, match="metric: source_logit"):
        sweep(tmp_path / "c", metric=target_logit)


OTHER_SEED = 2


def test_another_method_of_ablation_is_refused(tmp_path: Path) -> None:
    arguments = (tiny_model("llama"), tiny_api(), SITES, TARGET, *ANSWERS)
    options = {"checkpoint": tmp_path / "c", "progress": False}
    ablation_patching(*arguments, method="resample", seed=0, **options)
    # Of three prompts there are two cycles; this seed draws the other.
    with pytest.raises(CheckpointError, match="reference: "):
        ablation_patching(*arguments, method="resample", seed=OTHER_SEED, **options)
    with pytest.raises(CheckpointError, match=r"kind: ablation \(resample\) then, ablation \(mean"):
        ablation_patching(*arguments, method="mean", **options)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x02\0\0\0\0\0\0\0{}"])
def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        sweep(tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == content


def test_an_outcome_is_no_checkpoint(tmp_path: Path) -> None:
    sweep().save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="not a checkpoint of this version"):
        sweep(tmp_path / "c")


@pytest.mark.parametrize(
    ("place", "told"), [("", "is not a file: it is a folder"), ("missing/c", "there is no folder")]
)
def test_a_place_where_none_can_be_is_refused_before_anything_runs(
    tmp_path: Path, place: str, told: str
) -> None:
    model = tiny_model("llama")
    with traces(model) as seen, pytest.raises(CheckpointError, match=told):
        sweep(tmp_path / place, model)
    assert seen == []
