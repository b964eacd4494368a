"""The examples of docs/examples: the facts that their page tells, and cells against plain hooks.

The scripts sweep all layers; here it is some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from nnpatch_core import Circuit, PromptPairs, edge_patching, evaluate_circuit
from nnpatch_core.edges import Nodes
from tests.helpers.oracle import Donor, Oracle, Place, Prompt
from tests.helpers.paths import ROOT
from tests.models.real import Real, smollm2_135m

import circuit_of_capitals  # isort: skip - found by tests.models.real
import circuit_of_names  # isort: skip
import circuits_found  # isort: skip
import context_or_memory  # isort: skip
import first_or_second  # isort: skip
import greater_than  # isort: skip
import induction  # isort: skip
import long_answers  # isort: skip
import repeated_names  # isort: skip

#: On differences of up to 40; at most 3e-5 was measured.
ATOL = 1e-4
LAST = 1


@pytest.fixture(scope="module")
def known() -> Real:
    return smollm2_135m()


def tokens_of(known: Real, texts: Sequence[str]) -> list[Prompt]:
    return [tuple(known.tokenizer(text).input_ids) for text in texts]


def texts_of(known: Real, pairs: PromptPairs) -> tuple[list[Prompt], list[Prompt]]:
    """Both prompts of each pair, from their texts."""
    source, target = zip(*((each.source, each.target) for each in pairs.pairs), strict=True)
    return tokens_of(known, source), tokens_of(known, target)


def token(known: Real, answer: str) -> int:
    (found,) = known.tokenizer(answer).input_ids
    return found


def shifted(oracle: Oracle, source: Prompt, by: int) -> Donor:
    """What the source has that many tokens nearer to its end, as where more follows in the run."""

    def donor(place: Place, back: int) -> Tensor:
        found = oracle.activation(source, place.component, place.layer)
        return oracle.part(found[len(source) - (back - by)], place)

    return donor


# Repeated names -----------------------------------------------------------------------------------


def test_the_repeated_name_is_at_s2_and_then_at_the_end(known: Real) -> None:
    pairs = repeated_names.prompts(known.tokenizer)
    assert sorted(set(pairs.source_attention_mask.sum(1).tolist())) == [14, 15, 16, 21]
    out = repeated_names.by_span(known.model, pairs, [0, 15, 18, 21, 23, 24])
    groups = out.by_group("template")
    assert len(groups) == 3
    for part in (out, *groups.values()):
        s2, verb, last = part["resid"].T
        assert (s2[[0, 15, 18]] > 0.95).all()
        assert (last[[0, 15, 18]] < 0.05).all()
        # On the way both have some of it.
        assert 0.3 < s2[21] < 0.75
        assert 0.2 < last[21] < 0.7
        assert (s2[24] < 0.1) & (last[24] > 0.85)
        assert (verb.abs() < 0.1).all()
    # Attention brings it there, above all that of layer 23.
    assert out["attn"][23, 2] > 0.7
    assert out["attn"][:, 2].argmax() == 23
    source, target = texts_of(known, pairs)
    answers = [
        [token(known, str(text)) for text in (pair.source_answer, pair.target_answer)]
        for pair in pairs.pairs
    ]
    for component, layer, at in (("resid", 21, 0), ("attn", 23, 2), ("mlp", 0, 0)):
        expected = []
        for one, other, (right, wrong) in zip(source, target, answers, strict=True):
            (s2_place,) = [n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
            back = LAST if at else len(other) - s2_place
            logits = known.oracle.patched(other, one, Place(component, layer, None, (back,)))
            expected.append(logits[right] - logits[wrong])
        found = out.patched(component)[layer, at]
        torch.testing.assert_close(found, torch.stack(expected), atol=ATOL, rtol=0)


def test_few_heads_move_the_name(known: Real) -> None:
    pairs = repeated_names.prompts(known.tokenizer)
    heads = repeated_names.by_head(known.model, pairs, [17, 20, 23, 24])
    strongest, second, third = heads.strongest(3)
    assert (strongest["layer"], strongest["head"]) == (23, 3)
    assert strongest["value"] > 0.4
    assert {(cell["layer"], cell["head"]) for cell in (second, third)} == {(20, 0), (24, 4)}
    # One moves it, and one takes a part of it back, as negative name movers do.
    assert heads["o"][20, 0] > 0.2
    assert heads["o"][24, 4] < -0.15
    source, target = texts_of(known, pairs)
    for number in (0, 5, 11):
        pair, place = pairs.pairs[number], Place("o", 23, 3, (LAST,))
        logits = known.oracle.patched(target[number], source[number], place)
        right, wrong = (
            token(known, str(text)) for text in (pair.source_answer, pair.target_answer)
        )
        found = heads.patched("o")[23, 3, number]
        torch.testing.assert_close(found, logits[right] - logits[wrong], atol=ATOL, rtol=0)


# Greater than -------------------------------------------------------------------------------------


def test_the_year_moves_to_the_end_and_blocks_there_compare_it(known: Real) -> None:
    pairs = greater_than.prompts(known.tokenizer)
    out = greater_than.sweep(known.model, pairs, [0, 15, 18, 20, 23, 24])
    assert (out.baseline.source > 3).all()
    assert (out.baseline.target < -2).all()
    tens, ones, last = out["resid"][:, [9, 10, -1]].T
    assert (tens[0] > 0.9) & (tens[15] > 0.7) & (tens[20] < 0.25) & (tens[23] < 0.01)
    assert (last[0] < 0.01) & (last[15] < 0.15) & (last[20] > 0.75) & (last[23] > 0.95)
    # The units do not matter for the tens.
    assert ones.abs().max() < 0.1
    # Attention moves the year there, and what comes after it adds to the answer.
    assert out["attn"][:, -1].argmax() == 20
    assert out["mlp"][[23, 24], -1].min() > 0.2
    source, target = texts_of(known, pairs)
    digits = [token(known, str(digit)) for digit in range(10)]
    for component, layer, back in (("attn", 20, LAST), ("mlp", 24, LAST), ("resid", 15, 8)):
        expected = []
        for one, other, (_, year) in zip(source, target, greater_than.YEARS, strict=True):
            logits = known.oracle.patched(other, one, Place(component, layer, None, (back,)))
            later, before = digits[year // 10 + 1 :], digits[: year // 10]
            expected.append(logits[later].logsumexp(0) - logits[before].logsumexp(0))
        found = out.patched(component)[layer, out["resid"].shape[1] - back]
        torch.testing.assert_close(found, torch.stack(expected), atol=ATOL, rtol=0)
        assert (found - out.baseline.target).abs().max() > 1000 * ATOL


# Long answers -------------------------------------------------------------------------------------


def sequence(known: Real, pair: tuple[Prompt, Prompt], answer: Prompt, place: Place) -> float:
    """Sum of log p of an answer's tokens, one run for each, the prompt's `place` patched in all."""
    source, target = pair
    total = 0.0
    for number, its in enumerate(answer):
        at = tuple(back + number for back in place.from_end)
        donor = shifted(known.oracle, source, number)
        run = (*target, *answer[:number])
        logits = known.oracle.replaced(run, [place._replace(from_end=at)], donor)
        total += logits.double().log_softmax(-1)[its].item()
    return total


def test_each_token_of_an_answer_fetches_the_country_anew(known: Real) -> None:
    pairs = long_answers.prompts(known.tokenizer)
    out = long_answers.sweep(known.model, pairs, [0, 22, 23, 29])
    groups = out.by_group("tokens")
    for number, rows in pairs.groups("tokens").items():
        assert rows.source_answer_tokens is not None
        assert rows.target_answer_tokens is not None
        for ids in (rows.source_answer_tokens, rows.target_answer_tokens):
            assert (ids >= 0).sum(1).tolist() == [number] * 2
    # The country restores all tokens, as long as it is not read yet.
    for part in (out, *groups.values()):
        country, last = part["resid"].T
        assert (country[[0, 22]] > 0.9).all()
        assert (last[[0, 22]] < 0.15).all()
        assert country[23].abs() < 0.05
    # The last token restores the whole of one token, and less where more are to come.
    at_end = {number: group["resid"][29, 1].item() for number, group in groups.items()}
    assert at_end[1] == pytest.approx(1, abs=1e-4)
    assert 0.85 < at_end[2] < 0.97
    assert max(at_end[3], at_end[4]) < 0.7
    # The logit difference sees nothing of that.
    assert out.for_metric(long_answers.FIRST)["resid"][29, 1].item() == pytest.approx(1, abs=1e-4)
    source, target = texts_of(known, pairs)
    for component, layer, at in (("resid", 22, 0), ("resid", 29, 1), ("attn", 23, 1)):
        for number in (0, 3, 5, 6):
            pair = pairs.pairs[number]
            answers = tokens_of(known, [str(pair.source_answer), str(pair.target_answer)])
            place = Place(component, layer, None, ((2, LAST)[at],))
            prompts = source[number], target[number]
            one, other = (sequence(known, prompts, answer, place) for answer in answers)
            found = out.patched(component)[layer, at, number].item()
            assert found == pytest.approx(one - other, abs=3 * ATOL)


# Induction ----------------------------------------------------------------------------------------


def test_one_head_looks_back_and_another_one_finds_it(known: Real) -> None:
    tokens = induction.prompts(known.tokenizer)
    half, prompts = induction.HALF, [tuple(row) for row in tokens.tolist()]
    assert all(row[1 : half + 1] == row[half + 1 :] for row in prompts)
    out = induction.sweep(known.model, tokens, [16, 18])
    heads = out["o"]
    assert heads[16, 0] < -3
    assert heads[18, 6] < -1
    others = heads[[16, 18]].clone()
    others[0, 0] = others[1, 6] = 0
    assert others.abs().max() < 0.6
    # Nobody can know the first token; all later ones are known by the head.
    first, last = (out.for_metric(f"token {number}")["o"] for number in (0, half - 1))
    assert first[16, 0].abs() < 0.2
    assert last[16, 0] < -2.5
    for head, layer in ((0, 16), (6, 18)):
        place = Place("o", layer, head, tuple(range(1, len(prompts[0]) + 1)))
        expected = []
        for prompt in prompts:
            logits = known.oracle.replaced_at_each(prompt, [place], known.oracle.mean(prompts))
            own = [logits[at - 1].log_softmax(-1)[prompt[at]] for at in range(-half + 1, 0)]
            expected.append(torch.stack(own).mean())
        found = out.patched("o")[layer, head]
        torch.testing.assert_close(found, torch.stack(expected), atol=ATOL, rtol=0)
    # One attends to the token before, the other to what followed the last time.
    model = known.oracle.model
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(tokens, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    later = torch.arange(half + 2, 2 * half)
    assert attention[16][:, 0, later, later - 1].mean() > 0.8
    assert attention[18][:, 6, later, later - half + 1].mean() > 0.8


# Knobs --------------------------------------------------------------------------------------------


def test_one_direction_decides_between_context_and_memory(known: Real) -> None:
    pairs = context_or_memory.prompts(known.model, known.tokenizer, 120)
    assert len(pairs) > 25
    (learned,) = context_or_memory.learn(known.model, pairs, [context_or_memory.LAYER]).values()
    rows = learned.evaluation
    assert rows.accuracy.value > 0.9
    assert rows.target_accuracy.value < 0.1
    # It is no matter of rank, and the stream itself carries it there.
    assert rows["random subspace"].accuracy.value < 0.1
    assert rows["random labels"].accuracy.value < 0.4
    assert rows["whole component"].accuracy.value > 0.5
    # Turned one way the model answers from the context, and turned the other way from memory.
    ends = sorted(context_or_memory.ends(known.model, learned))
    curve = context_or_memory.turn(known.model, learned, ends)
    shares = curve.source.probability.mean(1)
    assert abs(float(shares[1] - shares[0])) > 0.4


def test_one_direction_decides_between_the_first_and_the_second_name(known: Real) -> None:
    pairs = first_or_second.prompts(known.model, known.tokenizer, 60)
    assert len(pairs) > 25
    (learned,) = first_or_second.learn(known.model, pairs, [first_or_second.LAYER]).values()
    rows = learned.evaluation
    assert rows.accuracy.value > 0.5
    assert rows["random subspace"].accuracy.value < 0.1


# Circuits -----------------------------------------------------------------------------------------

NODES = Nodes(query=[9] * 30, key_value=[3] * 30, parallel=[False] * 30)


@pytest.mark.parametrize(
    ("example", "edges", "elsewhere"),
    [(circuit_of_names, 665, 0.74), (circuit_of_capitals, 346, 0.78)],
)
def test_circuits_do_alone_what_the_model_does(
    known: Real, example: Any, edges: int, elsewhere: float
) -> None:
    """The circuits that the examples have found, as they have kept them."""
    name = example.__name__.replace("_", "-")
    circuit = circuits_found.read(ROOT / "docs" / "_static" / "examples" / f"{name}.json", NODES)
    assert len(circuit) == edges
    assert circuit.pruned() == circuit
    pairs = example.prompts(known.tokenizer)
    others = example.prompts(known.tokenizer, held_out=True)
    assert not {*pairs.source_answer_index.tolist()} & {*others.source_answer_index.tolist()}
    without = {"found": circuit, "all but it": Circuit.of(NODES, NODES) - circuit}
    found = evaluate_circuit(known.model, None, without, pairs, progress=False)
    assert found["found"] == pytest.approx(0.9, abs=0.01)
    assert abs(found["all but it"]) < 0.01
    # It fits the pairs that it was found on: elsewhere it is less faithful, and much better than 0.
    sentence = example.prompts(known.tokenizer, held_out=True, template=example.OTHER)
    values = [
        float(evaluate_circuit(known.model, None, circuit, own, progress=False))
        for own in (others, sentence)
    ]
    assert 0.85 > values[0] > values[1]
    assert values[1] == pytest.approx(elsewhere, abs=0.01)


def test_few_edges_carry_most_of_it(known: Real) -> None:
    strongest = {"input->m0": 0.984, "m0->a23.h1<v>": 0.254, "a23.h3->logits": 0.423}
    strongest |= {"a29.h0->logits": -0.201, "a24.h4->logits": -0.169}
    senders, receivers = zip(*(edge.split("->") for edge in strongest), strict=True)
    pairs = circuit_of_names.prompts(known.tokenizer)
    edges = edge_patching(
        known.model, None, pairs, senders=senders[1:], receivers=receivers[1:], progress=False
    )
    for edge in [*strongest][1:]:
        assert edges[edge] == pytest.approx(strongest[edge], abs=2e-3)
    first = edge_patching(known.model, None, pairs, senders="input", receivers="m0", progress=False)
    assert first["input->m0"] == pytest.approx(strongest["input->m0"], abs=2e-3)
