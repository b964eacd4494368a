"""What `evaluate_circuit` takes, refuses and tells."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import attrs
import pytest
import torch
from nnsight import NNsight
from torch import Tensor, nn

from nnpatch_core import PromptPairs, Site, reads_activations, reads_positions
from nnpatch_core._models import as_nnsight, evaluating
from nnpatch_core.batch import make_batch
from nnpatch_core.circuits import Circuit, evaluate_circuit
from nnpatch_core.circuits.evaluation import check_nodes
from nnpatch_core.circuits.runs import CircuitRuns, _Run
from nnpatch_core.edges import Layers, Nodes, find_structure, open_layers, record_run
from nnpatch_core.errors import (
    EdgeError,
    EngineError,
    EngineWarning,
    MaskError,
    MemoryBudgetError,
    MetricError,
    PatchingError,
    StatisticsWarning,
    TokensError,
    UnknownNameError,
)
from nnpatch_core.plugins import find_adapter
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer
from tests.helpers.circuit_cases import drawn, measured, subject
from tests.helpers.edge_oracle import oracle_of
from tests.helpers.edge_pairs import EVEN, UNEVEN, Pairs

#: Padding is a part of what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

MODEL, API = tiny_model("llama"), tiny_api()
NODES = Nodes((4,) * 3, (2,) * 3, (False,) * 3)
CIRCUIT = Circuit.of(NODES, [*NODES][::3])
OTHER = Circuit.of(NODES, [*NODES][::2])
WHOLE, NONE = Circuit.of(NODES, NODES), Circuit.of(NODES, [])
SOME = EVEN.arguments()
PAIR = EVEN.some(0)
ROUNDING = 2e-5


def evaluated(circuit: Any = CIRCUIT, **options: Any) -> Any:
    given = {"nnmodel": MODEL, "api": API, **SOME, "progress": False, **options}
    return evaluate_circuit(circuit=circuit, **given)


def raw(found: Any, metric: str | None = None) -> Tensor:
    out = found.outcome
    return out.raw[out.metric if metric is None else metric]["circuit"].double()


# Which circuits.


def test_circuits_have_names() -> None:
    assert evaluated().names == ("circuit",)
    assert evaluated([CIRCUIT, OTHER]).names == ("circuit 0", "circuit 1")
    found = evaluated({"one": CIRCUIT, "two": OTHER})
    assert found.names == ("one", "two")
    assert found.circuits == {"one": CIRCUIT, "two": OTHER}
    assert found.outcome.axes("circuit")[0].labels == ("one", "two")
    with pytest.raises(EdgeError, match=r"no circuit 'three' was measured; there are \('one'"):
        found["three"]


def test_beside_a_circuit_its_complement_and_random_ones_are_run() -> None:
    found = evaluated({"a": CIRCUIT, "b": OTHER}, complement=True, random=2, seed=3)
    assert found.names == (
        *("a", "b", "all without a", "random a 0", "random a 1"),
        *("all without b", "random b 0", "random b 1"),
    )
    for name, circuit in (("a", CIRCUIT), ("b", OTHER)):
        assert found.circuits[f"all without {name}"] == WHOLE - circuit
        one, other = (found.circuits[f"random {name} {number}"] for number in (0, 1))
        assert one != other
        assert len(one) == len(other) == len(circuit)
    again = evaluated({"a": CIRCUIT}, random=2, seed=3)
    assert again.circuits["random a 1"] == found.circuits["random a 1"]
    other = evaluated({"a": CIRCUIT}, random=2, seed=4)
    assert other.circuits["random a 1"] != found.circuits["random a 1"]
    assert (
        evaluated(random=1).circuits["random circuit 0"]
        == evaluated(random=1, seed=0).circuits["random circuit 0"]
    )


def test_a_random_circuit_is_any_of_them() -> None:
    drawn = [evaluated(random=40, seed=seed).circuits for seed in range(2)]
    counts = sum(each.kept.int() for found in drawn for each in [*found.values()][1:])
    share = counts[torch.from_numpy(NODES.mask)] / 80
    assert abs(share.mean().item() - len(CIRCUIT) / len(NODES)) < 1e-6
    # Each edge is as likely: a standard deviation is 0.053.
    assert (share - len(CIRCUIT) / len(NODES)).abs().max() < 0.25


def test_minimality_is_what_each_edge_loses() -> None:
    small = Circuit.of(NODES, ["input->m0", "m0->logits", "input->logits"])
    found = evaluated({"a": small, "b": CIRCUIT & small}, minimality=True)
    lost = found.minimality("a")
    assert set(lost) == set(small)
    assert found.minimality() == lost
    for edge, loss in lost.items():
        alone = evaluated([small, small - Circuit.of(NODES, [edge])]).faithfulness
        assert loss == pytest.approx(float(alone[0] - alone[1]), abs=1e-4)
    assert sorted(map(abs, lost.values()), reverse=True) == [*map(abs, lost.values())]
    with pytest.raises(EdgeError, match="no circuit was measured without an edge: pass minimality"):
        evaluated(small).minimality()


def test_minimality_is_of_one_circuit() -> None:
    """Whatever another one is called."""
    small = Circuit.of(NODES, ["input->m0", "m0->logits"])
    found = evaluated({"a": small, "a without b": OTHER}, minimality=True)
    assert set(found.minimality("a")) == set(small)


def test_no_circuit_takes_the_place_of_another() -> None:
    with pytest.raises(EdgeError, match="'all without a' is the name of one circuit, and of one"):
        evaluated({"a": CIRCUIT, "all without a": OTHER}, complement=True)
    small = Circuit.of(NODES, ["input->m0"])
    with pytest.raises(EdgeError, match=r"'a without input->m0' is the name"):
        evaluated({"a": small, "a without input->m0": OTHER}, minimality=True)
    assert evaluated({"a": CIRCUIT, "all without a": OTHER}).names == ("a", "all without a")


def test_circuits_that_are_made_carry_no_scores() -> None:
    """There may be thousands, and scores are as many as all edges of a model."""
    scored = Circuit.from_edges(dict.fromkeys(NODES, 1.0), n=9, nodes=NODES, pruned=False)
    found = evaluated(scored, complement=True, random=1, minimality=True).circuits
    assert found.pop("circuit").scores is not None
    assert all(each.scores is None for each in found.values())


# What is refused.

OTHERS = Circuit.of(Nodes((4,) * 2, (2,) * 2, (False,) * 2), ["input->m0"])
PARALLEL = Circuit.of(Nodes((4,) * 3, (2,) * 3, (True, False, False)), ["input->m0"])
PAIRS = PromptPairs.from_texts([" a"], [" b"], [" a"], [" b"], tiny_tokenizer([" a b"]))
LONGER = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
ERRORS: dict[str, tuple[dict[str, Any], type[PatchingError], str]] = {
    "no circuit": ({"circuit": []}, EdgeError, "there is no circuit: give at least one"),
    "none by name": ({"circuit": {}}, EdgeError, "there is no circuit"),
    "an edge": ({"circuit": "input->m0"}, EdgeError, "circuit must be a Circuit, or several, got"),
    "edges": ({"circuit": ["input->m0"]}, EdgeError, "must be Circuit objects by name, got"),
    "prompts": (
        {"circuit": PAIRS},
        EdgeError,
        "circuit is a PromptPairs: the circuit comes before the prompts",
    ),
    "a number": ({"circuit": 3}, EdgeError, "circuit must be a Circuit, or several, got 3"),
    "no name": ({"circuit": {3: CIRCUIT}}, EdgeError, "must be Circuit objects by name, got 3"),
    "another model's": (
        {"circuit": {"mine": OTHERS}},
        EdgeError,
        "mine: of a model of 2 layers, 82 edges, and this model has 3 layers, 190 edges",
    ),
    "other blocks": ({"circuit": PARALLEL}, EdgeError, "3 layers, 186 edges, and this model"),
    "random": ({"random": -1}, PatchingError, "random must be from 0 to 10000, got -1"),
    "many": ({"random": 10**30}, PatchingError, "random must be from 0 to 10000"),
    "half": ({"random": 0.5}, PatchingError, "random must be an integer, got 0.5"),
    "swap": ({"swap": "yes"}, PatchingError, "swap must be True or False, got 'yes'"),
    "minimality": ({"minimality": 2}, PatchingError, "minimality must be True or False, got 2"),
    "seed": ({"seed": 1}, PatchingError, "seed=1 means nothing without random= or a resample"),
    "seed of zeros": ({"seed": 1, "ablation": "zero"}, PatchingError, "seed=1 means nothing"),
    "reference": ({"reference": SOME["source_tokens"]}, PatchingError, "mean nothing without abl"),
    "ablation": ({"ablation": "median"}, UnknownNameError, "unknown ablation 'median'; there are"),
    "metric": ({"metric": "accuracy"}, UnknownNameError, "accuracy"),
    "answers": ({"source_answer_index": None}, PatchingError, "source_answer_index must be given"),
    "two masks": (
        {"attention_mask": torch.ones(3, 6, dtype=torch.int64)},
        MaskError,
        "both given",
    ),
    "memory": ({"memory_budget": "70 KiB"}, MemoryBudgetError, "memory_budget"),
    "batch size": ({"batch_size": 0}, PatchingError, "batch_size"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors(what: str) -> None:
    options, kind, message = ERRORS[what]
    with pytest.raises(kind, match=message):
        evaluated(**options)


def test_models_of_as_many_edges_are_told_apart() -> None:
    one, other = (Nodes((4,) * 2, (2,) * 2, own) for own in ((True, False), (False, True)))
    assert len(one) == len(other)
    with pytest.raises(
        EdgeError, match=r"x: of a model of Nodes\(.*True, False.*Nodes\(.*False, T"
    ):
        check_nodes("x", one, other)


def test_pairs_of_two_lengths_are_refused() -> None:
    told = r"the prompts of pairs \[1, 2\] have other lengths: give pairs of one length each"
    with pytest.raises(TokensError, match=told):
        evaluated(**UNEVEN.arguments())


def test_runs_that_cannot_be_told_apart_are_refused() -> None:
    same = {"target_tokens": SOME["source_tokens"]}
    with pytest.raises(MetricError, match="a value relative to their difference would divide by 0"):
        evaluated(**same)


def test_metrics_that_read_activations_are_refused() -> None:
    @reads_activations(Site.get_site(API, "resid", 1, seq_pos=[-1]))
    def metric(logits: Tensor, context: Any) -> Tensor:
        return logits[:, 0]

    with pytest.raises(MetricError, match=r"metric 'metric' reads activations, and a circuit"):
        evaluated(metric=metric)


def test_nothing_runs_before_all_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CircuitRuns, "logits", lambda *_: pytest.fail("it ran"))
    for options, kind, _ in ERRORS.values():
        with pytest.raises(kind):
            evaluated(**options)


# What it tells.


def test_it_prints_a_table() -> None:
    found = evaluated({"the third part": CIRCUIT, "half": OTHER}, **PAIR.arguments())
    one, other = (f"{each:.3f}" for each in found.faithfulness.tolist())
    assert str(found) == (
        "circuit         edges  faithfulness\n"
        f"the third part     64  {one}\n"
        f"half               95  {other}"
    )
    assert repr(found) == f"CircuitEvaluation(2 circuits, the third part: {float(found):.3g})"
    assert "the third part" in found._repr_html_()


def test_a_table_has_intervals_and_doubts_in_words() -> None:
    """Whoever reads it needs no warning."""
    found = evaluated()
    with pytest.warns(StatisticsWarning) as caught:
        low, high = (float(end[0]) for end in found.interval())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heads, row, doubt = str(found).split("\n")
    assert heads.split() == ["circuit", "edges", "faithfulness"]
    assert row.split(maxsplit=2)[2] == f"{float(found):.3f} [{low:.3f}, {high:.3f}]"
    assert [doubt] == [str(each.message) for each in caught]


def test_a_frame_has_a_row_for_each_circuit() -> None:
    frame = evaluated({"a": CIRCUIT, "b": OTHER}).to_dataframe()
    assert frame["circuit"].tolist() == ["a", "b"]
    assert frame["edges"].tolist() == [len(CIRCUIT), len(OTHER)]


def test_the_outcome_is_as_any_other() -> None:
    found = evaluated({"a": CIRCUIT, "b": OTHER}, metric=["logit_difference", "kl_divergence"])
    out = found.outcome
    assert list(out) == ["circuit"]
    assert out.count == 3
    assert out.kind == "circuit"
    assert out.metrics == ("logit_difference", "kl_divergence")
    assert {row["circuit"] for row in out.top(2)} == {"a", "b"}
    torch.testing.assert_close(found.faithfulness, out["circuit"])
    torch.testing.assert_close(found.raw, raw(found).mean(-1))


def test_pairs_of_texts_stand_for_all_arguments() -> None:
    words = [" red", " blue", " green", " black"]
    others = [*words[1:], words[0]]
    pairs = PromptPairs.from_texts(words, others, words, others, tiny_tokenizer(words))
    found = evaluate_circuit(MODEL, None, CIRCUIT, pairs, progress=False)
    plain = evaluated(
        **{
            **SOME,
            "source_attention_mask": None,
            "target_attention_mask": None,
            **{
                name: getattr(pairs, name)
                for name in (
                    *("source_tokens", "target_tokens"),
                    *("source_answer_index", "target_answer_index"),
                )
            },
        }
    )
    assert raw(found).equal(raw(plain))
    with pytest.raises(TokensError, match="leave out source_answer_index"):
        evaluate_circuit(
            MODEL, None, CIRCUIT, pairs, source_answer_index=SOME["source_answer_index"]
        )


def test_a_bar_counts_circuits(capsys: pytest.CaptureFixture[str]) -> None:
    for cut in ({}, {"batch_size": 1}):
        evaluated(random=4, progress=True, **cut)
        assert "5/5" in capsys.readouterr().err
        evaluated(random=4, progress=False)
        assert not capsys.readouterr().err


# Metrics.


@pytest.mark.parametrize("metric", ["loss", "kl_divergence", "answer_log_probability"])
@pytest.mark.parametrize("options", [{}, {"ablation": "mean"}, {"batch_size": 1}, {"swap": True}])
def test_metrics_of_all_edges_are_the_source_run_s(metric: str, options: dict[str, Any]) -> None:
    """Also of one that goes by the tokens: these are those that a circuit is run on."""
    found = evaluated({"all": WHOLE, "none": NONE}, metric=metric, **options)
    baseline = found.outcome.baseline
    ends = torch.stack([baseline.source, baseline.target]).double()
    torch.testing.assert_close(raw(found), ends, rtol=0, atol=ROUNDING)
    name = "target_tokens" if options.get("swap") else "source_tokens"
    if metric == "loss":
        for row, tokens in enumerate(SOME[name]):
            tokens = tokens[-len(EVEN.sources[row]) :]
            with torch.no_grad():
                logits = MODEL(tokens[None]).logits[0, :-1].log_softmax(-1)
            own = -logits.gather(1, tokens[1:, None]).mean()
            torch.testing.assert_close(raw(found)[0, row], own.double(), rtol=0, atol=ROUNDING)


def test_a_metric_that_reads_positions_finds_them_in_the_source_prompts() -> None:
    """Here at the first of three tokens, which a target prompt has elsewhere."""
    marks = (8, 9, 27)

    @reads_positions(
        lambda context: sum((context.tokens == mark).int() for mark in marks).argmax(1)[:, None]
    )
    def metric(logits: Tensor, context: Any) -> Tensor:
        return logits[:, 0, 1] - logits[:, 0, 2]

    circuits = (WHOLE, NONE, CIRCUIT)
    oracle, moved = oracle_of(MODEL, "llama"), 0
    for cut in ({}, {"batch_size": 1}):
        measured = evaluated(circuits, metric=metric, **cut)
        found, baseline = raw(measured), measured.outcome.baseline
        ends = torch.stack([baseline.source, baseline.target]).double()
        torch.testing.assert_close(found[:2], ends, rtol=0, atol=ROUNDING)
        for row, (source, target) in enumerate(zip(EVEN.sources, EVEN.targets, strict=True)):
            stop, other = (
                1 + min(each.index(mark) for mark in marks if mark in each)
                for each in (source, target)
            )
            moved += stop != other
            for number, circuit in enumerate(circuits):
                logits = oracle.circuit(source[:stop], target[:stop], circuit)
                wanted = (logits[1] - logits[2]).double()
                torch.testing.assert_close(found[number, row], wanted, rtol=0, atol=ROUNDING)
    assert moved


ANSWERS = {
    "source_answer_tokens": [(21, 22, 23), (31,), (41, 42)],
    "target_answer_tokens": [(24,), (33, 34), (43, 44)],
}


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"ablation": "zero"}])
def test_whole_answers_are_sums_over_single_steps(options: dict[str, Any]) -> None:
    """Each a circuit in the prompts and what of the answer stands before a token."""
    oracle = oracle_of(MODEL, "llama")
    circuits = {"all": WHOLE, "none": NONE, "some": CIRCUIT}
    filled = {
        name: torch.tensor([[*each, *[-1] * (3 - len(each))] for each in answers])
        for name, answers in ANSWERS.items()
    }
    metric = "sequence_log_probability_difference"
    found = evaluated(circuits, metric=metric, **filled, **options)
    zero = "ablation" in options
    for number, circuit in enumerate(circuits.values()):
        for row, prompts in enumerate(zip(EVEN.sources, EVEN.targets, strict=True)):
            sums = []
            for answers in ANSWERS.values():
                answer, total = answers[row], 0.0
                for at, token in enumerate(answer):
                    source, target = (each + answer[:at] for each in prompts)
                    value = _zeros(oracle, target, len(prompts[1])) if zero else "target"
                    logits = oracle.circuit(source, target, circuit, value=value)
                    total += float(logits.double().log_softmax(-1)[token])
                sums.append(total)
            expected = pytest.approx(sums[0] - sums[1], abs=5e-5)
            assert float(raw(found)[number, row]) == expected, (number, row)


def _zeros(oracle: Any, target: tuple[int, ...], length: int) -> Callable[[Any], Tensor]:
    """Zeros in the prompt; the answer behind it is no part of it."""

    def value(sender: Any) -> Tensor:
        found = oracle._value(target, sender).clone()
        found[:length] = 0
        return found

    return value


# Models that something is done to.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_numbers(dtype: torch.dtype) -> None:
    found = evaluated({"all": WHOLE, "some": CIRCUIT}, nnmodel=tiny_model("llama").to(dtype))
    allowed = {torch.bfloat16: 0.03, torch.float16: 5e-3, torch.float64: 1e-5}[dtype]
    plain = evaluated({"all": WHOLE, "some": CIRCUIT})
    torch.testing.assert_close(raw(found), raw(plain), rtol=0, atol=allowed)
    assert found["all"] == pytest.approx(1, abs=2 * allowed)


STEER = torch.linspace(-0.5, 0.5, 32)


def steered(_: nn.Module, __: Any, output: Any) -> Any:
    return (output[0] + STEER, *output[1:]) if isinstance(output, tuple) else output + STEER


@pytest.mark.parametrize(
    "path",
    [
        *("model.embed_tokens", "model.layers.1.mlp.down_proj", "model.norm"),
        *("model.layers.0.self_attn.o_proj", "model.layers.2.self_attn.v_proj"),
        *("model.layers.0.input_layernorm", "model.layers.2.post_attention_layernorm"),
    ],
)
def test_hooks_of_the_user_s_run_in_circuits_too(path: str) -> None:
    """Those that treat all rows and tokens alike are a part of the model."""
    model = tiny_model("llama")
    oracle = oracle_of(model, "llama")
    for each in (model, oracle.model):
        module = each.get_submodule(path)
        if path.endswith("v_proj"):
            module.register_forward_hook(lambda _, __, output: output * 1.5)
        else:
            module.register_forward_hook(steered)
    circuits = {"all": WHOLE, "some": CIRCUIT}
    found = evaluated(circuits, nnmodel=model, **PAIR.arguments())
    assert (raw(found) - raw(evaluated(circuits, **PAIR.arguments()))).abs().max() > 1e-3
    for number, circuit in enumerate(circuits.values()):
        logits = oracle.circuit(PAIR.sources[0], PAIR.targets[0], circuit)
        expected = pytest.approx(PAIR.difference(logits, 0), abs=ROUNDING)
        assert float(raw(found)[number, 0]) == expected


def _row(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    output = output.clone()
    output[0] += 0.5
    return output


def _while_long(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
    return output + 0.5 if output.shape[1] > 5 else None


def _first(_: nn.Module, __: Any, output: Any) -> Any:
    stream = (output[0] if isinstance(output, tuple) else output).clone()
    stream[:, 0] += 0.5
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


#: With these all comes out right: fewer tokens are not given to a module that makes another thing
#: of them. A hook on a whole layer stands between it and the next one, and is refused.
INSIDE = ("self_attn.o_proj", "self_attn.q_proj", "mlp.down_proj")
RIGHT = [
    ("self_attn.q_proj", _while_long),
    *((path, hook) for path in INSIDE for hook in (_first, steered)),
]


@pytest.mark.parametrize("hook", [_row, _while_long, _first, steered])
@pytest.mark.parametrize("path", ["self_attn.o_proj", "mlp.down_proj", "self_attn.q_proj", ""])
def test_hooks_change_all_edges_as_the_source_run_or_are_refused(hook: Any, path: str) -> None:
    """Those that tell rows or tokens apart make other rows and fewer tokens another model."""
    model = tiny_model("llama")
    module = model.get_submodule(f"model.layers.1.{path}".removesuffix("."))
    if path == "self_attn.q_proj" and hook is steered:
        module.register_forward_hook(lambda _, __, output: output + 0.5)
    else:
        module.register_forward_hook(hook)
    if (path, hook) not in RIGHT:
        told = (
            r"called by itself|with the forward hook `_\w+` on 'model.layers.1.* circuit of all|"
            r"layer 2 gets something else than layer 1 gives, .* hook `\w+` on 'model.layers.1'"
        )
        with pytest.raises(EngineError, match=told):
            evaluated(nnmodel=model)
        return
    found = evaluated(WHOLE, nnmodel=model)
    given = (SOME["source_tokens"], SOME["source_attention_mask"])
    with torch.no_grad():
        position_ids = (given[1].cumsum(1) - 1).clamp(min=0)
        logits = model(given[0], attention_mask=given[1], position_ids=position_ids).logits[:, -1]
    right, wrong = (
        logits.gather(1, SOME[f"{run}_answer_index"][:, None])[:, 0] for run in ("source", "target")
    )
    torch.testing.assert_close(raw(found)[0], (right - wrong).double(), rtol=0, atol=ROUNDING)


def test_prompts_in_parts_with_a_hook_are_a_warning() -> None:
    model = tiny_model("llama")
    model.model.norm.register_forward_hook(steered)
    with pytest.warns(EngineWarning, match="the prompts run in several parts"):
        evaluated(nnmodel=model, batch_size=1)


def test_hooks_that_only_watch_change_nothing() -> None:
    model, seen = tiny_model("llama"), []
    model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    assert raw(evaluated(nnmodel=model)).equal(raw(evaluated()))
    # Layers are called by themselves as well: they see more than the forwards of the two runs.
    assert len(seen) > 2


def test_what_an_edit_adds_to_a_layer_is_no_part_of_its_attention_or_mlp() -> None:
    traced = NNsight(tiny_model("llama"))
    with traced.edit(inplace=True):
        traced.model.layers[1].output[:] = traced.model.layers[1].output * 1.5
    with pytest.raises(EngineError, match="layer 1 does something else"):
        evaluated(nnmodel=traced)


# How it is run.


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, tuple[int, ...]]]:
    """What of which layers is called for circuits, and the rows and tokens of it."""
    found: list[tuple[str, int, tuple[int, ...]]] = []

    def spied(name: str, real: Any) -> Any:
        def spy(self: Layers, layer: int, rows: Any, *args: Any, **kwargs: Any) -> Any:
            shape = (rows["q"] if isinstance(rows, dict) else rows).shape
            found.append((name, layer, tuple(shape[:2])))
            return real(self, layer, rows, *args, **kwargs)

        return spy

    for name in ("received", "attended", "added_by_heads", "mlp_of"):
        monkeypatch.setattr(Layers, name, spied(name, getattr(Layers, name)))
    return found


def _runs(pairs: Pairs = EVEN, name: str = "llama") -> CircuitRuns:
    given, model = pairs.arguments(), tiny_model(name)
    traced, api = as_nnsight(model), find_adapter(None, model)
    source, target = (
        make_batch(
            side,
            given[f"{side}_tokens"],
            given[f"{side}_attention_mask"],
            vocab_size=None,
            pad_id=None,
        )
        for side in ("source", "target")
    )
    with evaluating(model):
        layers = open_layers(traced, api, find_structure(traced, api, target), target)
        stream = record_run(traced, api, source).streams[0]
    return CircuitRuns.of(layers, source, stream, None, 2**30)


def _kept(circuits: Iterable[Circuit]) -> Tensor:
    return torch.stack([each.kept for each in circuits])


@torch.no_grad()
def test_what_no_receiver_reads_is_not_computed(called: list[Any]) -> None:
    runs = _runs()
    called.clear()
    # Head 0 of layer 0 is read by nobody, and nothing goes into layer 1's attention.
    circuit = Circuit.of(NODES, ["input->a0.h0<q>", "input->m1", "m1->a2.h0<v>", "a2.h1->logits"])
    runs.logits(_kept([circuit]))
    assert [(name, layer) for name, layer, _ in called] == [
        ("mlp_of", 1),
        ("received", 2),
        ("attended", 2),
        ("added_by_heads", 2),
    ]


@torch.no_grad()
def test_tokens_before_the_first_that_differs_are_not_computed(called: list[Any]) -> None:
    pair = Pairs([(5, 6, 7, 8, 9, 4)], [(5, 6, 7, 8, 3, 4)], ((1,), (2,)))
    runs = _runs(pair)
    assert runs.start == 4
    called.clear()
    runs.logits(_kept([WHOLE]))
    assert {(name, shape) for name, _, shape in called} == {
        ("received", (1, 2)),
        ("attended", (1, 6)),
        # Four heads, and the base.
        ("added_by_heads", (5, 2)),
        ("mlp_of", (1, 6)),
    }
    assert runs.layers.mlp_of(
        1, runs.base.streams[2], torch.tensor([0]), None, runs.start
    ).shape == (1, 2, 32)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_little_room_gives_the_same_numbers(name: str, called: list[Any]) -> None:
    """Circuits, and then prompts, are run one after the other."""
    roomy = _runs(name=name)
    nodes = roomy.layers.nodes
    circuits = [Circuit.of(nodes, [*nodes][first::2]) for first in range(2)]
    called.clear()
    expected = roomy.logits(_kept(circuits))
    rows = {shape[0] for name, _, shape in called if name == "attended"}
    assert rows == {6}
    seen = set()
    for room in (0, *(2**power for power in range(12, 22))):
        called.clear()
        done: list[int] = []
        found = attrs.evolve(roomy, room=room).logits(_kept(circuits), done.append)
        torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
        seen |= {shape[0] for name, _, shape in called if name == "attended"}
        assert sum(done) == 2
    # Some prompts, all of them, and both circuits.
    assert {1, 3, 6} <= seen


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_layers_that_must_be_called_whole_give_the_same_numbers(
    name: str, called: list[Any]
) -> None:
    """Where attention cannot be left out, or queries cannot be had of some tokens alone."""
    runs = _runs(name=name)
    nodes, structure = runs.layers.nodes, runs.layers.structure
    alone = structure.alone
    assert alone is not None
    assert all(alone.tokenwise)
    assert all(each is not None for each in alone.aside)
    kept = _kept([Circuit.of(nodes, [*nodes][::2])])
    expected = runs.logits(kept)
    for changed in (
        {"tokenwise": (False,) * nodes.n_layers},
        {"aside": (None,) * nodes.n_layers},
    ):
        other = attrs.evolve(structure, alone=attrs.evolve(alone, **changed))
        layers = attrs.evolve(runs.layers, structure=other)
        called.clear()
        found = attrs.evolve(runs, layers=layers).logits(kept)
        tokens = {shape[1] for name, _, shape in called if name == "received"}
        assert tokens == {6 if "tokenwise" in changed else 6 - runs.start}
        torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


@torch.no_grad()
def test_sums_of_our_own_are_not_rounded() -> None:
    """Autocast is for the model."""
    runs = _runs()
    run = _Run(runs, [WHOLE.kept.numpy()], torch.arange(3))
    plain, _ = run._streams(0, 0, runs.wires[0].attends)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = run._streams(0, 0, runs.wires[0].attends)
    assert cast.equal(plain)


def test_a_norm_of_all_queries_lets_each_head_see_the_others() -> None:
    """In OLMo 2 an edge into one head's query changes what another head hands on."""
    edges = ["input->a0.h0<q>", "input->a0.h1<q>", "input->logits", "a0.h1->logits"]
    pairs = [((3, 9, 4, 17), (3, 9, 21, 30))]
    one, other = measured("olmo2", [edges, edges[1:]], pairs)
    assert (one - other).abs().max() > 1e-5
    oracle = subject("olmo2")[2]
    assert drawn(oracle, [0.5])
    for found, circuit in ((one, edges), (other, edges[1:])):
        expected = oracle.circuit(*pairs[0], circuit)[[1, 2, 14]].float()
        torch.testing.assert_close(found[0], expected, rtol=0, atol=ROUNDING)
