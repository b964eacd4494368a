"""A sweep by workers of Ray is the sweep of one process: its numbers, errors and warnings."""

from __future__ import annotations

import re
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnpatch_core import (
    EdgeOutcome,
    PromptPairs,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    cache_average,
    edge_patching,
    plan_sweep,
)
from nnpatch_core.circuits import find_circuit
from nnpatch_core.errors import (
    AdapterError,
    CheckpointError,
    CheckpointWarning,
    LayerError,
    MemoryBudgetError,
    MetricError,
    PatchingError,
    PositionError,
    TokensError,
    WorkerError,
)
from nnpatch_core.scale import RayWorkers, job, measure_shard
from nnpatch_core.subspace import train_subspace
from nnpatch_core.testing import tiny_api, tiny_model, traces
from tests.helpers.checkpoints import BUDGET, SITES, SOURCE, TARGET, done, numbers, sweep
from tests.helpers.engines import from_the_middle
from tests.helpers.samples import THREE
from tests.helpers.scene import Scene
from tests.helpers.shards import SWEEPS, measured, swept

ANSWERS = THREE.answers
ONES = torch.ones_like(SOURCE)
#: Of the estimates some, each of which is cut in another way.
SOME = ("attributed, joint", "integrated, chunks", "AtP*", "eap, all prompts", "eap-ig-activations")
PAIRS = PromptPairs((), (), SOURCE, TARGET, ONES, ONES, *ANSWERS, None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*SWEEPS, *SOME])
def test_workers_give_the_outcome_of_one_process(kind: str, pool: RayWorkers) -> None:
    one, two = swept(kind), swept(kind, pool)
    assert numbers(two).equal(numbers(one))
    for name, cells in one.cells.items():
        assert two.cells[name].elided.equal(cells.elided)
        assert two.cells[name].present.equal(cells.present)
        assert two.cells[name].exact.equal(cells.exact)
    own = {"started", "seconds", "environment"}
    assert two.info["workers"] == "2 of Ray"
    assert {k: v for k, v in two.info.items() if k not in {*own, "workers"}} == {
        k: v for k, v in one.info.items() if k not in own
    }
    assert 0 < float(two.info["seconds"]) < 600
    assert two.info["environment"] == one.info["environment"]


@settings(
    deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_any_sites_and_padding(pool: RayWorkers, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(["q", "k", "o", "mlp", "resid"]), min_size=1))
    kind = data.draw(st.sampled_from(["each", "last", "all"]))
    pads = data.draw(st.lists(st.integers(0, 3), min_size=3, max_size=3))
    mask = (torch.arange(6) >= torch.tensor(pads)[:, None]).long()
    options = {
        "attention_mask": mask,
        "batch_size": data.draw(st.sampled_from([None, 1, 2])),
        "memory_budget": data.draw(st.sampled_from([BUDGET, "1 GiB"])),
        "keep": data.draw(st.sampled_from(["prompts", "means"])),
        "progress": False,
    }
    call = (tiny_api(), Sites(list(dict.fromkeys(names)), seq_pos_type=kind), SOURCE, TARGET)
    one = activation_patching(tiny_model("llama"), *call, *ANSWERS, **options)
    two = activation_patching(pool, *call, *ANSWERS, **options)
    assert all(one[name].nan_to_num(9.0).equal(two[name].nan_to_num(9.0)) for name in one)


@pytest.mark.parametrize("order", ["", "exhausted"])
@pytest.mark.filterwarnings("ignore")
def test_prompts_in_chunks_run_unpatched_once_for_all_workers(
    pool: RayWorkers, scene: Scene, order: str
) -> None:
    options: dict[str, Any] = {"batch_size": 1, "memory_budget": "1 GiB", "progress": False}
    call = (tiny_api(), SITES, SOURCE, TARGET, *ANSWERS)
    if order:
        scene.order(order)
    two = activation_patching(pool, *call, **options)
    # A source run and a target run of each; what a lost worker had begun is run again.
    once = 2 * len(SOURCE)
    ran = scene.pids("unpatched")
    assert len(ran) == once if not order else once <= len(ran) < 2 * once
    assert order or len({*ran}) == 2
    assert scene.pids("unpatched again") == []
    one = activation_patching(tiny_model("llama"), *call, **options)
    assert all(one[name].equal(two[name]) for name in one)


@pytest.mark.filterwarnings("ignore")
def test_prompts_that_run_together_are_their_own_unpatched_runs(
    pool: RayWorkers, scene: Scene
) -> None:
    activation_patching(
        pool, tiny_api(), SITES, SOURCE, TARGET, *ANSWERS, memory_budget="1 GiB", progress=False
    )
    assert scene.pids("unpatched") == scene.pids("unpatched again") == []


def test_one_worker_after_the_other_and_by_keyword(pool: RayWorkers) -> None:
    out = activation_patching(
        nnmodel=pool, api=tiny_api(), sites=SITES, source_tokens=PAIRS, memory_budget=BUDGET,
        progress=False,
    )  # fmt: skip
    assert numbers(out).equal(numbers(sweep()))


def test_the_budget_is_that_of_the_pool(pool: RayWorkers) -> None:
    one = swept("activation", memory_budget=2**40)
    assert numbers(swept("activation", pool, memory_budget=None)).equal(numbers(one))


def closure(weight: float) -> Callable[..., Any]:
    def metric(logits: torch.Tensor, context: Any) -> torch.Tensor:
        return weight * logits.gather(-1, context.source_answer_index[:, None])[:, 0]

    return metric


def test_a_metric_of_this_process_goes_along(pool: RayWorkers) -> None:
    metric = closure(2.5)
    one = swept("activation", metric=metric)
    assert numbers(swept("activation", pool, metric=metric)).equal(numbers(one))


def test_what_is_not_compared_is_not_told_of_a_file_that_nobody_knows(pool: RayWorkers) -> None:
    class Weights:
        value = 2.0

    weights = Weights()

    def metric(logits: torch.Tensor, context: Any) -> torch.Tensor:
        return weights.value * logits.gather(-1, context.source_answer_index[:, None])[:, 0]

    one = swept("activation", metric=metric)
    # Warnings are errors here.
    assert numbers(swept("activation", pool, metric=metric)).equal(numbers(one))


def test_warnings_arrive_once(pool: RayWorkers) -> None:
    tokens = SOURCE.clone(), TARGET.clone()
    for each in tokens:
        each[:, 0] = 0
    call = (tiny_api(), SITES, *tokens, *ANSWERS)
    found = []
    for model in (tiny_model("llama"), pool):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            activation_patching(
                model, *call, metric={"a": closure(1.0)}, memory_budget=BUDGET, progress=False
            )
        found.append([(each.category, str(each.message)) for each in caught])
    assert found[0] == found[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        swept("padded", pool)
    assert len(caught) == 1
    assert caught[0].filename.endswith("shards.py"), "it points at the user's line"


FAULTS: dict[str, tuple[dict[str, Any], type[PatchingError], str]] = {
    "tokens": ({"source": SOURCE[:, :4]}, TokensError, "4"),
    "layer": ({"sites": Sites("resid", [7])}, LayerError, "7"),
    "budget": ({"memory_budget": "much"}, MemoryBudgetError, "much"),
    "too small": ({"memory_budget": 100}, MemoryBudgetError, "100"),
    "engine": (
        {"sites": Sites("resid_pre"), "engine": "cones"},
        PatchingError,
        "cones",
    ),
    "metric": ({"metric": lambda logits, context: logits}, MetricError, "metric"),
    "position": (
        {"sites": Sites("resid", seq_pos_type="custom", seq_pos=[40])},
        PositionError,
        "40",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_are_those_of_one_process(fault: str, pool: RayWorkers) -> None:
    options, kind, words = FAULTS[fault]
    with pytest.raises(kind, match=words) as one:
        sweep(**options)
    with pytest.raises(kind, match=words) as two:
        sweep(model=pool, **options)
    assert (type(one.value), str(one.value)) == (type(two.value), str(two.value))
    # They work on.
    assert numbers(swept("full", pool)).equal(numbers(swept("full")))


class OwnError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raising(error: str) -> Callable[..., Any]:
    def metric(logits: torch.Tensor, context: Any) -> torch.Tensor:
        if error == "own":
            raise OwnError(1, 2)
        raise KeyError("gone")

    return metric


@pytest.mark.parametrize("error", ["own", "key"])
def test_an_error_of_the_users_own_function(error: str, pool: RayWorkers) -> None:
    with pytest.raises(Exception, match=r".") as one:
        swept("activation", metric=raising(error))
    with pytest.raises(Exception, match=r".") as two:
        swept("activation", pool, metric=raising(error))
    assert type(one.value) is type(two.value)
    assert str(one.value) == str(two.value)


def test_an_error_on_the_way_keeps_what_was_measured(pool: RayWorkers, tmp_path: Path) -> None:
    fails, file = tmp_path / "fails", tmp_path / "c"
    fails.touch()

    def metric(logits: torch.Tensor, context: Any) -> torch.Tensor:
        if fails.exists() and logits.shape[0] and (tmp_path / "begun").exists():
            raise RuntimeError("enough")
        return logits.gather(-1, context.source_answer_index[:, None])[:, 0]

    def spoil() -> None:
        while not file.exists():
            time.sleep(0.01)
        (tmp_path / "begun").touch()

    thread = threading.Thread(target=spoil)
    thread.start()
    with pytest.raises(Exception, match="enough"):
        swept("activation", pool, metric=metric, checkpoint=file)
    thread.join()
    kept = done(file)
    assert kept
    fails.unlink()
    two = swept("activation", pool, metric=metric, checkpoint=file)
    assert numbers(two).equal(numbers(swept("activation", metric=metric)))
    assert two.info["resumed"].startswith(f"{kept} of ")


def test_a_disk_that_is_gone_loses_no_sweep(
    pool: RayWorkers, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_KEEP", 0.1)
    monkeypatch.setattr(job, "_SHARE", 1.0)
    folder = tmp_path / "disk"
    folder.mkdir()

    def spoil() -> None:
        while not (folder / "c").exists():
            time.sleep(0.01)
        folder.rename(tmp_path / "gone")

    thread = threading.Thread(target=spoil)
    thread.start()
    scene.order("slow", "0.05")
    with pytest.warns(CheckpointWarning, match="could not be written") as caught:
        two = swept("activation", pool, checkpoint=folder / "c")
    thread.join()
    assert len(caught) == 1
    assert numbers(two).equal(numbers(swept("activation")))


def test_a_checkpoint_goes_from_one_to_the_other(pool: RayWorkers, tmp_path: Path) -> None:
    one, file = swept("activation"), tmp_path / "c"
    first = measure_shard(
        activation_patching, tiny_model("llama"), tiny_api(), SITES, SOURCE, TARGET, *ANSWERS,
        shard="1/3", checkpoint=file, memory_budget=BUDGET, progress=False,
    )  # fmt: skip
    two = swept("activation", pool, checkpoint=file, memory_budget=None)
    assert numbers(two).equal(numbers(one))
    assert two.info["resumed"].startswith(f"{first.measured} of ")
    assert done(file) > first.measured
    with traces(tiny_model("llama")) as seen:
        again = swept("activation", checkpoint=file)
    assert numbers(again).equal(numbers(one))
    assert from_the_middle(seen) == []


def test_a_finished_checkpoint_is_not_measured_again(
    pool: RayWorkers, scene: Scene, tmp_path: Path
) -> None:
    one = swept("activation", pool, checkpoint=tmp_path / "c")
    assert scene.pids()
    scene.clear()
    two = swept("activation", pool, checkpoint=tmp_path / "c")
    assert numbers(two).equal(numbers(one))
    assert scene.pids() == []


def test_another_sweeps_checkpoint_is_named_as_the_user_knows_it(
    pool: RayWorkers, tmp_path: Path
) -> None:
    file = tmp_path / "mine"
    swept("activation", checkpoint=file)
    content = file.read_bytes()
    with pytest.raises(CheckpointError, match="is the checkpoint of another sweep") as error:
        sweep(file, model=pool, sites=Sites("q"))
    assert str(error.value).startswith(str(file))
    assert file.read_bytes() == content
    (tmp_path / "none").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="none"):
        swept("activation", pool, checkpoint=tmp_path / "none")
    with pytest.raises(CheckpointError, match="folder"):
        swept("activation", pool, checkpoint=tmp_path / "no" / "c")


SITE = Site.get_site(tiny_api(), "resid", 1, seq_pos=[-1])
REFUSED: dict[str, Callable[[Any], Any]] = {
    "plan": lambda pool: plan_sweep(pool, tiny_api(), SITES, PAIRS),
    "circuit": lambda pool: find_circuit(pool, tiny_api(), PAIRS),
    "subspace": lambda pool: train_subspace(pool, tiny_api(), SITE, PAIRS),
    "average": lambda pool: cache_average(pool, [SITE], SOURCE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_takes_no_workers_says_what_does(name: str, pool: RayWorkers) -> None:
    words = r"got RayWorkers; workers stand for a model in activation_patching.*the model itself"
    with pytest.raises(AdapterError, match=words):
        REFUSED[name](pool)


def test_an_estimate_in_one_part_is_made_once(pool: RayWorkers, scene: Scene) -> None:
    """Shards that would find nothing to do are not begun."""
    one = swept("attributed")
    scene.clear()
    assert numbers(swept("attributed", pool)).equal(numbers(one))
    assert len(scene.pids()) == 1


def test_an_estimate_goes_from_one_to_the_other(pool: RayWorkers, tmp_path: Path) -> None:
    kind, file = "integrated, chunks", tmp_path / "c"
    first = measured(kind, "2/3", file)
    two = swept(kind, pool, checkpoint=file, memory_budget=None)
    assert numbers(two).equal(numbers(swept(kind)))
    told = f"{first.measured} of {done(file)} estimates were made by an earlier call"
    assert two.info["resumed"] == told


@pytest.mark.filterwarnings("ignore")
def test_a_screen_of_edges_is(pool: RayWorkers) -> None:
    options = {"method": "eap", "top_k": 5, "memory_budget": "1 GiB", "progress": False}
    one, two = (edge_patching(each, tiny_api(), PAIRS, **options)
                for each in (tiny_model("llama"), pool))  # fmt: skip
    assert isinstance(two, EdgeOutcome)
    assert dict(one) == dict(two)


@pytest.mark.parametrize("batches", [lambda: [PAIRS, PAIRS], lambda: iter([PAIRS])])
def test_batches_are_refused(batches: Callable[[], Any], pool: RayWorkers) -> None:
    with pytest.raises(WorkerError, match="iterable of batches, which workers do not take"):
        activation_patching(pool, tiny_api(), SITES, batches())
    with pytest.raises(WorkerError, match="tokens is an iterable of batches"):
        ablation_patching(pool, tiny_api(), SITES, batches())


def test_an_argument_that_cannot_be_sent_is_named(pool: RayWorkers) -> None:
    reference = (each for each in [SOURCE])
    with pytest.raises(WorkerError, match=r"^reference= cannot be sent to workers .*generator"):
        ablation_patching(
            pool, tiny_api(), SITES, TARGET, *ANSWERS, method="mean", reference=reference
        )


def test_the_bar_in_a_pipe(pool: RayWorkers, capsys: pytest.CaptureFixture[str]) -> None:
    swept("full", pool, progress=True)
    told = capsys.readouterr().err
    assert re.search(r"shards: 100%\|.*\| 8\.0/8 shards \[", told.split("\r")[-1])
    assert len(told.split("\r")) < 10
    swept("full", pool)
    assert capsys.readouterr().err == ""


def test_progress_must_be_a_flag(pool: RayWorkers) -> None:
    with pytest.raises(PatchingError, match="progress must be True or False"):
        swept("full", pool, progress="no")


def test_closed_workers_say_so(scene: Scene) -> None:
    other = RayWorkers(scene.load, workers=1)
    assert repr(other) == "RayWorkers(1 workers, LlamaForCausalLM)"
    assert numbers(swept("full", other)).equal(numbers(swept("full")))
    other.close()
    other.close()
    with pytest.raises(WorkerError, match="closed: make new ones"):
        swept("full", other)
    assert repr(other) == "RayWorkers(1 workers, closed)"
