"""What holds of paths, without an oracle: where they say what plain patching says, and the ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nnpatch_core import Outcome, Site, Sites, activation_patching, path_patching
from nnpatch_core.seq_pos import Span
from tests.helpers.families import FAMILIES, model_of

#: Padding is a part of what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(prompts have|span):nnpatch_core.errors.PromptWarning"
)

SOURCE = torch.tensor([[5, 6, 7, 8, 9, 4], [0, 0, 9, 8, 27, 6], [9, 8, 5, 4, 7, 3]])
TARGET = torch.tensor([[5, 9, 7, 8, 9, 4], [0, 0, 9, 8, 7, 16], [0, 8, 6, 4, 7, 3]])
ANSWERS = torch.tensor([3, 4, 5]), torch.tensor([6, 7, 8])
MASKS = {
    "source_attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1] * 6]),
    "target_attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]),
}
#: Of the last two prompts it stands elsewhere in the source than in the target.
SPANS = {
    "name": Span(
        source=torch.tensor([[1, 3], [3, 4], [4, 5]]), target=torch.tensor([[1, 3], [2, 3], [2, 3]])
    ),
    "verb": Span(
        source=torch.tensor([[3, 4], [4, 5], [0, 2]]), target=torch.tensor([[3, 4], [4, 5], [3, 4]])
    ),
}
SERIAL = ("gemma2", "gpt2", "granite", "mixtral", "qwen3")
PARALLEL = ("gpt_neox", "falcon, by group")
STRATEGIES: dict[str, dict[str, Any]] = {
    "everywhere": {},
    "each": {"seq_pos_type": "each"},
    "last": {"seq_pos_type": "last"},
    "spans": {"seq_pos_type": "spans", "seq_pos": ["name", "verb", "last"]},
    "of each prompt": {"seq_pos_type": "custom", "seq_pos": [[1, 4], [2, 3], [5, 2]]},
    "from elsewhere": {
        "seq_pos_type": "custom",
        "seq_pos": [[1, 4], [2, 3], [5, 2]],
        "source_seq_pos": [[2, 4], [5, 2], [0, 5]],
    },
    "together from elsewhere": {
        "seq_pos_type": "custom_constant",
        "seq_pos": [[1, 4], [2, 3], [5, 2]],
        "source_seq_pos": [[2, 4], [5, 2], [0, 5]],
    },
}
ATOL = 2e-5


def paths(family: str, senders: Any, receivers: Any, **options: Any) -> Outcome:
    arguments = {**MASKS, "spans": SPANS, "progress": False, **options}
    model, api = model_of(family), FAMILIES[family].api
    return path_patching(model, api, senders, receivers, SOURCE, TARGET, *ANSWERS, **arguments)


def patched(family: str, sites: Any, **options: Any) -> Outcome:
    arguments = {**MASKS, "spans": SPANS, "progress": False, **options}
    model, api = model_of(family), FAMILIES[family].api
    return activation_patching(model, api, sites, SOURCE, TARGET, *ANSWERS, **arguments)


def raw(outcome: Outcome, name: str = "path") -> Tensor:
    """`[cells, batch]`."""
    return outcome.raw["logit_difference"][name]


def same(found: Tensor, expected: Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-5)


def differ(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-4)


# Where nothing is between, a path into the stream is the patch.


@pytest.mark.parametrize("engine", ["cone", "full"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "qwen3"])
def test_into_the_stream_behind_its_layer_a_sender_is_patched(
    family: str, strategy: str, engine: str
) -> None:
    """Of a head the layer's MLP is between, which is recomputed; positions are those of sites."""
    for component in ("mlp", "o"):
        where = STRATEGIES[strategy]
        sites = Sites(component, layers=[0], **where)
        out = paths(family, sites, "resid_pre1", through="mlps", engine=engine)
        expected = patched(family, sites, engine=engine)
        assert [axis.name for axis in out.axes("path")] == ["sender"]
        found, wanted = raw(out), raw(expected, component)
        same(found, wanted)
        assert differ(wanted, out.baselines["logit_difference"].target)


@pytest.mark.parametrize("family", [*SERIAL, *PARALLEL])
def test_into_the_logits_the_last_layer_is_patched(family: str) -> None:
    mlp = Sites("mlp", layers=[1], seq_pos_type="each")
    same(raw(paths(family, mlp, "logits")), raw(patched(family, mlp), "mlp"))
    heads = Sites("o", layers=[1], seq_pos_type="each")
    direct, whole = raw(paths(family, heads, "logits")), raw(patched(family, heads), "o")
    # In parallel blocks the MLP does not see the heads of its layer.
    if family in PARALLEL:
        same(direct, whole)
    else:
        assert differ(direct, whole)
    same(raw(paths(family, heads, "logits", through="mlps")), whole)


@pytest.mark.parametrize("through", [None, "mlps"])
@pytest.mark.parametrize("family", [*SERIAL, *PARALLEL])
def test_all_senders_at_once_make_the_source_run(family: str, through: Any) -> None:
    model, api = model_of(family), FAMILIES[family].api
    everyone = tuple(
        Site.get_site(api, name, layer) for layer in range(2) for name in ("attn", "mlp")
    )
    one = slice(0, 2)
    out = path_patching(
        model,
        api,
        [("input", *everyone)],
        ["logits"],
        SOURCE[one],
        TARGET[one],
        *(each[one] for each in ANSWERS),
        attention_mask=MASKS["source_attention_mask"][one],
        through=through,
        progress=False,
    )
    same(raw(out)[0], out.baselines["logit_difference"].source)


@pytest.mark.parametrize("family", [*SERIAL, *PARALLEL])
def test_the_embeddings_into_all_that_reads_them_are_the_stream_before_layer_0(family: str) -> None:
    sites = Sites("resid_pre", layers=[0], seq_pos_type="each")
    found = raw(paths(family, sites, "resid_pre0"))
    same(found, raw(patched(family, sites), "resid_pre"))
    assert differ(found, raw(paths(family, sites, "logits")))


# What is recomputed between.


@pytest.mark.parametrize("family", ["gemma2", "granite", "qwen3"])
def test_mlps_count_only_where_one_is_between(family: str) -> None:
    senders, near, far = ["a0.h1", "m0"], "a1.h2<q>", "logits"
    frozen, recomputed = (
        {name: raw(paths(family, senders, name, through=through)) for name in (near, far)}
        for through in (None, "mlps")
    )
    # Of the MLP none is between itself and the next layer's heads.
    same(frozen[near][1], recomputed[near][1])
    assert differ(frozen[near][0], recomputed[near][0])
    assert differ(frozen[far], recomputed[far])


@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
def test_an_mlp_that_sends_is_not_recomputed(family: str) -> None:
    """Where its own change is nothing, it holds up what comes from below."""
    none = Site.get_site(FAMILIES[family].api, "mlp", 0, seq_pos=[0])
    # The first token is one and the same in both runs.
    alone = raw(paths(family, [("a0.h1", "m0")], ["a1.h0<q>"], through="mlps"))
    held = raw(paths(family, [("a0.h1", none)], ["a1.h0<q>"], through="mlps"))
    same(held, raw(paths(family, ["a0.h1"], ["a1.h0<q>"])))
    assert differ(held, alone)


# Entries.


@pytest.mark.parametrize("through", [None, "mlps"])
@pytest.mark.parametrize("family", ["gemma2", "olmo2", "gpt2"])
def test_heads_of_a_layer_pass_its_projection_together(family: str, through: Any) -> None:
    """Behind a norm their changes do not add up, and all of them are what the attention adds."""
    api = FAMILIES[family].api
    count = model_of(family).config.num_attention_heads
    heads = tuple(f"a0.h{head}" for head in range(count))
    attn, o = (Site.get_site(api, name, 0) for name in ("attn", "o"))
    together = raw(paths(family, [heads, attn, o], ["resid_pre1"], through=through))
    same(together, together[:1].expand_as(together))
    if through == "mlps":
        same(together[:1], raw(patched(family, Sites.from_sites([attn])), "attn"))


def test_a_grid_of_entries_is_swept() -> None:
    senders, receivers = ["input", "a0.h1", ("a0.h0", "m0")], ["a1.h0<q>", ("a1.h0<k>", "m1")]
    out = paths("gemma2", senders, receivers)
    assert [axis.name for axis in out.axes("path")] == ["sender", "receiver"]
    assert out.axes("path")[0].labels == ("input", "a0.h1", "a0.h0 + m0")
    assert out.axes("path")[1].labels == ("a1.h0<q>", "a1.h0<k> + m1")
    for number, sender in enumerate(senders):
        for other, receiver in enumerate(receivers):
            alone = paths("gemma2", [sender], [receiver])
            assert alone["path"].shape == (1,)
            assert abs(alone["path"][0] - out["path"][number, other]) < ATOL


def test_receivers_of_a_cell_do_not_see_each_other() -> None:
    """What comes from the lower one is not seen by the higher one, which is held."""
    both = raw(paths("gpt2", "a0.h1", ("m0", "logits")))
    same(both, raw(paths("gpt2", "a0.h1", "logits")))
    assert differ(both, raw(paths("gpt2", "a0.h1", "m0")))


# Longer paths.


@pytest.mark.parametrize("family", [*SERIAL, *PARALLEL])
@pytest.mark.parametrize("engine", ["cone", "full"])
def test_a_path_that_goes_on_where_all_is_free_ends_there(family: str, engine: str) -> None:
    """The last layer's MLP feeds the final stream alone, and so do its heads in parallel blocks."""
    senders, middles = ["input", "a0.h1", "m0"], ["m1", "a1.h1<q>", ("a1.h1<q>", "a1.h0<k>")]
    middles.append("a1.h0<v>")
    chain = paths(family, None, None, path=[senders, middles, "logits"], engine=engine)
    ends = paths(family, senders, middles, engine=engine)
    assert differ(raw(ends), ends.baselines["logit_difference"].target)
    found, wanted = (raw(each).unflatten(0, (3, 4)) for each in (chain, ends))
    same(found[:, 0], wanted[:, 0])
    if family in PARALLEL:
        same(found, wanted)
    else:
        assert differ(found[:, 3], wanted[:, 3])


@pytest.mark.parametrize("family", SERIAL)
def test_of_heads_amid_a_path_the_mlp_above_is_recomputed(family: str) -> None:
    """As is all else behind a receiver of the last layer, so that nothing is left."""
    for middle in (("a1.h1<q>", "a1.h0<k>"), "a1.h0<v>"):
        # From the input on MLPs would be recomputed too: none is before the heads of layer 0's.
        chain = paths(family, None, None, path=["m0", middle, "logits"], through="mlps")
        same(raw(chain), raw(paths(family, "m0", middle, through="mlps")))


def test_members_that_are_lists_are_swept() -> None:
    path = [["a0.h0", "m0"], ["a1.h1<q>", "m1"], ["logits", "m1"]]
    out = paths("gpt2", None, None, path=path)
    sender, receiver = out.axes("path")
    assert sender.labels == ("a0.h0->a1.h1<q>", "a0.h0->m1", "m0->a1.h1<q>", "m0->m1")
    assert receiver.labels == ("logits", "m1")
    # An MLP is not before itself.
    assert out.swept("path").tolist() == [[True, True], [True, False]] * 2
    for number, (first, second) in enumerate(label.split("->") for label in sender.labels):
        alone = paths("gpt2", None, None, path=[first, second, "logits"])
        assert abs(alone["path"][0] - out["path"][number, 0]) < ATOL


# Nothing, and all the same however it is run.


def test_what_does_not_move_is_the_target_run() -> None:
    """Left of the first token that differs, and of a prompt that is its own source."""
    first = Site.get_site(FAMILIES["gpt2"].api, "o", 0, 1, seq_pos=[2])
    out = paths("gpt2", [first, "a0.h1"], ["logits"])
    assert bool(out.cells["path"].elided[0, 1])
    assert raw(out)[0, 1] == out.baselines["logit_difference"].target[1]
    assert not out.cells["path"].elided[1].any()


def test_amid_a_path_only_what_moves_is_run() -> None:
    """A query sees the change where it stands, a key and a value from there on."""
    api = FAMILIES["gpt2"].api
    last = Site.get_site(api, "o", 0, 1, seq_pos=[-1])
    for kind, at, elided in (("q", 3, True), ("q", 5, False), ("k", 3, True), ("k", 5, False)):
        middle = Site.get_site(api, kind, 1, 0, seq_pos=[at])
        out = paths("gpt2", None, None, path=[last, middle, "logits"])
        assert bool(out.cells["path"].elided.all()) is elided
        assert bool(out.cells["path"].elided.any()) is elided
    early = Site.get_site(api, "o", 0, 1, seq_pos=[4])
    for kind, elided in (("q", True), ("k", False)):
        middle = Site.get_site(api, kind, 1, 0)
        ends = Site.get_site(api, "resid", 1, seq_pos=[-1])
        out = paths("gpt2", None, None, path=[early, middle, ends])
        assert bool(out.cells["path"].elided.all()) is elided


@pytest.mark.parametrize("engine", ["cone", "full"])
def test_what_comes_from_elsewhere_may_go_where_its_source_has_padding(engine: str) -> None:
    masks = {
        "source_attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]] * 3),
        "target_attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [0] + [1] * 5]),
        "engine": engine,
    }
    where = {"seq_pos": [[0, 5], [2, 3], [1, 4]], "source_seq_pos": [[3, 2], [5, 3], [4, 2]]}
    sites = Sites("mlp", layers=[0], seq_pos_type="custom", **where)
    found, expected = paths("qwen3", sites, "resid_pre1", **masks), patched("qwen3", sites, **masks)
    same(raw(found), raw(expected, "mlp"))
    for column in raw(found):
        assert differ(column[0], found.baselines["logit_difference"].target[0])


@pytest.mark.parametrize("engine", ["cone", "full"])
def test_answers_of_several_tokens_repeat_the_prompts(engine: str) -> None:
    """Positions of each prompt too, and what is appended is never patched."""
    options = {
        "metric": ["sequence_log_probability_difference", "logit_difference"],
        "source_answer_tokens": torch.tensor([[3, 4], [4, -1], [5, 6]]),
        "target_answer_tokens": torch.tensor([[6, -1], [7, 8], [8, -1]]),
        "engine": engine,
    }
    for strategy in ("of each prompt", "spans", "from elsewhere", "everywhere"):
        sites = Sites("mlp", layers=[0], **STRATEGIES[strategy])
        out = paths("gemma2", sites, "resid_pre1", **options)
        expected = patched("gemma2", sites, **options)
        for metric in out.metrics:
            same(out.raw[metric]["path"], expected.raw[metric]["mlp"])
