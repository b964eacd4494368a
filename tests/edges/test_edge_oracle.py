"""The oracle of edges, paths and circuits against itself, plain patching and formulas."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import random
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from nnpatch_core.testing import tiny_model
from tests.helpers import attribution_oracle, edge_oracle, edges_by_hand, family_oracle, oracle
from tests.helpers.edge_oracle import INPUT, LOGITS, WIRINGS, EdgeOracle, edge_of, name_of, node_of
from tests.helpers.edges_by_hand import ByHand
from tests.helpers.families import FAMILIES, model_of
from tests.helpers.oracle import random_prompts

SOURCE, TARGET = random_prompts((6, 6), seed=1)
#: In float64 equal things differ by this at most; the smallest effects looked at are far larger.
ATOL = 1e-12
PARALLEL = [name for name, wirings in WIRINGS.items() if all(each.parallel for each in wirings)]
AFTER_NORMS = [name for name, wirings in WIRINGS.items() if any(each.attn_post for each in wirings)]
families = pytest.mark.parametrize("family", sorted(WIRINGS))


@functools.cache
def plain(family: str) -> Any:
    """A tiny model of a family, in float32."""
    if family in FAMILIES:
        return model_of(family)
    options = {"use_parallel_residual": False} if family.startswith("gpt_neox,") else {}
    return tiny_model(family.split(",")[0], num_hidden_layers=2, **options)


@functools.cache
def oracle_of(family: str) -> EdgeOracle:
    return EdgeOracle(copy.deepcopy(plain(family)).double(), family)


@functools.cache
def by_hand(family: str) -> ByHand:
    return ByHand(copy.deepcopy(plain(family)).double())


def drawn(family: str, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Random edges: sender and receiver."""
    edges = random.Random(f"{family} {seed}").sample(oracle_of(family).edges(), count)
    return [(sender, receiver) for sender, _, receiver in (each.partition("->") for each in edges)]


def same(found: Tensor, expected: Tensor, atol: float = ATOL) -> None:
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def differ(one: Tensor, other: Tensor, least: float = 1e-9) -> bool:
    return bool((one - other).abs().max() > least)


@pytest.mark.parametrize(
    "module", [edge_oracle, edges_by_hand, family_oracle, attribution_oracle, oracle]
)
def test_no_code_is_shared_with_nnpatch(module: ModuleType) -> None:
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not [name for name in names if name.startswith("nnpatch")]


# The ends: everything, and nothing.


@families
def test_all_edges_are_the_source_run_and_none_the_target_run(family: str) -> None:
    tested = oracle_of(family)
    source, target = tested.logits(SOURCE), tested.logits(TARGET)
    assert differ(source, target, 1e-3)
    edges = set(tested.edges())
    same(tested.circuit(SOURCE, TARGET, edges), source)
    same(tested.circuit(SOURCE, TARGET, set()), target)
    same(tested.circuit(SOURCE, TARGET, edges, value="zero"), source)
    same(
        tested.circuit(SOURCE, TARGET, set(), value=lambda node: tested._value(SOURCE, node)),
        source,
    )


@families
def test_no_edges_and_zeros_are_a_stream_of_what_is_added_to_nothing(family: str) -> None:
    tested = oracle_of(family)
    layers = range(len(tested.layers))
    zeros = [torch.zeros_like(tested.activation(TARGET, "o", layer)) for layer in layers]
    stream = sum(tested._added(layer, z) for layer, z in zip(layers, zeros, strict=True))
    expected = tested.logits(SOURCE, tested._holding(SOURCE, {LOGITS: stream}))
    same(tested.circuit(SOURCE, TARGET, set(), value="zero"), expected)


@families
def test_all_senders_at_once_make_the_final_stream_of_the_source(family: str) -> None:
    tested = oracle_of(family)
    everything = tested.path(SOURCE, TARGET, tested.senders(), [LOGITS])
    same(everything, tested.logits(SOURCE))
    run = tested._frozen(
        TARGET, {each: tested._value(SOURCE, each) for each in tested.senders()}, None
    )
    last = ("resid", len(tested.layers) - 1)
    same(run[last], tested.activation(SOURCE, *last))
    # A norm after the projection is of all heads, so that what they change alone does not add up.
    alone = sum(tested.change(SOURCE, TARGET, each) for each in tested.senders())
    moved = run[last] - tested.activation(TARGET, *last)
    assert differ(alone, moved, ATOL) == (family in AFTER_NORMS)
    assert not differ(alone, moved, ATOL) or differ(alone, moved, 1e-3)


# Edges are patches, paths and circuits where these say the same.


@families
def test_into_the_logits_the_last_layer_is_patched(family: str) -> None:
    tested = oracle_of(family)
    last = len(tested.layers) - 1
    backs = range(1, len(TARGET) + 1)
    nodes = [("mlp", last)]
    if tested.wirings[last].parallel:
        nodes += [("o", last, head) for head in tested.heads("o", last)]
    for node in nodes:
        spots = [(node[0], last, node[2] if len(node) == 3 else None, back) for back in backs]
        expected = tested.patched(TARGET, SOURCE, spots)
        same(tested.edge(SOURCE, TARGET, node, LOGITS), expected)
        assert differ(expected, tested.logits(TARGET))
        one = tested.patched(TARGET, SOURCE, spots[2:3])
        same(tested.edge(SOURCE, TARGET, node, LOGITS, positions=[3]), one)


@families
def test_an_edge_is_a_path(family: str) -> None:
    tested = oracle_of(family)
    moved = 0
    for sender, receiver in drawn(family, 8):
        found = tested.edge(SOURCE, TARGET, sender, receiver)
        same(found, tested.path(SOURCE, TARGET, [sender], [receiver]))
        moved += differ(found, tested.logits(TARGET), 1e-6)
        for value in ("zero", "target"):
            found = tested.edge(SOURCE, TARGET, sender, receiver, value=value)
            same(found, tested.path(SOURCE, TARGET, [sender], [receiver], value=value))
        same(found, tested.logits(TARGET))
    assert moved >= 5


@families
def test_an_edge_from_the_input_is_a_circuit_of_all_else(family: str) -> None:
    """All edges but those from the input make a run of the target that goes on freely."""
    tested = oracle_of(family)
    rest = {each for each in tested.edges() if not each.startswith("input->")}
    same(tested.circuit(SOURCE, TARGET, rest), tested.logits(TARGET))
    for _, receiver in drawn(family, 5):
        found = tested.edge(SOURCE, TARGET, "input", receiver)
        same(found, tested.circuit(SOURCE, TARGET, rest | {f"input->{receiver}"}))


@families
def test_a_chain_from_the_input_is_a_circuit(family: str) -> None:
    tested = oracle_of(family)
    for kind in "qkv":
        first = (kind, 0, len(tested.heads(kind, 0)) - 1)
        heads = [("o", 0, head) for head in tested._readers(first)]
        for way in ([], [("mlp", 1)], [("v", 1, 0)]):
            # What a head of layer 1 sends on is all heads that read it.
            second = (
                [("o", 1, head) for head in tested._readers(way[0])]
                if way and way[0][0] == "v"
                else way
            )
            edges = {edge_of(INPUT, first)}
            edges |= {edge_of(head, node) for head in heads for node in (way or [LOGITS])}
            edges |= {edge_of(node, LOGITS) for node in second}
            path = [[INPUT], [first], *([way] if way else []), [LOGITS]]
            same(tested.chain(SOURCE, TARGET, path), tested.circuit(SOURCE, TARGET, edges))
    edges = {"input->m0", "m0->m1", "m1->logits"}
    found = tested.chain(SOURCE, TARGET, [["input"], ["m0"], ["m1"], ["logits"]])
    same(found, tested.circuit(SOURCE, TARGET, edges))
    assert differ(found, tested.logits(TARGET))


@families
def test_a_path_through_mlps_is_a_circuit_of_them(family: str) -> None:
    tested = oracle_of(family)
    nodes = {"input", "logits", *(f"m{layer}" for layer in range(len(tested.layers)))}
    edges = {each for each in tested.edges() if set(each.split("->")) <= nodes}
    found = tested.path(SOURCE, TARGET, ["input"], ["logits"], through="mlps")
    same(found, tested.circuit(SOURCE, TARGET, edges))
    assert differ(found, tested.path(SOURCE, TARGET, ["input"], ["logits"]))


@families
def test_streams_are_read_by_all_that_read_them(family: str) -> None:
    tested = oracle_of(family)
    found = tested.path(SOURCE, TARGET, ["input"], [("resid_pre", 1)])
    # From there on the run is free; what the input adds to the stream is not changed in it.
    expected = tested.activation(TARGET, "resid_pre", 1) + tested.change(SOURCE, TARGET, "input")
    same(found, tested.logits(TARGET, tested._holding(TARGET, {("resid_pre", 1): expected})))
    assert differ(found, tested.logits(TARGET))
    same(tested.path(SOURCE, TARGET, ["input"], [INPUT]), tested.logits(SOURCE))


# Which edges there are.


def test_the_last_steps_of_a_layer_feed_what_is_later() -> None:
    tested = oracle_of("llama")
    assert len(tested.edges()) == len(set(tested.edges())) == 82
    assert set(tested.edges()) == set(by_hand("llama").edges())
    assert [name_of(each) for each in tested.senders()] == [
        "input", "a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0", "a1.h0", "a1.h1", "a1.h2", "a1.h3", "m1",
    ]  # fmt: skip
    assert [name_of(each) for each in tested.receivers()[:9]] == [
        "a0.h0<q>", "a0.h1<q>", "a0.h2<q>", "a0.h3<q>",
        "a0.h0<k>", "a0.h1<k>", "a0.h0<v>", "a0.h1<v>", "m0",
    ]  # fmt: skip
    for node in (*tested.senders(), *tested.receivers()):
        assert node_of(name_of(node)) == node


@families
def test_in_parallel_layers_neither_feeds_the_other(family: str) -> None:
    tested = oracle_of(family)
    layers = range(len(tested.layers))
    parallel = [tested.wirings[layer].parallel for layer in layers]
    edges = tested.edges()
    assert [f"a{layer}.h0->m{layer}" not in edges for layer in layers] == parallel
    for layer in layers:
        same_stream = torch.equal(
            tested.activation(TARGET, "mlp_reads", layer),
            tested.activation(TARGET, "resid_pre", layer),
        )
        assert same_stream == parallel[layer]


@pytest.mark.parametrize(
    "pair", ["m0->m0", "m0->a0.h0<q>", "a0.h0->a0.h1<v>", "m1->m0", "a0.h4->m1", "m0->a1.h2<k>"]
)
def test_all_else_is_an_error(pair: str) -> None:
    tested = oracle_of("llama")
    with pytest.raises(ValueError, match="no edge"):
        tested.edge(SOURCE, TARGET, *pair.split("->"))
    with pytest.raises(ValueError, match="no edge"):
        tested.circuit(SOURCE, TARGET, {pair})
    with pytest.raises(ValueError, match="no edge"):
        oracle_of("gptj").edge(SOURCE, TARGET, "a0.h0", "m0")


# Positions.


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "mixtral", "falcon"])
def test_positions_limit_what_is_swapped_and_held(family: str) -> None:
    tested = oracle_of(family)
    everywhere = range(1, 7)
    for sender, receiver in drawn(family, 5, seed=1):
        some = random.Random(receiver).sample(everywhere, 2)
        change = tested.change(SOURCE, TARGET, sender, some)
        whole = tested.change(SOURCE, TARGET, sender)
        for back in everywhere:
            same(change[-back], whole[-back] if back in some else torch.zeros_like(whole[-back]))
        found = tested.edge(SOURCE, TARGET, sender, receiver, some)
        same(found, tested.path(SOURCE, TARGET, [sender], [receiver], sender_positions=some))
        # Whatever stands at one token is made of what stands there.
        same(
            found,
            tested.path(
                SOURCE, TARGET, [sender], [receiver],
                sender_positions=some, receiver_positions=some,
            ),
        )  # fmt: skip
        same(
            found,
            tested.path(SOURCE, TARGET, [sender], [receiver], receiver_positions=some),
        )
        none = tested.path(SOURCE, TARGET, [sender], [receiver], receiver_positions=[])
        same(none, tested.logits(TARGET))


def test_a_shorter_prompt_gives_what_it_has() -> None:
    tested = oracle_of("llama")
    for source, target in ((SOURCE[2:], TARGET), (SOURCE, TARGET[2:])):
        for sender, receiver in drawn("llama", 4):
            found = tested.edge(source, target, sender, receiver)
            limited = tested.edge(source, target, sender, receiver, positions=range(1, 5))
            same(found, limited)
            same(found, tested.path(source, target, [sender], [receiver]))
            assert differ(found, tested.logits(target))
    with pytest.raises(ValueError, match="one length"):
        tested.circuit(SOURCE[2:], TARGET, set())


def test_positions_of_a_chain_are_those_of_its_members() -> None:
    tested = oracle_of("gemma2")
    path = [["input"], ["a0.h0<k>", "m0"], ["a1.h0<v>"]]
    whole = tested.chain(SOURCE, TARGET, path)
    same(whole, tested.chain(SOURCE, TARGET, path, positions=[range(1, 7)] * 3))
    nothing = tested.logits(TARGET)
    for number in range(3):
        positions = [None] * 3
        positions[number] = []
        same(tested.chain(SOURCE, TARGET, path, positions=positions), nothing)
        positions[number] = [1]
        assert differ(tested.chain(SOURCE, TARGET, path, positions=positions), whole)


# By formulas.

HAND = ("llama", "mistral", "granite", "gemma2")
by_formulas = pytest.mark.parametrize("family", HAND)


@by_formulas
def test_a_run_by_formulas(family: str) -> None:
    for prompt in (SOURCE, TARGET):
        run, tested = by_hand(family).run(prompt), oracle_of(family)
        same(run.logits, tested.logits(prompt))
        for node in tested.senders():
            same(run.values[name_of(node)], tested._value(prompt, node))
        for node in tested.receivers():
            same(run.values[name_of(node)], tested._value(prompt, node))
            same(run.streams[name_of(node)], tested.activation(prompt, *tested._reads(node)))


@by_formulas
def test_edges_by_formulas(family: str) -> None:
    tested, hand = oracle_of(family), by_hand(family)
    for number, edge in enumerate(tested.edges()):
        sender, receiver = edge.split("->")
        backs = [range(1, 7), [1], [2, 5]][number % 3]
        value = "zero" if number % 4 == 0 else "source"
        found = tested.edge(SOURCE, TARGET, sender, receiver, backs, value)
        same(found, hand.edge(SOURCE, TARGET, edge, backs, value == "zero"))


@by_formulas
def test_circuits_by_formulas(family: str) -> None:
    tested, hand = oracle_of(family), by_hand(family)
    seen = []
    for seed, share in enumerate((0.1, 0.5, 0.8, 0.95)):
        edges = tested.edges()
        some = set(random.Random(seed).sample(edges, int(share * len(edges))))
        seen.append(tested.circuit(SOURCE, TARGET, some))
        same(seen[-1], hand.circuit(SOURCE, TARGET, some))
    assert differ(seen[0], seen[-1], 1e-3)


def path_of(tested: EdgeOracle, seed: int) -> Sequence[Sequence[str]]:
    """Two to four entries of some nodes; what is sent reaches the logits."""
    draw = random.Random(seed)
    names = [name_of(each) for each in tested.receivers()]
    early, late = names[:9], names[9:-1]
    path = [["input", *draw.sample([name_of(each) for each in tested.senders()[1:6]], 2)]]
    if seed % 2:
        path.append(draw.sample(early, 3))
    if seed % 4 < 2:
        # The logits alone, as they would hide that another receiver is held.
        return [*path, ["logits"] if seed == 4 else draw.sample(late, 4)]
    # Of two layers, neither of which sees what the other one sends on.
    both = draw.sample(early, 2) if seed > 4 else []
    return [*path, [*both, *draw.sample(late[:-1], 3)], [draw.choice(["m1", "logits"])]]


@by_formulas
@pytest.mark.parametrize("through", [None, "mlps"])
def test_paths_by_formulas(family: str, through: str | None) -> None:
    tested, hand = oracle_of(family), by_hand(family)
    lengths = set()
    for seed in range(8):
        path = path_of(tested, seed)
        lengths.add(len(path))
        found = tested.chain(SOURCE, TARGET, path, through)
        same(found, hand.chain(SOURCE, TARGET, path, through))
        assert differ(found, tested.logits(TARGET))
    assert lengths == {2, 3, 4}


# The functions, and sizes.


def test_functions_ask_the_oracle() -> None:
    model, tested = plain("gemma2"), EdgeOracle(plain("gemma2"), "gemma2")
    source, target = list(SOURCE), list(TARGET)
    asked = (model, "gemma2", source, target)
    close = functools.partial(torch.testing.assert_close, atol=0, rtol=0)
    close(edge_oracle.edge(*asked, "a0.h1", "m1"), tested.edge(SOURCE, TARGET, "a0.h1", "m1"))
    found = edge_oracle.path(*asked, ["m0"], [("q", 1, None)], "mlps", [1, 2], [1])
    expected = tested.path(
        SOURCE, TARGET, ["m0"], [f"a1.h{head}<q>" for head in range(4)], "mlps", [1]
    )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    path = [["input"], ["m0"], ["logits"]]
    close(edge_oracle.chain(*asked, path), tested.chain(SOURCE, TARGET, path))
    some = set(tested.edges()[::2])
    close(edge_oracle.circuit(*asked, some, "zero"), tested.circuit(SOURCE, TARGET, some, "zero"))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_heads_may_have_another_size(family: str) -> None:
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}
    tested = EdgeOracle(tiny_model(family, **sizes).double(), family)
    assert len(tested.heads("k", 2)) == 3
    assert tested._columns(("o", 0, 5)) == [*range(80, 96)]
    same(tested.circuit(SOURCE, TARGET, tested.edges()), tested.logits(SOURCE))
    for edge in random.Random(0).sample(tested.edges(), 4):
        sender, receiver = edge.split("->")
        found = tested.edge(SOURCE, TARGET, sender, receiver)
        same(found, tested.path(SOURCE, TARGET, [sender], [receiver]))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ([["a0.h9"], ["m1"]], "no sender"),
        ([["m0"]], "senders and receivers"),
        ([["input"], [("resid_pre", 1)], ["logits"]], "send on"),
        ([["x3"], ["m1"]], "no node"),
    ],
)
def test_what_is_no_path_is_an_error(path: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        oracle_of("llama").chain(SOURCE, TARGET, path)
    with pytest.raises(ValueError, match="through"):
        oracle_of("llama").chain(SOURCE, TARGET, [["m0"], ["m1"]], "heads")
    with pytest.raises(ValueError, match="value must be"):
        oracle_of("llama").edge(SOURCE, TARGET, "m0", "m1", value="mean")
