"""The types of names are the tables of names, and mypy reads them as a user's does.

In this file mypy checks arguments too (see pyproject.toml): an ignored error that is none fails.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from nnpatch_core import (
    DecoderAPI,
    Outcome,
    PromptPairs,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    edge_patching,
    names,
)
from nnpatch_core.components import COMPONENT_NAMES, SYNONYMS
from nnpatch_core.edges import EDGE_METHODS, EXACT
from nnpatch_core.engine.table import ENGINES
from nnpatch_core.interventions.ablations import METHODS
from nnpatch_core.metrics import BUILTIN_METRICS
from nnpatch_core.patching.screen import SCREENS
from nnpatch_core.prompts import AblationArguments, PatchingArguments
from nnpatch_core.seq_pos import BUILTIN_SEQ_POS
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer

TABLES = {
    "ComponentName": [*COMPONENT_NAMES, *SYNONYMS],
    "SeqPosName": [*BUILTIN_SEQ_POS],
    "MetricName": [*BUILTIN_METRICS],
    "EngineName": ["auto", *(engine.name for engine in ENGINES)],
    "ScreenName": [*SCREENS],
    "AblationName": [*METHODS],
    "EstimatedAblationName": [name for name, method in METHODS.items() if method.estimated],
    "EdgeMethodName": [EXACT, *EDGE_METHODS],
}
LAST = Sites("resid", seq_pos_type="last")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    source, target, answers, others = ["a b", "a c"], ["a d", "a b"], [" c", " d"], [" d", " c"]
    tokenizer = tiny_tokenizer([" a b c d"])
    return PromptPairs.from_texts(source, target, answers, others, tokenizer)


def test_every_type_has_a_table() -> None:
    found = {name for name, value in vars(names).items() if typing.get_args(value)}
    assert found == set(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_a_type_is_its_table(name: str) -> None:
    found = typing.get_args(getattr(names, name))
    assert len(set(found)) == len(found)
    assert set(found) == set(TABLES[name])


@pytest.mark.parametrize(
    ("kind", "made"),
    [(PatchingArguments, "arguments"), (AblationArguments, "ablation_arguments")],
)
def test_arguments_are_those_of_their_type(pairs: PromptPairs, kind: Any, made: str) -> None:
    found: Mapping[str, Any] = getattr(pairs, made)()
    types = typing.get_type_hints(kind)
    # Spans are left out where there are none.
    assert kind.__optional_keys__ == {"spans"}
    assert set(found) == set(types) - {"spans"}
    for name, value in found.items():
        assert types[name] is Any or isinstance(value, types[name])


def test_arguments_type_check(model: Any, pairs: PromptPairs) -> None:
    given = pairs.arguments()
    out: Outcome = activation_patching(model, None, LAST, **given, progress=False)
    estimate: Outcome = attribution_patching(model, None, LAST, **given, progress=False)
    assert list(out) == list(estimate)
    edges = edge_patching(model, None, **given, senders="m0", progress=False)
    value: float = edges["m0->logits"]
    assert len(edges) > 1
    assert value == edges.matrix[4 + 1, -1].item()
    lost = ablation_patching(model, None, LAST, **pairs.ablation_arguments(), progress=False)
    assert list(lost) == ["resid"]
    tokens: torch.Tensor = given["source_tokens"]
    assert tokens.shape == (2, 2)


def test_names_of_others_type_check(model: Any, pairs: PromptPairs) -> None:
    """Of plugins and adapters: any text, a variable too."""
    name: str = "resid"
    last: str = "last"
    own = DecoderAPI("Own", ("llama",), {"resid": tiny_api().components["resid"]})
    metrics: list[str] = ["logit_difference"]
    sites = Sites([name], seq_pos_type=last)
    activation_patching(model, own, sites, pairs, metric=metrics, progress=False)
    assert Site.get_site(own, name, 0).name == name


def figures(out: Outcome) -> None:
    """Read by mypy alone."""
    out.plot(sites=["resid"], limit="largest", crop=True).savefig("out.png")
    out.plot(interactive=True).write_html("out.html")
    out.agreement(out).plot().savefig("out.png")
    out.plot().write_html("out.html")  # type: ignore[attr-defined]
    out.plot(site=["resid"])  # type: ignore[call-overload]
    out.plot(limit="smallest")  # type: ignore[call-overload]
    out.agreement(out).plot(labels=3)  # type: ignore[call-overload]


def typos(model: Any, pairs: PromptPairs) -> None:
    """Read by mypy alone."""
    activation_patching(model, None, LAST, pairs, engine="cones")  # type: ignore[arg-type]
    activation_patching(model, None, LAST, pairs, screen="atp")  # type: ignore[arg-type]
    ablation_patching(model, None, LAST, pairs, method="zeros")  # type: ignore[arg-type]
    attribution_patching(model, None, LAST, pairs, ablation="resample")  # type: ignore[arg-type]
    edge_patching(model, None, pairs, method="eap-ig")  # type: ignore[arg-type]
    edge_patching(model, None, pairs, ablation="zeros")  # type: ignore[arg-type]
    pairs.arguments()["source"]  # type: ignore[typeddict-item]
    activation_patching(model, None, LAST, **pairs.ablation_arguments())  # type: ignore[misc]
