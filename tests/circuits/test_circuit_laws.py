"""What holds of circuits whatever the model: their ends, how they are cut, and planted ones."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nnpatch_core import per_prompt
from nnpatch_core.circuits import Circuit, evaluate_circuit
from nnpatch_core.edges import Nodes
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.edge_pairs import EVEN, Pairs
from tests.helpers.planted_cases import EACH, planted
from tests.helpers.undisturbed import bent, check_state, compared, state_of

#: Padding is a part of what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

MODEL, API = tiny_model("llama"), tiny_api()
NODES = Nodes((4,) * 3, (2,) * 3, (False,) * 3)
WHOLE, NONE = Circuit.of(NODES, NODES), Circuit.of(NODES, [])
ROUNDING = 2e-5
METRIC = {"logit_difference": "logit_difference", "bent": bent, "compared": compared}
#: What is outside.
OUTSIDE: dict[str, dict[str, Any]] = {
    "target": {},
    "zero": {"ablation": "zero"},
    "mean": {"ablation": "mean"},
    "mean per position": {"ablation": "mean", "per_position": True},
    "resample": {"ablation": "resample", "seed": 1},
}
#: What is there is of the batch as a whole.
OF_THE_BATCH = ("mean", "mean per position", "resample")


def drawn(share: float, seed: int = 0) -> Circuit:
    """A circuit that has each edge with some probability."""
    draw = random.Random(seed)
    return Circuit.of(NODES, [edge for edge in NODES if draw.random() < share])


CIRCUITS = {
    "whole": WHOLE,
    "none": NONE,
    **{f"{share}": drawn(share) for share in (0.05, 0.2, 0.5, 0.8, 0.95)},
}


def evaluated(circuits: Any = CIRCUITS, pairs: Pairs = EVEN, **options: Any) -> Any:
    given = {"metric": METRIC, "progress": False, **pairs.arguments(), **options}
    return evaluate_circuit(given.pop("model", MODEL), API, circuits, **given)


def raw(found: Any) -> Tensor:
    """`[metrics, circuits, prompts]`."""
    every = found.outcome.raw
    return torch.stack([every[metric]["circuit"].double() for metric in every])


@functools.cache
def reference(what: str = "target") -> Tensor:
    return raw(evaluated(**OUTSIDE[what]))


outside = pytest.mark.parametrize("what", OUTSIDE)


# Its ends.


@outside
def test_all_edges_are_the_source_run_and_none_the_other(what: str) -> None:
    found = evaluated(**OUTSIDE[what])
    for number, baseline in enumerate(found.outcome.baselines.values()):
        whole, none, *_ = raw(found)[number]
        torch.testing.assert_close(whole, baseline.source.double(), rtol=0, atol=ROUNDING)
        torch.testing.assert_close(none, baseline.target.double(), rtol=0, atol=ROUNDING)
    assert found["whole"] == pytest.approx(1, abs=1e-4)
    assert found["none"] == pytest.approx(0, abs=1e-4)
    assert float(found) == found["whole"]


@outside
def test_faithfulness_is_how_far_the_mean_has_moved(what: str) -> None:
    found = evaluated(**OUTSIDE[what])
    whole, none, *_ = means = raw(found)[0].mean(-1)
    torch.testing.assert_close(found.raw, means)
    expected = (means - none) / (whole - none)
    torch.testing.assert_close(found.faithfulness.double(), expected, rtol=0, atol=1e-4)


def test_swapped_the_ends_change_places() -> None:
    """All edges are the target run, and none the source run; answers stay."""
    plain, swapped = (raw(evaluated({"whole": WHOLE, "none": NONE}, swap=swap)) for swap in (0, 1))
    torch.testing.assert_close(swapped, plain.flip(1), rtol=0, atol=ROUNDING)


def test_swapping_is_giving_the_prompts_the_other_way_round() -> None:
    given = EVEN.arguments()
    turned = {
        f"{one}_{part}": given[f"{other}_{part}"]
        for one, other in (("source", "target"), ("target", "source"))
        for part in ("tokens", "attention_mask")
    }
    for what in ("target", "mean"):
        found, expected = (
            raw(evaluated(**OUTSIDE[what], **options)) for options in (turned, {"swap": True})
        )
        assert found.equal(expected), what


# What changes nothing.


def test_edges_that_lead_nowhere_change_nothing() -> None:
    """Outside of a circuit is the target run: then what it prunes computes what is there anyway."""
    for seed in range(4):
        circuits = [drawn(share, seed) for share in (0.05, 0.1, 0.2, 0.4)]
        assert any(len(each.pruned()) < len(each) for each in circuits)
        found, pruned = (
            raw(evaluated(some)) for some in (circuits, [each.pruned() for each in circuits])
        )
        torch.testing.assert_close(found, pruned, rtol=0, atol=ROUNDING)


@outside
def test_edges_from_which_nothing_leads_on_change_nothing(what: str) -> None:
    """Also where the rest is ablated."""
    circuit = drawn(0.5)
    unread = [edge for edge in circuit if not edge.endswith(("m1", "a1.h2<q>"))]
    unread = [edge for edge in unread if not edge.startswith(("m1->", "a1.h2->"))]
    more = ["input->m1", "a0.h0->m1", "input->a1.h2<q>"]
    one, other = raw(
        evaluated([Circuit.of(NODES, unread), Circuit.of(NODES, unread + more)], **OUTSIDE[what])
    ).unbind(1)
    torch.testing.assert_close(one, other, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("sender", ["m1", "a1.h1"])
def test_edges_of_what_reads_nothing_matter_where_the_rest_is_ablated(sender: str) -> None:
    """It makes something of an ablated stream, too; so pruning is a change there."""
    circuit = Circuit.of(NODES, ["input->logits", f"{sender}->logits"])
    found, pruned = raw(evaluated([circuit, circuit.pruned()], ablation="mean"))[0]
    assert (found - pruned).abs().max() > 0.01


def test_a_mean_of_one_prompt_at_each_position_is_that_prompt() -> None:
    """So ablating by it is the target run's values, as is a resample from the prompt itself."""
    for row in range(len(EVEN.sources)):
        pairs = EVEN.some(row)
        expected = raw(evaluated(pairs=pairs, metric="logit_difference"))
        alone = pairs.arguments()["target_tokens"]
        for options in (
            {"ablation": "mean", "per_position": True},
            {"ablation": "resample", "reference": alone},
        ):
            found = raw(evaluated(pairs=pairs, metric="logit_difference", **options))
            torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


# However it is cut.


@outside
@pytest.mark.parametrize(
    "cut", [{"batch_size": 1}, {"batch_size": 2}, {"memory_budget": "260 KiB"}], ids=str
)
def test_cuts_give_the_same_numbers(what: str, cut: dict[str, Any]) -> None:
    assert (raw(evaluated(**OUTSIDE[what], **cut)) - reference(what)).abs().max() < ROUNDING


@outside
def test_circuits_may_come_in_any_order_and_alone(what: str) -> None:
    names = random.Random(1).sample([*CIRCUITS], len(CIRCUITS))
    found = evaluated({name: CIRCUITS[name] for name in names}, **OUTSIDE[what])
    assert found.names == tuple(names)
    order = [[*CIRCUITS].index(name) for name in names]
    assert (raw(found) - reference(what)[:, order]).abs().max() < ROUNDING
    for number, circuit in enumerate(CIRCUITS.values()):
        alone = raw(evaluated(circuit, **OUTSIDE[what]))
        assert (alone[:, 0] - reference(what)[:, number]).abs().max() < ROUNDING


@pytest.mark.parametrize("what", [each for each in OUTSIDE if each != "resample"])
def test_prompts_may_come_in_any_order(what: str) -> None:
    order = [2, 0, 1]
    found = raw(evaluated(pairs=EVEN.some(*order), **OUTSIDE[what]))
    assert (found - reference(what)[..., order]).abs().max() < ROUNDING


@pytest.mark.parametrize("what", ["target", "zero"])
def test_a_prompt_gives_in_a_padded_batch_what_it_gives_alone(what: str) -> None:
    for row in range(len(EVEN.sources)):
        alone = raw(evaluated(pairs=EVEN.some(row), **OUTSIDE[what]))[:2]
        assert (alone[..., 0] - reference(what)[:2, ..., row]).abs().max() < ROUNDING


@outside
def test_the_side_and_the_width_of_the_padding_do_not_matter(what: str) -> None:
    given = EVEN.arguments()
    right, wide = dict(given), dict(given)
    for name in ("source_tokens", "target_tokens"):
        mask = f"{name.partition('_')[0]}_attention_mask"
        rows = [
            (tokens[own.bool()], own[own.bool()])
            for tokens, own in zip(given[name], given[mask], strict=True)
        ]
        for part, key in enumerate((name, mask)):
            right[key] = torch.nn.utils.rnn.pad_sequence([row[part] for row in rows], True)
            wide[key] = torch.nn.functional.pad(given[key], (3, 0))
    for laid in (right, wide):
        found = evaluated(**{**laid, **OUTSIDE[what]})
        assert (raw(found) - reference(what)).abs().max() < ROUNDING


def test_the_same_call_gives_the_same_bits_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    model.model.layers[1].train()
    before = state_of(model)
    first, second = (raw(evaluated(model=model, complement=True, random=2)) for _ in range(2))
    assert first.equal(second)
    check_state(before, state_of(model))


@settings(max_examples=10)
@given(st.sets(st.sampled_from(list(NODES))), st.sampled_from(list(OUTSIDE)))
def test_the_complement_of_the_complement_is_the_circuit(edges: Iterable[str], what: str) -> None:
    circuit = Circuit.of(NODES, edges)
    found = evaluated({"it": circuit}, complement=True, **OUTSIDE[what])
    other = found.circuits["all without it"]
    assert other & circuit == NONE
    assert other | circuit == WHOLE
    again = evaluated({"it": other}, complement=True, **OUTSIDE[what])
    torch.testing.assert_close(raw(again).flip(1), raw(found), rtol=0, atol=ROUNDING)


# Planted circuits.


@functools.cache
def of_planted(name: str) -> Any:
    model = planted(name)
    every = Nodes(
        (4,) * model.model.config.num_hidden_layers,
        (2,) * model.model.config.num_hidden_layers,
        (False,) * model.model.config.num_hidden_layers,
    )
    edges = model.edges if name != "redundant, no leak" else planted("redundant").edges
    return evaluate_circuit(
        model.model,
        None,
        Circuit.of(every, edges),
        model.source_tokens,
        model.target_tokens,
        model.source_answer_index,
        model.target_answer_index,
        complement=True,
        random=2,
        minimality=True,
        progress=False,
    )


@EACH
def test_a_planted_circuit_is_all_there_is(name: str) -> None:
    """So is both paths of an OR, and a backup head with its main head."""
    found = of_planted(name)
    assert float(found) == pytest.approx(1, abs=1e-4)
    assert found["all without circuit"] == pytest.approx(0, abs=1e-4)
    for number in range(2):
        assert found[f"random circuit {number}"] == pytest.approx(0, abs=1e-4)


@EACH
def test_what_a_planted_circuit_loses_without_an_edge(name: str) -> None:
    """What the edge is worth, but in an OR that is off: there each path is missed alone."""
    lost, circuit = of_planted(name).minimality(), planted(name)
    if name in ("redundant", "redundant, no leak", "redundant, restored"):
        leak = {"redundant": 0.05, "redundant, no leak": 0.0, "redundant, restored": 0.05}[name]
        off = name != "redundant, restored"
        paths = dict.fromkeys(planted("redundant").edges, 1 - leak if off else leak)
        expected = {**paths, "m1->logits": 1.0}
    else:
        expected = dict(circuit.values)
    assert lost == pytest.approx(expected, abs=1e-3)
    assert list(map(abs, lost.values())) == sorted(map(abs, lost.values()), reverse=True)


@per_prompt
def source_logit(logits: Tensor, context: Any) -> Tensor:
    return logits.gather(1, context.source_answer_index[:, None])[:, 0]


def test_one_edge_from_the_input_to_the_logits_is_the_exact_edge() -> None:
    """Nothing else carries what the input changes."""
    from nnpatch_core import edge_patching

    circuit = Circuit.of(NODES, ["input->logits"])
    found = evaluated(circuit, metric=source_logit)
    edges = edge_patching(
        MODEL,
        API,
        **EVEN.arguments(),
        senders="input",
        receivers="logits",
        metric=source_logit,
        progress=False,
    )
    assert float(found) == pytest.approx(edges["input->logits"], abs=1e-5)
