"""Shards of estimates: merged they are one process's, to the last bit, and so are broken ones."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from nnpatch_core import (
    EdgeOutcome,
    MultiSite,
    Outcome,
    PromptPairs,
    Site,
    Sites,
    attribution_patching,
    edge_patching,
)
from nnpatch_core.errors import CheckpointError, MetricError, ShardError
from nnpatch_core.scale import measure_shard, merge_shards
from nnpatch_core.sweep import Stored
from nnpatch_core.testing import tiny_api, tiny_model, traces
from tests.helpers.checkpoints import SITES, SOURCE, TARGET, done, numbers
from tests.helpers.faults import broken_after
from tests.helpers.killed import killed
from tests.helpers.paths import ROOT
from tests.helpers.samples import THREE
from tests.helpers.shards import ESTIMATES, leaning, measured, swept

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::nnpatch_core.errors.{name}")
    for name in ("PromptWarning", "EstimateWarning")
]

ANSWERS = THREE.answers
ONES = torch.ones_like(SOURCE)
PAIRS = PromptPairs((), (), SOURCE, TARGET, ONES, ONES, *ANSWERS, None)
#: Words of an outcome that tell of the call, and not of the sweep.
CALL = {"started", "seconds", "resumed"}


def check_same(out: Outcome, one: Outcome) -> None:
    assert numbers(out).equal(numbers(one))
    assert (out.kind, out.magnitude) == (one.kind, one.magnitude)
    for name in one.cells:
        for mask in ("elided", "unread", "exact", "present"):
            assert getattr(out.cells[name], mask).equal(getattr(one.cells[name], mask))
    told, expected = (
        {key: words for key, words in each.info.items() if key not in CALL} for each in (out, one)
    )
    assert told == expected


@pytest.mark.parametrize("kind", ESTIMATES)
def test_merged_shards_are_the_estimate_of_one_process(kind: str, tmp_path: Path) -> None:
    one = swept(kind)
    for count in (2, 3, 7):
        order = [*range(1, count + 1)]
        random.Random(f"{kind} {count}").shuffle(order)
        shards = [measured(kind, f"{n}/{count}", tmp_path / f"{n} of {count}") for n in order]
        merged = merge_shards(shards, tmp_path / f"all {count}")
        # Nothing was made twice.
        assert sum(each.measured for each in shards) == done(merged)
        check_same(swept(kind, checkpoint=merged), one)


@st.composite
def sweeps(draw: st.DrawFn) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Any estimate, of any sites in any of the prompts."""
    pads = draw(st.lists(st.integers(0, 3), min_size=3, max_size=3))
    some = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
    mask = (torch.arange(6) >= torch.tensor(pads)[:, None]).long()
    metric = draw(st.sampled_from(["logit_difference", "kl_divergence", "all"]))
    options = {
        "attention_mask": mask[some],
        "batch_size": draw(st.sampled_from([None, 1, 2])),
        "metric": {"all": leaning, "one": "answer_log_probability"} if metric == "all" else metric,
        "memory_budget": "1 GiB",
        "progress": False,
    }
    prompts = SOURCE[some], TARGET[some], *(each[some] for each in ANSWERS)
    if draw(st.booleans()):
        method = draw(st.sampled_from(["eap", "eap-ig-inputs", "eap-ig-activations"]))
        if method != "eap":
            options |= {"metric": "answer_log_probability", "steps": 2}
        elif metric == "kl_divergence":
            options["metric"] = "logit_difference"
        senders = draw(st.sets(st.sampled_from(["input", "a0.h1", "m0", "a1.h2"]), min_size=1))
        options |= {"method": method, "senders": sorted(senders)}
        return edge_patching, prompts, options
    repairs: list[dict[str, Any]] = [
        {}, {"steps": 2}, {"qk_fix": True}, {"grad_drop": True},
        {"qk_fix": True, "grad_drop": True},
    ]  # fmt: skip
    chosen = draw(st.sampled_from(repairs))
    names = draw(st.lists(st.sampled_from(["q", "k", "o", "mlp", "resid"]), min_size=1))
    layers = draw(st.sets(st.integers(0, 2), min_size=1))
    kind = draw(st.sampled_from(["each", "last", "all"]))
    sites: Any = Sites([*dict.fromkeys(names)], sorted(layers), kind)
    if not chosen and draw(st.booleans()):
        places = draw(st.lists(st.tuples(*[st.integers(0, 2)] * 2), min_size=2, max_size=3))
        every = [
            [Site.get_site(tiny_api(), "mlp", at, seq_pos=[-1]) for at in two] for two in places
        ]
        sites = Sites.from_sites(
            [MultiSite(two) if len({s.layer for s in two}) > 1 else two[0] for two in every]
        )
    if metric == "kl_divergence" and "steps" not in chosen:
        # Flat at the run that it compares with.
        options["metric"] = "answer_probability"
    return attribution_patching, (sites, *prompts), options | chosen


@given(sweep=sweeps(), data=st.data())
@settings(deadline=None, max_examples=20)
def test_any_estimate_in_any_shards(
    sweep: tuple[Any, tuple[Any, ...], dict[str, Any]], data: st.DataObject
) -> None:
    function, arguments, options = sweep
    call = tiny_model("llama"), tiny_api(), *arguments
    count = data.draw(st.sampled_from([2, 3, 7]))
    order = data.draw(st.permutations(range(1, count + 1)))

    def outcome(**more: Any) -> Outcome:
        out = function(*call, **options, **more)
        return out.outcome if isinstance(out, EdgeOutcome) else out

    try:
        one = outcome()
    except MetricError:
        # Padding hides what differs.
        reject()
    with TemporaryDirectory() as folder:
        files = [
            measure_shard(
                function, *call, shard=f"{n}/{count}", checkpoint=Path(folder, str(n)), **options
            )
            for n in order
        ]
        check_same(outcome(checkpoint=merge_shards(files, Path(folder, "whole"))), one)


@pytest.mark.parametrize(
    ("kind", "runs"), [("attributed, chunks", 6), ("integrated", 2), ("AtP*", 2), ("eap", 8)]
)
def test_a_merged_estimate_runs_no_backward(
    kind: str, runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [measured(kind, f"{n}/2", tmp_path / str(n)) for n in (2, 1)]
    merged = merge_shards(shards, tmp_path / "whole")
    model, real, backwards = tiny_model("llama"), torch.autograd.grad, []

    # A hook on the model would make it another sweep; and metrics have gradients of their own.
    def counted(*given: Any, **more: Any) -> Any:
        if Path(sys._getframe(1).f_code.co_filename).stem != "cotangents":
            backwards.append(1)
        return real(*given, **more)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    with traces(model) as seen:
        one = swept(kind, model=model)
        before, made = len(seen), len(backwards)
        check = swept(kind, model=model, checkpoint=merged)
    assert numbers(check).equal(numbers(one))
    assert made
    assert len(backwards) == made
    # The two unpatched runs of each chunk; for edges two more tell how layers are built.
    assert len(seen) - before == runs


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize(
    "kind",
    ["integrated, chunks", "attributed, joint", "attributed, all prompts", "eap-ig-activations"],
)
def test_a_broken_estimate_goes_on(
    kind: str, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, path = swept(kind), tmp_path / "c"
    mend = broken_after(monkeypatch, stop, "gradient")
    with pytest.raises(KeyboardInterrupt):
        swept(kind, checkpoint=path)
    mend()
    kept, every = Stored.read(path).runs
    assert 0 < kept < every
    # The budget is that of the file.
    two = swept(kind, checkpoint=path, memory_budget=None)
    check_same(two, one)
    assert two.info["resumed"] == f"{kept} of {every} estimates were made by an earlier call"
    assert done(path) == every


SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {folder!r})
from tests.helpers.faults import slow_down
from tests.helpers.shards import measured, swept
slow_down(0.05, "gradient")
if {shard!r} is None:
    swept({kind!r}, checkpoint={path!r})
else:
    measured({kind!r}, {shard!r}, {path!r})
"""


@pytest.mark.parametrize(
    ("kind", "shard"), [("integrated, chunks", None), ("eap-ig-activations", "1/2")]
)
def test_an_estimate_survives_sigkill(kind: str, shard: str | None, tmp_path: Path) -> None:
    one, path = swept(kind), tmp_path / "1"
    code = SCRIPT.format(folder=str(ROOT), path=str(path), shard=shard, kind=kind)
    before = 0
    for _ in range(2):
        before = killed(code, path, before)
    if shard is not None:
        shards = [measured(kind, f"{n}/2", tmp_path / str(n)) for n in (1, 2)]
        path = merge_shards(shards, tmp_path / "whole")
    out = swept(kind, checkpoint=path)
    assert numbers(out).equal(numbers(one))
    assert int(out.info["resumed"].split()[0]) >= before


def test_a_shard_with_nothing_to_do_says_so(tmp_path: Path) -> None:
    first, second = (measured("attributed", f"{n}/2", tmp_path / str(n)) for n in (1, 2))
    assert first.told == f"{first.measured} estimates are made"
    assert second.measured == 0
    assert second.told == (
        "it has nothing to do: the estimate has 1 part that can be made apart, and other shards "
        "have all of them"
    )


def test_work_is_shared_out(tmp_path: Path) -> None:
    """What several processes make together, none of them makes alone."""
    for kind in ("integrated", "GradDrop", "AtP*", "attributed, chunks", "eap-ig-activations"):
        made = [measured(kind, f"{n}/3", tmp_path / f"{kind} {n}").measured for n in (1, 2, 3)]
        assert all(made), kind


def test_an_estimate_is_no_sweep_of_runs(tmp_path: Path) -> None:
    path = tmp_path / "c"
    swept("attributed", checkpoint=path)
    for kind, told in (
        ("activation", "kind: attribution then, activation now"),
        ("integrated", r"kind: attribution then, attribution \(integrated, 3 steps\) now"),
        ("attributed, chunks", "prompts at once: 3 then, 1 now"),
        ("attributed, joint", "sites: "),
    ):
        with pytest.raises(CheckpointError, match=f"is the checkpoint of another sweep .*{told}"):
            swept(kind, checkpoint=path)


def test_batches_are_no_shards(tmp_path: Path) -> None:
    words = "give all prompts in one call, as one PromptPairs"
    for batches in ([PAIRS, PAIRS], iter([PAIRS])):
        with pytest.raises(ShardError, match=words):
            measure_shard(
                attribution_patching, tiny_model("llama"), tiny_api(), SITES, batches,
                shard="1/2", checkpoint=tmp_path / "c", memory_budget="1 GiB",
            )  # fmt: skip
    assert not (tmp_path / "c").exists()


def without(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: each for key, each in tensors.items() if key != name}


#: What a file of estimates may be made to hold, and what is said of it.
DAMAGED = {
    "no mask": (lambda own: without(own, "unread"), "its tensors are"),
    "no mask that is first": (lambda own: without(own, "elided"), "its tensors are"),
    "no values": (lambda own: without(own, "values/0"), "its tensors are"),
    "other flags": (lambda own: own | {"unread": own["done"] * 3}, "unread has other numbers"),
    "float32": (lambda own: own | {"values/0": own["values/0"].float()}, "values/0 is"),
    "fewer rows": (
        lambda own: {name: each[:-1] for name, each in own.items()},
        "it has 1 metrics of .* cells and prompts, the sweep has 1 of",
    ),
    "of runs": (
        lambda own: {"done": own["done"], "values/0": own["values/0"].float()},
        "it has 1 metrics of .* cells and prompts, the sweep has 1 of",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_file_that_is_no_whole_checkpoint(what: str, tmp_path: Path) -> None:
    change, told = DAMAGED[what]
    swept("attributed", checkpoint=tmp_path / "c")
    stored = Stored.read(tmp_path / "c")
    attrs.evolve(stored, tensors=change(dict(stored.tensors))).write(tmp_path / "c")
    with pytest.raises(CheckpointError, match=told):
        swept("attributed", checkpoint=tmp_path / "c")
