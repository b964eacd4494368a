"""Arguments of `path_patching`: how nodes are spelled, what is refused, what an outcome says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nnpatch_core import MultiSite, Outcome, PromptPairs, Site, Sites, path_patching
from nnpatch_core.errors import (
    CheckpointError,
    EdgeError,
    HeadError,
    LayerError,
    MemoryBudgetError,
    OutcomeError,
    PatchingError,
    PositionError,
    PromptWarning,
    UnknownNameError,
)
from nnpatch_core.spaces import Subspace
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer, traces

MODEL, API = tiny_model("llama"), tiny_api()
SOURCE, TARGET = (
    torch.tensor([[5, 6, 7, 8], [4, 3, 9, 7]]),
    torch.tensor([[5, 9, 7, 8], [4, 8, 9, 7]]),
)
ANSWERS = torch.tensor([1, 2]), torch.tensor([3, 4])
GROUPED = 2
HEADS = 4


def run(senders: Any, receivers: Any, **options: Any) -> Outcome:
    arguments = {"progress": False, **options}
    return path_patching(MODEL, API, senders, receivers, SOURCE, TARGET, *ANSWERS, **arguments)


def site(name: str, layer: int, head: int | None = None, at: Any = None, **more: Any) -> Site:
    return Site.get_site(API, name, layer, head, at, **more)


def same(one: Outcome, *others: Outcome) -> Tensor:
    for other in others:
        assert torch.equal(
            one.raw["logit_difference"]["path"], other.raw["logit_difference"]["path"]
        )
    return one["path"]


def labels(outcome: Outcome) -> dict[str, tuple[Any, ...]]:
    return {axis.name: axis.labels for axis in outcome.axes("path")}


# How nodes are spelled.


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("a1.h3", [site("o", 1, 3), site("z", 1, 3), Sites("o", [1], heads=[3])]),
        (
            "m1",
            [site("mlp", 1), site("mlp_out", 1), Sites("mlp", [1]), MultiSite([site("mlp", 1)])],
        ),
        ("input", [site("resid_pre", 0), Sites("resid_pre", [0])]),
        (tuple(f"a1.h{head}" for head in range(HEADS)), [site("o", 1), site("attn", 1)]),
        (
            ("a0.h1", "m1"),
            [MultiSite([site("o", 0, 1), site("mlp", 1)]), ("a0.h1", site("mlp", 1))],
        ),
    ],
    ids=str,
)
def test_senders_have_several_names(name: Any, sites: list[Any]) -> None:
    wanted = run(name, "logits")
    assert not torch.equal(same(wanted, *(run(each, "logits") for each in sites)), torch.zeros(1))
    same(wanted, *(run([each], ["logits"]) for each in sites))


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("a1.h3<q>", [site("q", 1, 3), Sites("q", [1], heads=[3])]),
        ("a1.h1<k>", [site("k", 1, 1), Sites("k", [1], heads=[1])]),
        ("a1.h0<v>", [site("v", 1, 0)]),
        (tuple(f"a1.h{head}<v>" for head in range(GROUPED)), [site("v", 1)]),
        (tuple(f"a1.h{head}<q>" for head in range(HEADS)), [site("q", 1)]),
        ("m2", [site("mlp", 2), Sites("mlp", [2])]),
        ("resid_pre2", [site("resid_pre", 2), site("resid", 1), site("resid_post", 1)]),
        ("logits", [site("resid", 2), Sites("resid", [2]), "resid_pre3"]),
        (("a1.h3<q>", "a1.h1<k>"), [MultiSite([site("k", 1, 1), site("q", 1, 3)])]),
    ],
    ids=str,
)
def test_receivers_have_several_names(name: Any, sites: list[Any]) -> None:
    wanted = run("m0", name)
    assert not torch.equal(same(wanted, *(run("m0", each) for each in sites)), torch.zeros(1))


def test_axes_are_what_is_swept() -> None:
    out = run(Sites(["o", "mlp"], [0]), ["a1.h3<q>", ("m1", "m2")])
    heads = tuple(f"a0.h{head}" for head in range(HEADS))
    assert labels(out) == {"sender": (*heads, "m0"), "receiver": ("a1.h3<q>", "m1 + m2")}
    assert out["path"].shape == (HEADS + 1, 2)
    assert out.kind == "path"
    assert list(out) == ["path"]
    assert labels(run(["m0", "m1"], "logits")) == {"sender": ("m0", "m1")}
    assert labels(run("m0", ["m1", "logits"])) == {"receiver": ("m1", "logits")}
    assert labels(run("m0", "logits")) == {"sender": ("m0",)}


def test_labels_are_readable_and_differ() -> None:
    named = MultiSite([site("o", 0, 1), site("o", 0, 2)], name="name movers")
    places = [[0, 1], [1, 2]]
    senders = [
        named,
        site("o", 0, 1, [-1]),
        site("o", 0, 1, [[0], [1]]),
        site("attn", 0),
        Sites("o", [0], "each", heads=[2]),
        Sites("mlp", [0], "custom", places),
        Sites("mlp", [1], "last"),
        "m1",
    ]
    assert labels(run(senders, "logits"))["sender"] == (
        "name movers",
        "a0.h1 [-1]",
        "a0.h1 [[0], [1]]",
        "a0",
        *(f"a0.h2 [{at}]" for at in range(4)),
        "m0 column 0",
        "m0 column 1",
        "m1 #1",
        "m1 #2",
    )


def test_a_list_may_hold_grids() -> None:
    out = run(["input", Sites("mlp", [0, 1])], ["m2", Sites("v", [2])])
    assert labels(out) == {
        "sender": ("input", "m0", "m1"),
        "receiver": ("m2", "a2.h0<v>", "a2.h1<v>"),
    }


def test_paths_that_are_not_there_are_not_swept() -> None:
    out = run(Sites(["o", "mlp"]), ["a1.h0<q>", "m1", "logits"])
    swept = out.swept("path")
    names = labels(out)["sender"]
    for number, name in enumerate(names):
        layer = int(name[1])
        assert swept[number].tolist() == [layer < 1, layer < 1 or name[:2] == "a1", True]
    assert torch.equal(out["path"] != 0, swept)


def test_paths_are_chosen_by_their_ends() -> None:
    out = run(Sites(["o", "mlp"]), ["a1.h0<q>", "m1", "logits"])
    some = out.sel(sender=["a0.h1", "m0"], receiver="m1")
    assert some.swept("path").nonzero().tolist() == [[1, 1], [12, 1]]
    assert some["path"][12, 1] == out["path"][12, 1]
    with pytest.raises(OutcomeError, match="no cell has receiver='m2'; there are"):
        out.sel(receiver="m2")


def test_the_two_ways_are_two_kinds() -> None:
    assert run("a0.h0", "a2.h0<q>", through="mlps").kind == "path (through mlps)"
    direct, through = (run("a0.h0", "a2.h0<q>", through=way) for way in (None, "mlps"))
    assert (direct["path"] - through["path"]).abs() > 1e-4


def test_pairs_stand_for_the_tokens() -> None:
    words = [" red", " blue", " green", " black"]
    tokenizer = tiny_tokenizer([*words, " a", " b"])
    pairs = PromptPairs.from_template(
        " a{X} b",
        [{"X": " red"}, {"X": " blue black"}],
        [{"X": " green blue"}, {"X": " black"}],
        [" red", " blue"],
        [" green", " black"],
        tokenizer,
    )
    spans = Sites("o", [0], "spans", ["X", "last"])
    out = path_patching(MODEL, API, spans, "resid_pre1", pairs, through="mlps", progress=False)
    names = tuple(f"a0.h{head} {name!r}" for name in ("X", "last") for head in range(HEADS))
    assert labels(out)["sender"] == names
    batches = path_patching(
        MODEL, API, spans, "resid_pre1", iter([pairs, pairs]), through="mlps", progress=False
    )
    torch.testing.assert_close(batches["path"], out["path"], atol=1e-6, rtol=1e-5)


def test_a_receiver_is_held_where_a_span_is() -> None:
    """Wherever it stands in the source: a receiver takes nothing from there."""
    words = [" red", " blue", " green", " black"]
    tokenizer = tiny_tokenizer([*words, " a", " b"])
    pairs = PromptPairs.from_template(
        " a{X} b b", [{"X": " red"}], [{"X": " green blue"}], [" red"], [" green"], tokenizer
    )
    named = Sites("mlp", [1], "spans", ["X"])
    (at,) = pairs.batch.spans["X"].target[:, 1].tolist()
    out = path_patching(MODEL, API, "m0", named, pairs, progress=False)
    with pytest.warns(PromptWarning, match="prompts have"):
        placed = path_patching(MODEL, API, "m0", site("mlp", 1, at=[at - 1]), pairs, progress=False)
    same(out, placed)


def test_options_are_those_of_a_sweep(tmp_path: Path) -> None:
    senders, receivers = Sites(["o", "mlp"]), ["m2", "logits"]
    whole = run(senders, receivers)
    means = run(senders, receivers, keep="means", metric=["logit_difference", "kl_divergence"])
    assert means.metrics == ("logit_difference", "kl_divergence")
    torch.testing.assert_close(means["path"], whole["path"])
    file = tmp_path / "sweep.safetensors"
    same(whole, run(senders, receivers, checkpoint=file))
    again = run(senders, receivers, checkpoint=file)
    same(whole, again)
    assert "resumed" in again.info
    for other in (
        {"through": "mlps"},
        {"senders": [Sites(["o", "mlp"], seq_pos_type="last")]},
        {"receivers": ["m2", Sites("resid", [2], "last")]},
        {"batch_size": 1},
    ):
        given = {"senders": senders, "receivers": receivers, "checkpoint": file, **other}
        with pytest.raises(CheckpointError):
            run(**given)


def test_positions_of_each_prompt_are_told_to_a_checkpoint(tmp_path: Path) -> None:
    """Though labels show the first prompts alone."""
    places = [[[0], [1], [2], [at]] for at in (1, 2)]
    prompts = [each.repeat(2, 1) for each in (SOURCE, TARGET)]
    answers = [each.repeat(2) for each in ANSWERS]
    file = tmp_path / "sweep.safetensors"

    def placed(at: Any) -> Outcome:
        sender = site("o", 0, 1, at)
        given = MODEL, API, sender, "logits", *prompts, *answers
        return path_patching(*given, checkpoint=file, progress=False)

    first = placed(places[0])
    same(first, placed(places[0]))
    with pytest.raises(CheckpointError, match="path"):
        placed(places[1])


# What is refused.

PAIRS = PromptPairs.from_texts([" a"], [" b"], [" a"], [" b"], tiny_tokenizer([" a b"]))


@pytest.mark.parametrize(
    ("senders", "receivers", "options", "words"),
    [
        ("a2.h1", "a1.h0<q>", {}, "from a2.h1 to a1.h0<q>: a2.h1 writes after a1.h0<q> has read"),
        (["a0.h1", "m2"], ["m2", "a1.h0<q>"], {}, "from m2 to m2: m2 writes after m2 has read"),
        ("m0", ["logits", "m0"], {}, "from m0 to m0"),
        (("a0.h0", "a2.h0"), "m1", {}, "from a2.h0 to m1"),
        ("m1", ("m0", "logits"), {}, "from m1 to m0"),
        (Sites("o", [2]), Sites("q", [1]), {}, "no path from a2.h0 to a1.h3<q>, nor between"),
        (
            None,
            None,
            {"path": ["m0", "a1.h0<q>", "a1.h0<v>"]},
            "from a1.h0<q> to a1.h0<v>: ",
        ),
        (None, None, {"path": ["m0", "logits", "logits"]}, "logits cannot stand amid a path"),
        (None, None, {"path": ["m0", "resid_pre1", "m2"]}, "resid_pre1 cannot stand amid a path"),
        (None, None, {"path": ["m0"]}, "at least two members"),
        (None, None, {"path": "m0"}, "at least two members"),
        ("m0", None, {"path": ["m0", "m1"]}, "pass None as senders and receivers"),
        (None, "logits", {}, "senders is None"),
        ("m0", None, {}, "receivers is None"),
        (PAIRS, "m0", {}, "senders is a PromptPairs"),
        ("m3", "logits", {}, "no sender 'm3'"),
        ("a0.h4", "logits", {}, "no sender 'a0.h4' (did you mean"),
        ("a0.h1<q>", "logits", {}, "no sender 'a0.h1<q>'"),
        ("m0", "a1.h2<k>", {}, "no receiver 'a1.h2<k>'"),
        ("m0", "a1.h2", {}, "does not say which of a head's inputs receives"),
        ("m0", "resid_pre4", {}, "no 'resid_pre4'"),
        ("", "logits", {}, "no sender ''"),
        ([], "logits", {}, "senders is empty"),
        ((), "logits", {}, "a tuple is empty"),
        ([["m0"]], "logits", {}, "got ['m0']"),
        (["m0", 3], "logits", {}, "got 3"),
        (("m0", 3), "logits", {}, "got 3"),
        ({"m0"}, "logits", {}, "got {'m0'}"),
        (site("q", 0, 1), "logits", {}, "q L0 H1 is what a head reads"),
        (site("resid", 0), "logits", {}, "holds what many senders have written"),
        (site("resid_pre", 1), "logits", {}, "holds what many senders have written"),
        ("m0", site("o", 1, 1), {}, "what heads hand on, not what they read"),
        ("m0", site("attn", 1), {}, "what heads hand on, not what they read"),
        (site("mlp", 0, subspace=Subspace.random(32, 2)), "logits", {}, "has a subspace"),
        ("m0", site("mlp", 1, at=[1], source_seq_pos=[2]), {}, "a receiver takes nothing from"),
    ],
)
def test_errors_say_what_is_wrong(senders: Any, receivers: Any, options: Any, words: str) -> None:
    with traces(MODEL) as seen, pytest.raises(EdgeError, match=re.escape(words)):
        run(senders, receivers, **options)
    # A few tokens tell how the layers are built.
    assert sum(trace.rows * trace.tokens for trace in seen) <= 2 * SOURCE.shape[1]


@pytest.mark.parametrize(
    ("senders", "receivers", "options", "kind", "words"),
    [
        ("m0", "logits", {"through": "mlp"}, UnknownNameError, "did you mean mlps"),
        ("m0", "logits", {"through": 3}, UnknownNameError, "unknown through 3"),
        (site("o", 3), "logits", {}, LayerError, "3"),
        (Sites("o", [4]), "logits", {}, LayerError, "4"),
        (site("o", 1, 7), "logits", {}, HeadError, "7"),
        ("m0", site("k", 1, 3), {}, HeadError, "3"),
        (site("o", 0, 1, [9]), "logits", {}, PositionError, "9"),
        ("m0", site("mlp", 1, at=[9]), {}, PositionError, "9"),
        (site("o", 0, 1, [[1], [2], [3]]), "logits", {}, PositionError, "3"),
        (Sites("o", [0], "spans", ["X"]), "logits", {}, PositionError, "X"),
        ("m0", "logits", {"engine": "half"}, UnknownNameError, "half"),
        ("m0", "logits", {"keep": "all"}, UnknownNameError, "all"),
        ("m0", "logits", {"batch_size": 0}, PatchingError, "batch_size"),
        ("m0", "logits", {"memory_budget": "1 KiB"}, MemoryBudgetError, "memory_budget"),
        ("m0", "logits", {"metric": "none"}, UnknownNameError, "none"),
        ("m0", "logits", {"progress": 3}, PatchingError, "progress"),
    ],
)
def test_other_errors_are_those_of_a_sweep(
    senders: Any, receivers: Any, options: Any, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        run(senders, receivers, **options)


def test_a_budget_is_refused_before_anything_runs() -> None:
    with traces(MODEL) as seen, pytest.raises(MemoryBudgetError, match="what is recorded of one"):
        run("m0", "logits", memory_budget="1 KiB")
    assert not seen


def test_columns_that_mix_are_told() -> None:
    masks = {"target_attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])}
    for senders, receivers in (
        (Sites("o", [0], "each", heads=[1]), "logits"),
        ("m0", [site("mlp", 1, at=[1]), site("mlp", 1, at=[2])]),
    ):
        with pytest.warns(PromptWarning, match="prompts have 3 to 4 tokens"):
            run(senders, receivers, **masks)


def test_batches_go_by_names_or_from_the_end() -> None:
    words = [" red", " blue", " green", " black", " a", " b"]
    tokenizer = tiny_tokenizer(words)
    short, long = (
        PromptPairs.from_texts([f" red{rest}"], [f" green{rest}"], [" red"], [" green"], tokenizer)
        for rest in (" a", " b a")
    )

    def swept(*members: Any) -> Outcome:
        return path_patching(
            MODEL, API, *members[:2], iter([short, long]), path=members[2], progress=False
        )

    def members(at: Any) -> list[tuple[Any, ...]]:
        held = site("mlp", 1, at=at)
        return [
            (site("o", 0, 1, at), "logits", None),
            ("m0", [held], None),
            (None, None, ["m0", (held, "a1.h0<q>"), "logits"]),
        ]

    for each in members([-1]):
        assert swept(*each)["path"].shape == (1,)
    for at, told in (([1], "counted from the start"), ([[1]], "positions of each prompt")):
        for each in members(at):
            with pytest.raises(PositionError, match=told):
                swept(*each)
