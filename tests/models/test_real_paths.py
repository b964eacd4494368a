"""Paths of real weights, against plain hooks: random ones of two and of three nodes."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import pytest

from nnpatch_core import PromptPairs, path_patching
from tests.helpers.edge_oracle import EdgeOracle
from tests.models.real import Real, gemma3_270m, smollm2_135m

#: On logit differences of up to 20.
ATOL = 1e-4
SOURCE = "When Mary and John went to the store, John gave a drink to"
TARGET = "When Mary and John went to the store, Mary gave a drink to"
ANSWERS = (" Mary", " John")
FAMILIES = {"SmolLM2": "llama", "Gemma 3": "gemma3_text"}
MODELS = {"SmolLM2": smollm2_135m, "Gemma 3": gemma3_270m}
#: Senders, receivers amid a path, and receivers at its end, of each sweep.
SENDERS, BETWEEN, ENDS = 5, 2, 4


@pytest.fixture(scope="module", params=MODELS)
def known(request: pytest.FixtureRequest) -> Iterator[tuple[Real, EdgeOracle]]:
    """One model after the other, so that they are not in memory together."""
    real = MODELS[request.param]()
    yield real, EdgeOracle(real.model, FAMILIES[request.param])
    gc.collect()


@pytest.mark.parametrize("through", [None, "mlps"])
@pytest.mark.parametrize("members", [2, 3])
def test_paths_equal_plain_hooks(
    known: tuple[Real, EdgeOracle], members: int, through: Any
) -> None:
    real, oracle = known
    pairs = PromptPairs.from_texts([SOURCE], [TARGET], [ANSWERS[0]], [ANSWERS[1]], real.tokenizer)
    source, target = (
        tuple(tokens[0].tolist()) for tokens in (pairs.source_tokens, pairs.target_tokens)
    )
    draw = random.Random(members)
    every = [edge.split("->") for edge in oracle.edges()]
    writing, reading = (sorted({edge[end] for edge in every} - {"logits"}) for end in (0, 1))
    layers = len(oracle.layers)
    # Below, in the middle and above, so that most of them follow each other.
    low = [name for name in writing if name == "input" or _layer(name) < layers // 3]
    middle = [name for name in reading if layers // 3 <= _layer(name) < 2 * layers // 3]
    high = [name for name in reading if _layer(name) >= 2 * layers // 3]
    path = [draw.sample(low, SENDERS), [*draw.sample(high, ENDS - 1), "logits"]]
    if members == 3:
        path = [path[0][:3], draw.sample(middle, BETWEEN), path[1][-2:]]
    out = path_patching(
        real.model, real.api, None, None, pairs, path=path, through=through, progress=False
    )
    assert out.info["engine"] == "cone"
    senders, receivers = (axis.labels for axis in out.axes("path"))
    index = out.cells["path"].index.tolist()
    assert len(index) == len(senders) * len(receivers)
    for (sender, receiver), value in zip(index, out.raw["logit_difference"]["path"], strict=True):
        nodes = [*str(senders[sender]).split("->"), str(receivers[receiver])]
        logits = oracle.chain(source, target, [[node] for node in nodes], through)
        expected = logits[pairs.source_answer_index] - logits[pairs.target_answer_index]
        assert float(value) == pytest.approx(float(expected), abs=ATOL), nodes


def _layer(name: str) -> int:
    """Of a node that is in a layer."""
    return int(name.removeprefix("a").removeprefix("m").partition(".")[0])
