"""The laws that the docs state, on every entry point, in every engine, however prompts are cut.

Other files look at each law closely, on some paths; this one looks at all paths, so that none is
forgotten. The laws are those of docs/correctness.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nnpatch_core import (
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    edge_patching,
    path_patching,
)
from nnpatch_core.spaces import Subspace
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.counted import calling
from tests.helpers.undisturbed import bent, check_state, compared, state_of

#: Padding is a part of what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

#: The second pair is one prompt twice. The fourth is as long as the third, others are longer.
SOURCES = [(5, 6, 7, 8, 9, 24), (5, 6, 7, 8, 9, 4), (9, 8, 27, 6), (9, 4, 3, 12), (8, 5, 11, 6, 3)]
TARGETS = [(5, 9, 7, 8, 9, 4), (5, 6, 7, 8, 9, 4), (9, 8, 7, 16), (9, 4, 13, 12), (8, 5, 4, 6, 3)]
SAME = 1
ANSWERS = (1, 2, 3, 4, 5), (4, 5, 6, 7, 8)
SITES = Sites(["q", "resid"], layers=[0, 2], seq_pos_type="lastk", seq_pos=2)
#: The same laws hold for a part of the activations.
IN_SUBSPACES = Sites(
    ["resid_pre", "mlp"],
    seq_pos_type="lastk",
    seq_pos=2,
    subspace={0: Subspace.random(32, 2), 2: Subspace.random(32, 5, seed=1)},
)
#: And for edges: some, of each kind of sender and receiver.
EDGES = {
    "senders": ["input", "a0.h1", "m0", "a1.h2"],
    "receivers": ["a0.h3<q>", "a1.h1<k>", "a2.h0<v>", "m1", "logits"],
}
ROUNDING = 2e-5


@attrs.frozen(eq=False)
class Batch:
    """Pairs of prompts with their answers."""

    sources: list[tuple[int, ...]]
    targets: list[tuple[int, ...]]
    answers: tuple[list[int], list[int]]

    @classmethod
    def of(cls, *rows: int) -> Batch:
        """Some of the pairs above."""
        answers = tuple([each[row] for row in rows] for each in ANSWERS)
        return cls([SOURCES[row] for row in rows], [TARGETS[row] for row in rows], answers)

    def laid(self, side: str = "left") -> dict[str, tuple[Tensor, Tensor]]:
        """Tokens and masks of both runs, padded on one side."""
        width = max(map(len, self.sources + self.targets))
        found = {}
        for name, prompts in (("source", self.sources), ("target", self.targets)):
            spare = [width - len(prompt) for prompt in prompts]
            rows = [
                ([0] * n + [*each] if side == "left" else [*each] + [0] * n)
                for n, each in zip(spare, prompts, strict=True)
            ]
            mask = [
                ([0] * n + [1] * (width - n) if side == "left" else [1] * (width - n) + [0] * n)
                for n in spare
            ]
            found[name] = torch.tensor(rows), torch.tensor(mask)
        return found


EVERYONE = Batch.of(0, 1, 2, 3, 4)


PATHS: dict[str, dict[str, Any]] = {
    "path": {
        "senders": Sites(["o", "mlp"], layers=[0, 1], seq_pos_type="lastk", seq_pos=2),
        "receivers": ["a2.h1<q>", ("a1.h0<v>", "m2"), "logits"],
    },
    "path through mlps": {
        "through": "mlps",
        "path": [["input", ("a0.h1", "a0.h2")], ["m0", "a1.h0<k>"], Sites("mlp", layers=[2])],
    },
}
METRIC = {"logit_difference": "logit_difference", "bent": bent}
#: Of prompts that may come in any order, or alone.
OPTIONS: dict[str, dict[str, Any]] = {
    "activation": {},
    "screened": {"screen": "attribution", "top_k": 4},
    "screened by atp*": {"screen": "atp*", "top_k": 4},
    "zero": {},
    "mean": {},
    "mean per position": {"method": "mean", "per_position": True},
    "resample": {"seed": 1},
    "attribution": {},
    "steps": {"steps": 2},
    "qk fix": {"qk_fix": True},
    "atp*": {"qk_fix": True, "grad_drop": True},
    "attribution of zero": {"ablation": "zero"},
    "attribution of mean": {"ablation": "mean"},
    "in subspaces": {"sites": IN_SUBSPACES},
    "mean in subspaces": {"method": "mean", "sites": IN_SUBSPACES},
    "attribution in subspaces": {"sites": IN_SUBSPACES},
    "edges": {},
    "edges at positions": {"seq_pos_type": "lastk", "seq_pos": 2},
    "edges screened": {"method": "eap", "top_k": 4},
    "edges of zero": {"ablation": "zero"},
    "edges of mean": {"ablation": "mean"},
    "edges of resample": {"ablation": "resample", "seed": 1},
    "edges by eap": {"method": "eap"},
    "edges by inputs": {"method": "eap-ig-inputs", "steps": 2},
    "edges by activations": {"method": "eap-ig-activations", "steps": 2},
    "edges by both": {"method": "clean-corrupted"},
    "edges by eap of mean": {"method": "eap", "ablation": "mean"},
    **PATHS,
}
ABLATIONS = ("zero", "mean", "mean per position", "resample", "mean in subspaces")
ESTIMATES = (
    "attribution",
    "steps",
    "qk fix",
    "atp*",
    "attribution of zero",
    "attribution of mean",
    "attribution in subspaces",
    "edges by eap",
    "edges by inputs",
    "edges by activations",
    "edges by both",
    "edges by eap of mean",
)
#: Their gradients are those of each prompt alone, in other runs than the target's.
OTHER_RUNS = ("edges by inputs", "edges by activations", "edges by both")
#: What is put there is of the batch as a whole.
OF_THE_BATCH = (
    "mean",
    "mean per position",
    "resample",
    "attribution of mean",
    "mean in subspaces",
    "edges of mean",
    "edges of resample",
    "edges by eap of mean",
)
RESAMPLED = ("resample", "edges of resample")
CHUNKINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "one": {"batch_size": 1},
    "two": {"batch_size": 2},
    "small": {"memory_budget": "260 KiB"},
}
#: All at once; and ways in which several prompts run together, and others later.
FEW = ("all", "two")


def paths(entries: Any, cuts: Any) -> Iterator[Any]:
    """Every entry point in every engine that it has, with prompts cut in several ways."""
    for entry in entries:
        for engine in ["gradient"] if entry in ESTIMATES else ["cone", "full"]:
            # Of edges it is enough that some run together and others not.
            for chunking in FEW if entry.startswith("edges") else cuts:
                yield pytest.param(entry, engine, chunking, id=f"{entry}-{engine}-{chunking}")


def everywhere(entries: Any = OPTIONS, cuts: Any = CHUNKINGS) -> Callable[[Any], Any]:
    return pytest.mark.parametrize(("entry", "engine", "chunking"), [*paths(entries, cuts)])


def anew(entries: Any = OPTIONS) -> Callable[[Any], Any]:
    """For a law that takes a sweep of its own: each way of cutting is held to the others above."""
    return everywhere(entries, FEW)


def run(
    entry: str, engine: str, chunking: str, batch: Batch = EVERYONE, side: str = "left", **more: Any
) -> Any:
    model = more.pop("model", None) or tiny_model("llama")
    laid = more.pop("laid", None) or batch.laid(side)
    options = {"metric": METRIC, "progress": False, **OPTIONS[entry], **CHUNKINGS[chunking], **more}
    sites = options.pop("sites", SITES)
    if engine != "gradient":
        options["engine"] = engine
    (source, source_mask), (target, target_mask) = laid.values()
    answers = [torch.tensor(each) for each in batch.answers]
    if entry.startswith("edges"):
        return edge_patching(
            model,
            tiny_api(),
            source,
            target,
            *answers,
            source_attention_mask=source_mask,
            target_attention_mask=target_mask,
            **{**EDGES, **options},
        ).outcome
    if entry in ABLATIONS:
        options.setdefault("method", entry)
        return ablation_patching(
            model, tiny_api(), sites, target, *answers, attention_mask=target_mask, **options
        )
    if "ablation" in options:
        return attribution_patching(
            model,
            tiny_api(),
            sites,
            None,
            target,
            *answers,
            target_attention_mask=target_mask,
            **options,
        )
    if entry in PATHS:
        members = [options.pop(name, None) for name in ("senders", "receivers")]
        return path_patching(
            model,
            tiny_api(),
            *members,
            source,
            target,
            *answers,
            source_attention_mask=source_mask,
            target_attention_mask=target_mask,
            **options,
        )
    patch = attribution_patching if entry in ESTIMATES else activation_patching
    return patch(
        model,
        tiny_api(),
        sites,
        source,
        target,
        *answers,
        source_attention_mask=source_mask,
        target_attention_mask=target_mask,
        **options,
    )


def raw(out: Any) -> Tensor:
    """`[metrics, cells, batch]`, every number of an outcome."""
    return torch.stack(
        [torch.cat([out.raw[metric][name] for name in out]).double() for metric in out.metrics]
    )


@attrs.frozen(eq=False)
class Ran:
    """A sweep, and what was before and after it."""

    out: Any
    before: dict[str, Any]
    after: dict[str, Any]


@functools.cache
def ran(entry: str, engine: str, chunking: str) -> Ran:
    model = tiny_model("llama")
    model.model.layers[1].train()
    next(model.parameters()).requires_grad_(False)
    given = EVERYONE.laid()
    before = {**state_of(model), **inputs_of(given)}
    out = run(entry, engine, chunking, model=model, laid=given)
    return Ran(out, before, {**state_of(model), **inputs_of(given)})


def reference(entry: str) -> Tensor:
    """In one engine, all prompts together."""
    return raw(ran(entry, "gradient" if entry in ESTIMATES else "full", "all").out)


@everywhere()
def test_engines_and_cuts_give_the_same_numbers(entry: str, engine: str, chunking: str) -> None:
    out = ran(entry, engine, chunking).out
    assert out.info["engine"] == ("gradient" if entry in ESTIMATES else engine)
    assert "fallback" not in out.info
    assert (raw(out) - reference(entry)).abs().max() < ROUNDING


@everywhere([each for each in OPTIONS if each not in ABLATIONS and "of" not in each])
def test_where_the_runs_are_the_same_no_bit_changes(entry: str, engine: str, chunking: str) -> None:
    out = ran(entry, engine, chunking).out
    for metric in out.metrics:
        before = out.baselines[metric].target[SAME].double()
        for name in out:
            assert (out.raw[metric][name][:, SAME].double() == before).all(), (metric, name)


@everywhere(RESAMPLED)
def test_a_prompt_that_gets_its_own_values_changes_in_no_bit(
    entry: str, engine: str, chunking: str
) -> None:
    """Each is given the other's, which is the same prompt."""
    batch = Batch([SOURCES[0]] * 2, [TARGETS[0]] * 2, ([1, 1], [4, 4]))
    out = run(entry, engine, chunking, batch)
    for metric in out.metrics:
        before = out.baselines[metric].target.double()
        for name in out:
            assert (out.raw[metric][name].double() == before).all()


@anew([each for each in OPTIONS if each not in RESAMPLED])
def test_the_order_of_the_prompts_does_not_matter(entry: str, engine: str, chunking: str) -> None:
    order = [3, 0, 4, 2, 1]
    found = raw(run(entry, engine, chunking, Batch.of(*order)))
    assert (found - reference(entry)[..., order]).abs().max() < ROUNDING


@anew()
def test_the_side_of_the_padding_does_not_matter(entry: str, engine: str, chunking: str) -> None:
    found = raw(run(entry, engine, chunking, side="right"))
    assert (found - reference(entry)).abs().max() < ROUNDING


@functools.cache
def alone(entry: str, engine: str) -> list[Tensor]:
    # Of two runs that are the same nothing can be told: it stands beside another one.
    batches = [[row, 0] if row == SAME else [row] for row in range(len(TARGETS))]
    return [raw(run(entry, engine, "all", Batch.of(*rows))) for rows in batches]


@everywhere([each for each in OPTIONS if each not in OF_THE_BATCH and "screened" not in each])
def test_a_padded_batch_gives_each_prompt_what_it_has_alone(
    entry: str, engine: str, chunking: str
) -> None:
    found = raw(ran(entry, engine, chunking).out)
    for row, each in enumerate(alone(entry, engine)):
        assert (found[..., row] - each[..., 0]).abs().max() < ROUNDING


def inputs_of(laid: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    return {name: torch.stack(tensors) for name, tensors in laid.items()}


@everywhere()
def test_model_and_prompts_are_as_they_were_before(entry: str, engine: str, chunking: str) -> None:
    found = ran(entry, engine, chunking)
    check_state(found.before, found.after)


@anew()
def test_a_model_is_as_it_was_before_after_an_error_too(
    entry: str, engine: str, chunking: str
) -> None:
    model = tiny_model("llama")
    model.model.layers[1].train()
    before = state_of(model)
    calls: list[int] = []
    # The one run of a zero ablation's estimate, otherwise the second of whatever there is.
    stop_at = 1 if entry == "attribution of zero" else 2

    def stop() -> None:
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt

    mlp = model.model.layers[2].mlp
    kind = type(mlp)
    calling(mlp, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(entry, engine, chunking, model=model)
    finally:
        mlp.__class__ = kind
    check_state(before, state_of(model))


@anew()
def test_the_same_call_gives_the_same_bits(entry: str, engine: str, chunking: str) -> None:
    torch.manual_seed(2)
    assert raw(run(entry, engine, chunking)).equal(raw(ran(entry, engine, chunking).out))


@anew([each for each in OPTIONS if "screened" not in each and each not in OTHER_RUNS])
def test_a_metric_is_measured_the_same_beside_others(
    entry: str, engine: str, chunking: str
) -> None:
    """One that compares prompts waits for them, and others do not."""
    together = run(entry, engine, chunking, metric={**METRIC, "compared": compared})
    gap = (raw(together)[:2] - raw(ran(entry, engine, chunking).out)).abs().max()
    assert gap < ROUNDING
    assert (raw(together)[2] - beside(entry)).abs().max() < ROUNDING


@functools.cache
def beside(entry: str) -> Tensor:
    engine = "gradient" if entry in ESTIMATES else "full"
    return raw(run(entry, engine, "all", metric=compared))[0]


@everywhere(["activation", "screened", "screened by atp*"])
def test_a_whole_residual_stream_is_the_source_run(entry: str, engine: str, chunking: str) -> None:
    sites = Sites("resid", layers=[0, 2], seq_pos_type=None)
    out = run(entry, engine, chunking, sites=sites)
    assert out.exact("resid")[[0, 2]].all()
    for metric in out.metrics:
        source = out.baselines[metric].source
        assert (out.raw[metric]["resid"] - source).abs().max() < ROUNDING
    assert (out["resid"][[0, 2]] - 1).abs().max() < 1e-3
