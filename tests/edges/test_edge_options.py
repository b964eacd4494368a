"""What `edge_patching` is told of senders: their positions, and ablations."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from nnpatch_core import Custom, CustomConstant, Span
from nnpatch_core.errors import (
    CheckpointError,
    PatchingError,
    PositionError,
)
from nnpatch_core.testing import tiny_model
from tests.helpers import edge_pairs
from tests.helpers.edge_derivatives import EdgeDerivatives
from tests.helpers.edge_oracle import EdgeOracle
from tests.helpers.edge_pairs import (
    EVEN,
    UNEVEN,
    Pairs,
    from_oracle,
    means,
    means_by_place,
    numbers,
    raw,
)
from tests.helpers.faults import broken_after

#: Padding is a part of what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

#: Some of each kind of sender and receiver.
SOME = (
    "input->a0.h1<q>",
    "input->a1.h0<v>",
    "input->m0",
    "a0.h2->a1.h1<k>",
    "a0.h1->m0",
    "a0.h3->m1",
    "m0->a1.h2<q>",
    "m0->logits",
    "a1.h0->m1",
    "a1.h3->logits",
)
#: These, and what comes of naming their nodes.
NAMED = {
    "senders": sorted({edge.partition("->")[0] for edge in SOME}),
    "receivers": sorted({edge.partition("->")[2] for edge in SOME}),
}
NEAR = {"abs": 2e-5}
ENGINES = pytest.mark.parametrize("engine", ["cone", "full"])


@functools.cache
def model() -> Any:
    return tiny_model("gemma2", num_hidden_layers=2)


@functools.cache
def oracle() -> EdgeOracle:
    return EdgeOracle(model(), "gemma2")


def patched(pairs: Pairs = UNEVEN, **options: Any) -> Any:
    return edge_pairs.patched(model(), pairs, **{**NAMED, **options})


def check(found: Tensor, expected: list[float]) -> None:
    assert found.tolist() == pytest.approx(expected, **NEAR)


# Where senders are changed.


@ENGINES
@pytest.mark.parametrize("roles", ["denoising", "noising"])
def test_edges_of_prompts_of_other_lengths(engine: str, roles: str) -> None:
    pairs = UNEVEN
    if roles == "noising":
        pairs = Pairs(pairs.targets, pairs.sources, pairs.answers[::-1])
    found = numbers(patched(pairs, engine=engine))
    for edge in SOME:
        check(found[edge], [from_oracle(oracle(), pairs, edge, row) for row in range(3)])


@ENGINES
@pytest.mark.parametrize(
    ("strategy", "axis", "groups"),
    [
        # For each place on the axis of positions, or for the one group, places from the end.
        ({"seq_pos_type": "each"}, "position", {place: [7 - place] for place in range(7)}),
        ({"seq_pos_type": "last"}, None, [1]),
        ({"seq_pos_type": "lastk", "seq_pos": 2}, "position", {5: [2], 6: [1]}),
        ({"seq_pos_type": "custom", "seq_pos": [-3, 6]}, "position", {4: [3], 6: [1]}),
        ({"seq_pos_type": "custom_constant", "seq_pos": [-3, -1]}, None, [1, 3]),
        ({"seq_pos_type": CustomConstant([-2, -4])}, None, [2, 4]),
    ],
)
def test_senders_are_changed_at_positions(
    engine: str, strategy: dict[str, Any], axis: str | None, groups: Any
) -> None:
    edges = patched(engine=engine, **strategy)
    axes = [each.name for each in edges.outcome.axes("edge")]
    assert axes == ["sender", "receiver", *([] if axis is None else [axis])]
    found = numbers(edges)
    for edge in SOME:
        for place, backs in groups.items() if axis else [(None, groups)]:
            key = edge if place is None else (edge, place)
            expected = [from_oracle(oracle(), UNEVEN, edge, row, backs) for row in range(3)]
            check(found[key], expected)
            if axis:
                value = edges[edge][place]
                assert value == pytest.approx(edges.matrix[edges.nodes.place(edge)][place].item())


@ENGINES
def test_positions_of_each_prompt(engine: str) -> None:
    # Of each prompt two columns, of tokens that both prompts have.
    backs = [[5, 2], [3, 1], [2, 4]]
    at = torch.tensor([[7 - back for back in row] for row in backs])
    edges = patched(engine=engine, seq_pos_type="custom", seq_pos=at)
    together = patched(engine=engine, seq_pos_type="custom_constant", seq_pos=at)
    assert [each.name for each in edges.outcome.axes("edge")][2:] == ["column"]
    for edge in SOME:
        for column in range(2):
            own = [[row[column]] for row in backs]
            expected = [from_oracle(oracle(), UNEVEN, edge, row, own[row]) for row in range(3)]
            check(numbers(edges)[edge, column], expected)
        expected = [from_oracle(oracle(), UNEVEN, edge, row, backs[row]) for row in range(3)]
        check(numbers(together)[edge], expected)


#: For each prompt where the span is, from the end: in the target and in the source.
SPAN = [(4, 3), (4, 2), (5, 7)]


def span(width: int) -> Span:
    target, source = (
        torch.tensor([[width - row[side], width - row[side] + 1] for row in SPAN])
        for side in (0, 1)
    )
    return Span(source, target)


def taken(of: EdgeOracle, row: int, back: int, node: Any) -> Tensor:
    """A sender of a source prompt, each token where the target has it."""
    own = of._value(UNEVEN.sources[row], node)
    # Only the span and the last token are asked for.
    found = own.new_zeros(len(UNEVEN.targets[row]), own.shape[-1])
    found[-SPAN[row][0]], found[-1] = own[-back], own[-1]
    return found


@pytest.mark.parametrize(
    "options", [{"engine": "cone"}, {"engine": "full"}, {"method": "eap"}, {"batch_size": 1}]
)
def test_spans_take_their_own_source(options: dict[str, Any]) -> None:
    """A token gets what the span has in the source prompt, wherever that is."""
    edges = patched(
        seq_pos_type="spans",
        seq_pos=["name", "last"],
        spans={"name": span(7)},
        **options,
    )
    assert edges.outcome.axes("edge")[2].labels == ("name", "last")
    slopes = EdgeDerivatives(copy.deepcopy(model()), "gemma2")
    found = numbers(edges)
    for edge in SOME:
        for row, (own, back) in enumerate(SPAN):
            for place, at in enumerate([own, 1]):
                if "method" not in options:
                    value = functools.partial(taken, oracle(), row, back)
                    expected = from_oracle(oracle(), UNEVEN, edge, row, [at], value)
                else:
                    expected = edges.baseline.target[row].item() + slopes.estimate(
                        UNEVEN.sources[row],
                        UNEVEN.targets[row],
                        edge,
                        functools.partial(UNEVEN.difference, row=row),
                        positions=[at],
                        value=functools.partial(taken, slopes, row, back),
                    )
                assert found[edge, place][row].item() == pytest.approx(expected, **NEAR)


def test_positions_with_sources_of_their_own() -> None:
    """As spans, by a strategy that says both."""
    at, sources = ([[7 - row[side]] for row in SPAN] for side in (0, 1))
    own = patched(seq_pos_type=Custom(at, sources))
    options = {"seq_pos_type": "spans", "seq_pos": ["name"], "spans": {"name": span(7)}}
    torch.testing.assert_close(raw(own), raw(patched(**options)), rtol=0, atol=0)


# Ablations.


def values_of(name: str, row: int, of: EdgeOracle) -> Any:
    """What a sender gets in place of the target run's, in one pair."""
    if name == "zero":
        return "zero"
    if name == "mean":
        return means(of, UNEVEN.targets)
    if name == "mean of a reference":
        return means(of, UNEVEN.sources)
    return means_by_place(of, UNEVEN.targets, len(UNEVEN.targets[row]))


def reference() -> tuple[Tensor, Tensor]:
    given = UNEVEN.arguments()
    return given["source_tokens"], given["source_attention_mask"]


ABLATIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "zero": lambda: {"ablation": "zero"},
    "mean": lambda: {"ablation": "mean"},
    "mean of a reference": lambda: {"ablation": "mean", "reference": reference()},
    "mean by place": lambda: {"ablation": "mean", "per_position": True},
}


@pytest.mark.parametrize("options", [{"engine": "cone"}, {"engine": "full"}, {"batch_size": 2}])
@pytest.mark.parametrize("name", ABLATIONS)
def test_ablated_senders(name: str, options: dict[str, Any]) -> None:
    """At every token of the target prompt, whatever the source prompt has there."""
    given = ABLATIONS[name]()
    edges = patched(**given, **options)
    assert edges.outcome.kind == f"edge (ablation {given['ablation']})"
    found = numbers(edges)
    for edge in SOME:
        values = [values_of(name, row, oracle()) for row in range(3)]
        expected = [
            from_oracle(oracle(), UNEVEN, edge, row, value=value)
            for row, value in enumerate(values)
        ]
        check(found[edge], expected)


@pytest.mark.parametrize("method", ["eap", "eap-ig-inputs", "eap-ig-activations"])
@pytest.mark.parametrize("name", ABLATIONS)
def test_ablated_senders_estimated(name: str, method: str) -> None:
    steps = {} if method == "eap" else {"steps": 2}
    edges = patched(method=method, **steps, **ABLATIONS[name]())
    slopes, found = EdgeDerivatives(copy.deepcopy(model()), "gemma2"), numbers(edges)
    for edge in SOME[::3]:
        for row in range(3):
            expected = edges.baseline.target[row].item() + slopes.estimate(
                UNEVEN.sources[row],
                UNEVEN.targets[row],
                edge,
                functools.partial(UNEVEN.difference, row=row),
                method,
                2,
                value=values_of(name, row, slopes),
            )
            assert found[edge][row].item() == pytest.approx(expected, abs=1e-4, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"engine": "full"}])
def test_resampled_senders(options: dict[str, Any]) -> None:
    """From the one prompt that there is to take from, at the same place from the end."""
    donor = (7, 3, 22, 40, 9)
    edges = patched(ablation="resample", reference=torch.tensor([donor]), seed=3, **options)
    for edge in SOME:
        expected = []
        for row, target in enumerate(UNEVEN.targets):
            logits = oracle().edge(donor, target, *edge.split("->"))
            expected.append(UNEVEN.difference(logits, row))
        check(numbers(edges)[edge], expected)


def test_resampled_senders_never_get_their_own() -> None:
    """Of two prompts each gets the other's."""
    two = EVEN.some(1, 2)
    edges = patched(two, ablation="resample")
    for edge in SOME:
        expected = []
        for row in range(2):
            donor, target = two.targets[1 - row], two.targets[row]
            logits = oracle().edge(donor, target, *edge.split("->"))
            expected.append(two.difference(logits, row))
        check(numbers(edges)[edge], expected)


@pytest.mark.parametrize("ablation", [{"ablation": "zero"}, {"ablation": "mean"}])
def test_ablated_at_spans(ablation: dict[str, Any]) -> None:
    """Where a span is in the source prompt does not matter."""
    # The prompt that is shorter in the source has no span there at its place from the end.
    edges = patched(
        seq_pos_type="spans",
        seq_pos=["name"],
        spans={"name": span(7)},
        **ablation,
    )
    for edge in SOME:
        values = [values_of(ablation["ablation"], row, oracle()) for row in range(3)]
        expected = [
            from_oracle(oracle(), UNEVEN, edge, row, [SPAN[row][0]], value)
            for row, value in enumerate(values)
        ]
        check(numbers(edges)[edge, 0], expected)


@pytest.mark.parametrize(
    "ablation", [{"ablation": "resample"}, {"ablation": "mean", "per_position": True}]
)
def test_places_of_each_prompt_do_not_go_with_places(ablation: dict[str, Any]) -> None:
    with pytest.raises(PositionError, match="positions of each prompt"):
        patched(
            seq_pos_type="spans",
            seq_pos=["name"],
            spans={"name": span(7)},
            **ablation,
        )
    # The same for all prompts do.
    patched(seq_pos_type="last", senders="m0", **ablation)


@pytest.mark.parametrize("batch_size", [None, 1, 4])
@pytest.mark.parametrize("name", [None, *ABLATIONS])
def test_answers_of_several_tokens(name: str | None, batch_size: int | None) -> None:
    """They are appended, and senders are changed in the prompts alone."""
    answers = torch.tensor([[1, 9], [2, 4], [3, 11]])
    edges = patched(
        EVEN,
        metric="sequence_log_probability",
        source_answer_tokens=answers,
        target_answer_tokens=torch.tensor([[5, 8], [6, 3], [7, 2]]),
        batch_size=batch_size,
        **({} if name is None else ABLATIONS[name]() | {"reference": None}),
    )
    for edge in SOME[::2]:
        expected = []
        for row, (first, second) in enumerate(answers.tolist()):
            source, target = EVEN.sources[row], EVEN.targets[row]
            whole = 0.0
            for token, rest in ((first, ()), (second, (first,))):
                value: Any = "source"
                if name is not None:
                    value = functools.partial(appended, name, row, len(rest))
                logits = oracle().edge(
                    (*source, *rest),
                    (*target, *rest),
                    *edge.split("->"),
                    positions=range(1 + len(rest), 1 + len(rest) + len(target)),
                    value=value,
                )
                whole += float(logits.log_softmax(-1)[token])
            expected.append(whole)
        check(numbers(edges)[edge], expected)


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_answers_of_several_tokens_resampled(batch_size: int | None) -> None:
    """Each prompt gets the other's, with whichever answer it stands there."""
    two, answers = EVEN.some(1, 2), torch.tensor([[1, 9], [2, 4]])
    edges = patched(
        two,
        metric="sequence_log_probability_difference",
        source_answer_tokens=answers,
        target_answer_tokens=torch.tensor([[5, 8], [6, 3]]),
        batch_size=batch_size,
        ablation="resample",
    )
    for edge in SOME[::2]:
        expected = []
        for row in range(2):
            target, donor = two.targets[row], two.targets[1 - row]
            parts = []
            for tokens in (answers[row].tolist(), [[5, 8], [6, 3]][row]):
                for count, token in enumerate(tokens):
                    rest = tuple(tokens[:count])
                    # The donor's last token stands where the prompt's does.
                    logits = oracle().edge(
                        (*donor, *rest),
                        (*target, *rest),
                        *edge.split("->"),
                        positions=range(1 + count, 1 + count + len(target)),
                    )
                    parts.append(float(logits.log_softmax(-1)[token]))
            expected.append(parts[0] + parts[1] - parts[2] - parts[3])
        check(numbers(edges)[edge], expected)


def appended(name: str, row: int, count: int, node: Any) -> Tensor:
    """What a sender gets in a prompt behind which an answer stands."""
    of, prompts = oracle(), EVEN.targets
    width = of._value(prompts[row], node).shape[-1]
    found = torch.zeros(len(prompts[row]) + count, width)
    if name.startswith("mean"):
        own = means_by_place(of, prompts, len(prompts[row])) if "place" in name else None
        found[: len(prompts[row])] = (own or means(of, prompts))(node)
    return found


# Checkpoints tell senders apart.


@pytest.mark.parametrize(
    ("one", "other", "part"),
    [
        ({"seq_pos_type": "custom_constant", "seq_pos": [-1]}, {"seq_pos": [-2]}, "senders"),
        (
            {"seq_pos_type": "custom", "seq_pos": torch.tensor([[5], [6], [5]])},
            {"seq_pos": torch.tensor([[5], [6], [6]])},
            "senders",
        ),
        (
            {"seq_pos_type": "spans", "seq_pos": ["name"], "spans": {"name": span(7)}},
            {
                "spans": {
                    "name": Span(span(7).source + torch.tensor([[0], [0], [1]]), span(7).target)
                }
            },
            "senders",
        ),
        ({"ablation": "mean"}, {"reference": torch.tensor([[3, 4]])}, "ablation mean"),
        ({"ablation": "resample"}, {"seed": 2}, "ablation reference"),
        ({"ablation": "zero"}, {"ablation": "mean"}, "kind"),
        ({}, {"ablation": "zero"}, "kind"),
        ({}, {"senders": "m1"}, "sites"),
        ({"method": "eap", "top_k": 3}, {"top_k": 4}, "sites"),
    ],
)
def test_a_checkpoint_is_of_one_sweep(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], part: str
) -> None:
    """The cells' labels alone would be the same."""
    file = tmp_path / "sweep"
    first = {"checkpoint": file, "senders": ["m0", "a1.h1"], **one}
    patched(**first)
    patched(**first)
    with pytest.raises(CheckpointError, match=part):
        patched(**{**first, **other})


@pytest.mark.parametrize("stop", [2, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"engine": "full"},
        # So little that rows which control others run alone.
        {"memory_budget": "600 KiB"},
        {"memory_budget": "1 MiB"},
        {"batch_size": 1},
        {"ablation": "mean"},
        {"method": "eap", "top_k": 20, "spot_checks": 5},
        {"seq_pos_type": "lastk", "seq_pos": 2},
    ],
    ids=str,
)
def test_a_sweep_that_was_killed_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], stop: int
) -> None:
    file, own = tmp_path / "sweep", {"checkpoint": tmp_path / "sweep", **options}
    unbroken = patched(**options)
    mend = broken_after(monkeypatch, stop, options.get("engine", "cone"))
    with contextlib.suppress(KeyboardInterrupt):
        patched(**own)
    mend()
    assert file.exists()
    resumed = patched(**own)
    assert raw(resumed).equal(raw(unbroken))
    assert resumed.exact.equal(unbroken.exact)
    assert numbers(resumed).keys() == numbers(unbroken).keys()


def test_an_ablation_that_is_an_array() -> None:
    """Its comparison with a name is no truth value."""
    with pytest.raises(PatchingError, match="ablation"):
        patched(ablation=numpy.array([1, 2]))
