"""Whatever is passed as whichever argument: it does, or the error is a PatchingError of one line.

That an unknown keyword is a TypeError is Python's own.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnpatch_core import (
    Add,
    Each,
    EdgeOutcome,
    MultiSite,
    Outcome,
    PatchingError,
    PromptPairs,
    Scale,
    Set,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    cache_average,
    edge_patching,
    execution_order,
    path_patching,
    plan_sweep,
    steer,
)
from nnpatch_core.circuits import (
    Circuit,
    CircuitCurve,
    areas,
    auroc,
    circuit_curve,
    evaluate_circuit,
    find_circuit,
)
from nnpatch_core.edges import Nodes
from nnpatch_core.subspace import (
    Subspace,
    collect,
    evaluate_subspace,
    sweep_steering,
    sweep_subspaces,
    train_subspace,
)
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer
from tests.helpers.paths import ROOT
from tests.helpers.samples import TWO

MODEL, API = tiny_model("llama"), tiny_api()
SOURCE, TARGET, ANSWERS = TWO
SITES = Sites("resid", seq_pos_type="last")
FOREIGN = ROOT / "tests" / "spaces" / "files" / "older" / "rank1"
OUT = activation_patching(
    MODEL, API, Sites(["resid", "q"], seq_pos_type="each"), SOURCE, TARGET, *ANSWERS, progress=False
)


class Unspeakable:
    """Something whose representation fails, and that is neither true nor false."""

    def __repr__(self) -> str:
        raise RuntimeError("no words")

    def __bool__(self) -> bool:
        raise RuntimeError("no")


def swept(**options: Any) -> Any:
    return activation_patching(
        MODEL, API, Sites(**options), SOURCE, TARGET, *ANSWERS, progress=False
    )


def site_of(**options: Any) -> Any:
    """A site, asked of a model."""
    return Sites.from_sites([Site.get_site(**options)]).get_sites_dict(MODEL, None, TARGET)


def listed(sites: Any) -> Any:
    return Sites.from_sites(sites).get_sites_dict(MODEL, None, TARGET)


def on_disk(name: str) -> Callable[..., Any]:
    """The same, of a path that is not of the folder where the tests are run."""

    def call(**arguments: Any) -> Any:
        path = arguments.pop("path")
        if isinstance(path, str) and path and not Path(path).is_absolute():
            path = f"/nowhere/{path}"
        return getattr(OUT, name)(path, **arguments)

    return call


def of_circuit(name: str) -> Callable[..., Any]:
    """The same of a circuit's files and pictures."""

    def call(**arguments: Any) -> Any:
        path = arguments.pop("path", "f")
        if isinstance(path, str) and path and not Path(path).is_absolute():
            path = f"/nowhere/{path}"
        return getattr(CIRCUIT, name)(path, **arguments)

    return call


def kept(folder: Any, info: Any = None) -> None:
    """Save a subspace where nobody can make a folder."""
    path = f"/dev/null/{folder}" if isinstance(folder, str) and folder else folder
    Subspace(BASIS, info=info).save_pretrained(path)


def read(name: Any, **options: Any) -> Subspace:
    """Read one, and never from the hub."""
    path = f"/nowhere/{name}" if isinstance(name, str) and name else name
    return Subspace.from_pretrained(path, **options)


def pushed(repo_id: Any, **options: Any) -> str:
    """Push one, never to where there may be a repository."""
    name = f"no name: {repo_id}" if isinstance(repo_id, str) else repo_id
    return Subspace(BASIS).push_to_hub(name, **options)


def taught(progress: Any = False, **options: Any) -> Any:
    """Learn a subspace, quickly, and write nothing."""
    path = options.get("checkpoint")
    if isinstance(path, str) and path:
        options["checkpoint"] = f"/nowhere/{path}"
    return train_subspace(**{**LEARNING, **options}, progress=progress)


def taught_everywhere(progress: Any = False, **options: Any) -> Any:
    """Learn one at each site of a grid."""
    return sweep_subspaces(**options, progress=progress)


BASIS = torch.eye(4)[:, :2]
NODES = Nodes((2,), (1,), (False,))
NUMBERS = {"input->m0": 0.5, "m0->logits": -0.25}
CIRCUIT = Circuit.from_edges(NUMBERS, n=2, nodes=NODES)
CURVE = {
    **{name: [0.0, 1.0] for name in ("fractions", "faithfulness", "low", "high")},
    "sizes": [0, 2], "circuits": [CIRCUIT] * 2, "cpr": 0.5, "cmd": 0.5, "absolute": True,
    "info": {},
}  # fmt: skip
OF_MODEL = Nodes((4,) * 3, (2,) * 3, (False,) * 3)
SCORED = {edge: 0.5 ** (number % 9) for number, edge in enumerate(OF_MODEL)}
EVALUATED = ["ablation", "reference", "per_position", "metric_data", "source_answer_tokens", "seed"]
LAST = Sites("resid", [1], "last")


def steered(**arguments: Any) -> Any:
    """A forward of a model that is steered; a value may be the content of one."""
    kind = arguments.pop("kind", None)
    if kind is not None:
        arguments["value"] = kind(arguments["value"])
    with steer(**arguments):
        return MODEL(TARGET)


SITE = Site.get_site(API, "mlp", 1)
SPACE = Subspace.random(32, site=Site.get_site(API, "resid", 1, seq_pos=[-1]))
STEERED = {"nnmodel": MODEL, "site": SPACE, "value": 1.0, "api": API}
COLLECTED = {
    "nnmodel": MODEL, "subspace": SPACE, "prompts": TARGET, "api": API, "progress": False,
}  # fmt: skip
PAIR = {
    "nnmodel": MODEL, "api": API, "sites": SITES, "source_tokens": SOURCE, "target_tokens": TARGET,
}  # fmt: skip
ANSWERED = {"source_answer_index": ANSWERS[0], "target_answer_index": ANSWERS[1]}
PROMPTED = {**{name: PAIR[name] for name in PAIR if name != "sites"}, **ANSWERED, "progress": False}
MASKS = ["attention_mask", "source_attention_mask", "target_attention_mask"]
LIMITS = ["batch_size", "memory_budget"]
ONE = {
    "nnmodel": MODEL, "api": API, "sites": SITES, "tokens": TARGET, "answer_index": ANSWERS[0],
    "other_answer_index": ANSWERS[1], "progress": False,
}  # fmt: skip
COMMON = [*LIMITS, "metric", "tokenizer"]
TEXTS = {
    "source": ["a b", "a c"], "target": ["a d", "a b"], "source_answers": ["c", "d"],
    "target_answers": ["d", "c"], "tokenizer": tiny_tokenizer([" a b c d"]),
}  # fmt: skip
_WORDS = [" red", " blue", " green", " black"]
LEARNED_FROM = PromptPairs.from_texts(
    _WORDS, [*_WORDS[1:], _WORDS[0]], _WORDS, [*_WORDS[1:], _WORDS[0]], tiny_tokenizer(_WORDS)
)
RESID = Site.get_site(API, "resid", 2, seq_pos=[-1])
PAIRED = {"nnmodel": MODEL, "api": API, "pairs": LEARNED_FROM}
LEARNING = {**PAIRED, "site": RESID, "epochs": 1, "random_labels": False}
EDGES = {
    **{name: value for name, value in PAIR.items() if name != "sites"}, **ANSWERED,
    "senders": ["m0", "a0.h1"], "receivers": ["m1", "logits"], "progress": False,
}  # fmt: skip
MORE = ["top_k", "spot_checks"]
EDGE_OPTIONS = [
    *(*MASKS, *COMMON, *MORE, "method", "seq_pos_type", "seq_pos", "spans", "metric_data"),
    *("source_answer_tokens", "target_answer_tokens", "force_model_confidence", "ablation"),
    *("reference", "per_position", "steps", "seed", "engine"),
]
EDGE_OUT = edge_patching(**EDGES)
PICTURE = [
    *("sites", "interactive", "title", "limit", "crop", "layers", "positions", "size", "values"),
    *("mark", "mute"),
]
#: What is called, with what it takes by default, and what else it may be given.
ENTRIES = {
    "activation": (
        activation_patching,
        {**PAIR, **ANSWERED, "progress": False},
        [*MASKS, *COMMON, "engine", "screen", "top_k", "spot_checks", "force_model_confidence"],
    ),
    "screened": (
        activation_patching,
        {**PAIR, **ANSWERED, "progress": False, "screen": "attribution", "top_k": 1},
        ["spot_checks", "seed"],
    ),
    "ablation": (
        ablation_patching,
        ONE,
        [*COMMON, "attention_mask", "engine", "method", "reference", "per_position"],
    ),
    "mean": (ablation_patching, {**ONE, "method": "mean"}, ["reference", "per_position"]),
    "resample": (ablation_patching, {**ONE, "method": "resample"}, ["reference", "seed"]),
    "attribution": (
        attribution_patching,
        {**PAIR, **ANSWERED, "progress": False},
        [*MASKS, *COMMON, "ablation", "reference", "per_position", "qk_fix", "grad_drop", "steps"],
    ),
    "path": (
        path_patching,
        {
            **{name: PAIR[name] for name in PAIR if name != "sites"},
            **ANSWERED,
            "senders": ["a0.h1", SITE],
            "receivers": ["a2.h1<q>", ("m2", "logits")],
            "progress": False,
        },
        [*MASKS, *COMMON, "engine", "through", "keep"],
    ),
    "longer path": (
        path_patching,
        {
            **{name: PAIR[name] for name in PAIR if name != "sites"},
            **ANSWERED,
            "senders": None,
            "receivers": None,
            "path": ["m0", "m1", "logits"],
            "progress": False,
        },
        [],
    ),
    "edges": (edge_patching, EDGES, EDGE_OPTIONS),
    "edges of positions": (edge_patching, {**EDGES, "seq_pos_type": "custom"}, ["seq_pos"]),
    "edges estimated": (edge_patching, {**EDGES, "method": "eap-ig-inputs"}, ["steps", *MORE]),
    "edges ablated": (
        edge_patching,
        {**EDGES, "ablation": "resample"},
        ["reference", "per_position", "seed"],
    ),
    "edge": (EDGE_OUT.__getitem__, {"edge": "m0->logits"}, []),
    "edge agreement": (EDGE_OUT.agreement, {"exact": EDGE_OUT}, ["top_k"]),
    "edge interval": (EDGE_OUT.interval, {}, ["level", "seed"]),
    "edge top": (EDGE_OUT.top, {"n": 2}, []),
    "edge metric": (EDGE_OUT.for_metric, {"metric": "logit_difference"}, []),
    "edge load": (EdgeOutcome.load, {"path": "/nowhere"}, []),
    "plan": (plan_sweep, PAIR, [*MASKS, *LIMITS]),
    "Sites": (swept, {"site_names": "q"}, ["layers", "heads", "seq_pos_type", "seq_pos"]),
    "lastk": (swept, {"site_names": "q", "seq_pos_type": "lastk"}, ["seq_pos"]),
    "custom": (swept, {"site_names": "q", "seq_pos_type": "custom"}, ["seq_pos"]),
    "constant": (swept, {"site_names": "q", "seq_pos_type": "custom_constant"}, ["seq_pos"]),
    "get_site": (site_of, {"api": API, "site_name": "q", "layer": 0}, ["head", "seq_pos"]),
    "from_sites": (listed, {"sites": [SITE]}, []),
    "MultiSite": (MultiSite, {"sites": [SITE]}, ["name"]),
    "get_sites_dict": (
        SITES.get_sites_dict,
        {"nnmodel": MODEL, "api": API, "tokens": TARGET},
        [],
    ),
    "execution_order": (execution_order, {"sites": [SITE]}, []),
    "cache_average": (cache_average, {"nnmodel": MODEL, "sites": [SITE], "batches": TARGET}, []),
    "load": (Outcome.load, {"path": "/nowhere"}, []),
    "save": (on_disk("save"), {"path": "/nowhere/f"}, []),
    "for_metric": (OUT.for_metric, {"metric": "logit_difference"}, []),
    "strongest": (OUT.strongest, {"k": 2}, []),
    "top": (OUT.top, {"n": 2}, ["name", "distinct"]),
    "sel": (
        OUT.sel,
        {"layer": 0},
        ["site", "layer", "position", "span", "token", "head", "column", "label"],
    ),
    "to_parquet": (on_disk("to_parquet"), {"path": "/nowhere/f"}, ["per_prompt", "level"]),
    "agreement": (OUT.agreement, {"exact": OUT, "top_k": 1}, []),
    **{
        name: (getattr(OUT, name), {"name": "resid", draws: 100}, ["level", "seed", "wider"])
        for name, draws in (("interval", "resamples"), ("band", "flips"))
    },
    "pvalues": (OUT.pvalues, {"name": "resid", "flips": 100}, ["adjust", "seed"]),
    "stability": (OUT.stability, {"k": 2, "resamples": 100}, ["name", "distinct", "seed"]),
    "prompts_needed": (OUT.prompts_needed, {"name": "resid", "width": 0.1}, ["level"]),
    "agreement.interval": (
        OUT.agreement(OUT).interval,
        {"figure": "recall", "resamples": 100},
        ["level", "seed"],
    ),
    "by_group": (OUT.by_group, {"column": ["a", "b"]}, []),
    "plot": (OUT.plot, {}, [*PICTURE, "metrics", "kind", "ax"]),
    "page": (OUT.plot, {"interactive": True}, ["size", "layers", "positions", "values", "mark"]),
    "lines": (OUT.plot, {"kind": "lines"}, ["size", "crop", "layers", "positions", "mark"]),
    "plot_beside": (OUT.plot_beside, {"other": OUT}, [*PICTURE, "labels", "limit_difference"]),
    "combination": ((OUT - OUT).plot, {}, ["kind", "mute", "limit"]),
    "to_dataframe": (OUT.to_dataframe, {}, ["per_prompt", "level"]),
    "to_xarray": (OUT.to_xarray, {}, ["per_prompt"]),
    **{
        name: (getattr(OUT, name), {"name": "resid"}, [])
        for name in ("swept", "elided", "unread", "exact", "flat", "patched", "per_prompt", "axes")
    },
    "from_texts": (
        PromptPairs.from_texts,
        TEXTS,
        [
            *("chat", "system", "chat_template_kwargs", "answers"),
            *("space", "multi_token", "faulty"),
        ],
    ),
    "train_subspace": (
        taught,
        LEARNING,
        [
            *("rank", "held_out", "batch_size", "lr", "weight_decay", "warmup", "kl", "patience"),
            *("seed", "initial", "random_model", "engine", "memory_budget", "checkpoint"),
            "progress",
        ],
    ),
    "sweep_subspaces": (
        taught_everywhere,
        {**{name: LEARNING[name] for name in LEARNING if name != "site"}, "sites": LAST},
        ["rank", "held_out", "lr", "progress"],
    ),
    "evaluate_subspace": (
        evaluate_subspace,
        {**PAIRED, "site": RESID, "subspace": Subspace.random(32), "draws": 1},
        ["seed", "engine", "memory_budget"],
    ),
    "Subspace": (Subspace, {"basis": BASIS}, ["mean", "site", "info"]),
    "save_pretrained": (kept, {"folder": "f"}, ["info"]),
    "from_pretrained": (read, {"name": FOREIGN}, ["filename", "part", "revision", "token"]),
    "push_to_hub": (pushed, {"repo_id": "name"}, ["private", "token", "commit_message"]),
    "Circuit": (Circuit, {"nodes": NODES, "kept": CIRCUIT.kept}, ["scores", "exact", "info"]),
    "Circuit.of": (Circuit.of, {"nodes": NODES, "edges": list(NUMBERS)}, []),
    "from_edges": (
        Circuit.from_edges,
        {"edges": NUMBERS, "nodes": NODES, "n": 1},
        ["threshold", "method", "pruned", "absolute"],
    ),
    "greedy": (
        Circuit.from_edges,
        {"edges": NUMBERS, "nodes": NODES, "n": 1, "method": "greedy"},
        [],
    ),
    "from_json": (Circuit.from_json, {"path": "/nowhere"}, ["nodes"]),
    "from_pt": (Circuit.from_pt, {"path": "/nowhere"}, ["nodes"]),
    "to_json": (of_circuit("to_json"), {}, ["path", "width"]),
    "circuit.plot": (CIRCUIT.plot, {}, ["size", "edges", "title"]),
    "circuit.plot.path": (of_circuit("plot"), {}, ["path", "size"]),
    "circuit.page": (CIRCUIT.page, {}, ["edges", "title"]),
    "circuit.top": (CIRCUIT.top, {"n": 1}, ["absolute"]),
    "precision_recall": (CIRCUIT.precision_recall, {"known": CIRCUIT}, []),
    "areas": (areas, {"fractions": [0.1, 1.0], "faithfulness": [0.0, 1.0]}, []),
    "auroc": (auroc, {"scores": CIRCUIT.scores, "known": CIRCUIT}, ["absolute"]),
    "CircuitCurve": (CircuitCurve, CURVE, []),
    "curve.plot": (lambda **changed: CircuitCurve(**{**CURVE, **changed}).plot(), CURVE, []),
    "curve": (lambda **changed: str(CircuitCurve(**{**CURVE, **changed})), CURVE, []),
    "evaluate_circuit": (
        evaluate_circuit,
        {**PROMPTED, "circuit": Circuit.from_edges(SCORED, n=9, method="greedy", nodes=OF_MODEL)},
        [*MASKS, *COMMON, *EVALUATED, "swap", "complement", "random", "minimality", "progress"],
    ),
    "circuit_curve": (
        circuit_curve,
        {**PROMPTED, "edges": SCORED, "fractions": [0.1, 1]},
        [*MASKS, *COMMON, *EVALUATED, "swap", "method", "absolute"],
    ),
    "find_circuit": (
        find_circuit,
        {**PAIRED, "method": "eap", "top_k": 0, "evaluations": 1, "progress": False},
        [
            *("faithfulness", "steps", "prune", "threshold", "metric", "ablation", "reference"),
            *("per_position", "seed", *LIMITS),
        ],
    ),
    "getitem": (lambda name: OUT[name], {"name": "resid"}, []),
    "steer": (steered, STEERED, []),
    **{
        kind.__name__: (
            lambda value, kind=kind: steered(**{**STEERED, "kind": kind, "value": value}),
            {"value": 1.0},
            [],
        )
        for kind in (Set, Add, Scale)
    },
    "collect": (collect, COLLECTED, ["site", "batch_size", "labels", "tokenizer"]),
    "collected": (collect(**COLLECTED).plot, {}, ["by"]),
    "sweep_steering": (
        sweep_steering,
        {
            "nnmodel": MODEL,
            "site": SPACE,
            "values": [1.0],
            "prompts": TARGET,
            **ANSWERED,
            "api": API,
            "progress": False,
        },
        ["attention_mask", "run", "how", "batch_size", "level"],
    ),
}
TENSORS = [
    torch.tensor(1),
    torch.tensor([]),
    torch.tensor([1.5, 2.5]),
    torch.tensor([1, 2]),
    torch.tensor([-1, 2]),
    torch.tensor([True, False]),
    torch.tensor([[3], [4]]),
    torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]),
    torch.zeros(2, 4, dtype=torch.int64),
    torch.full((2, 4), 10**6),
    torch.zeros(0, 4, dtype=torch.int64),
    torch.zeros(2, 0, dtype=torch.int64),
    torch.zeros(2, 2, 2),
    torch.full((2, 4), torch.nan),
    torch.zeros(2, 4, dtype=torch.int64, device="meta"),
    torch.zeros(2, dtype=torch.int64, device="meta"),
    torch.zeros((), dtype=torch.int64, device="meta"),
    torch.zeros(2, 4, dtype=torch.int64).to_sparse(),
    torch.zeros(2, 4, dtype=torch.uint8),
    torch.zeros(2, 4, dtype=torch.complex64),
    np.array([1, 2]),
    np.array([[1, 2]]),
    np.array("x"),
    np.int64(1),
    np.float32(2),
]
OBJECTS = [
    ..., NotImplemented, Unspeakable(), range(3), iter([]), slice(3), b"x", object(), 1j, MODEL,
    API,     tiny_tokenizer(["a"]), SITES, SITE, Each(), torch.nn.Linear(2, 2), ["resid", "resid"],
    ["resid", "nope"], {"input_ids": SOURCE}, {"input_ids": None}, {"m": 3}, {3: "x"}, [None], [[]],
    "lastk", "custom", "each", "zero", "mean", "resample", "cone", "full", "first", "atp*", "8 KiB",
]  # fmt: skip
plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 3), st.floats(), st.text(max_size=5),
    st.sampled_from([10**30, -(10**30), 2**63, "\ud800", "\0", "resid\n", "\x1b[31m"]),
)  # fmt: skip
bad = st.one_of(
    plain,
    st.lists(plain, max_size=3),
    st.dictionaries(st.text(max_size=2), plain, max_size=2),
    st.sampled_from(TENSORS),
    st.sampled_from(OBJECTS),
)


def may_take_long(argument: Any, value: Any) -> Any:
    """What is a sensible number, only a large one."""
    named = ("steps", "epochs", "draws", "random")
    return argument in named and isinstance(value, int) and value > 5


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_error_is_a_patching_error(entry: Any) -> None:
    call, known, more = ENTRIES[entry]
    arguments = [*known, *more]

    @settings(
        max_examples=12 * len(arguments),
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.sampled_from(arguments), bad)
    def law(argument: Any, value: Any) -> None:
        if may_take_long(argument, value):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                call(**{**known, argument: value})
            except PatchingError as error:
                message = str(error)
                assert message
                # Faulty rows of a table have a line each.
                lines = message.split("\n") if entry == "from_texts" else [message]
                assert all(line.isprintable() for line in lines), message
                assert len(message) < 800, message

    law()


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_array_is_compared_with_no_name(entry: Any) -> None:
    """To ask whether it equals a name gives an array, which is neither true nor false."""
    call, known, more = ENTRIES[entry]
    for argument in (*known, *more):
        for value in (np.array([1, 2]), np.array(["mean", "zero"])):
            with warnings.catch_warnings(), contextlib.suppress(PatchingError):
                warnings.simplefilter("ignore")
                call(**{**known, argument: value})


def test_a_site_name_that_was_not_swept_is_both() -> None:
    for read in (OUT.__getitem__, OUT.swept, OUT.per_prompt):
        with pytest.raises(PatchingError, match=r"^'mlp' was not swept; there are") as caught:
            read("mlp")
        assert isinstance(caught.value, KeyError)
    assert "mlp" not in OUT
    assert OUT.get(("resid",)) is None


def test_errors_are_in_the_docs() -> None:
    from nnpatch_core import errors

    page = (ROOT / "docs" / "errors.md").read_text()
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and kind.__module__ == errors.__name__:
            assert f"`{name}`" in page, name
