"""Small random models with an oracle, and pairs of prompts of any lengths, for hypothesis."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

from nnpatch_core.testing import tiny_model
from tests.helpers.edge_derivatives import EdgeDerivatives
from tests.helpers.edge_pairs import Pairs
from tests.helpers.families import FAMILIES

#: Those that the oracle knows in any size: with a projection for each of queries, keys and values.
ANY_SIZE = ("llama", "mistral", "gemma2", "mixtral", "cohere", "granite", "qwen3", "olmo2")
#: A model, an adapter (None finds it), an oracle, and pairs.
Drawn = tuple[Any, Any, EdgeDerivatives, Pairs]
#: These differ in one token, so that values have a scale, whatever is drawn beside them.
BESIDE = Pairs([(5, 6)], [(5, 9)], ([1], [2]))

prompts = st.lists(st.integers(3, 60), min_size=1, max_size=6)


@st.composite
def tiny(draw: Any) -> Drawn:
    """A model, its adapter and oracle, and pairs, of which some may be one prompt twice."""
    family = draw(st.sampled_from(ANY_SIZE))
    groups, dim = draw(st.sampled_from([1, 2])), draw(st.sampled_from([4, 8]))
    model = tiny_model(
        family,
        seed=draw(st.integers(0, 99)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=groups * draw(st.sampled_from([1, 2])),
        num_key_value_heads=groups,
        hidden_size=16,
        intermediate_size=24,
        # The others take it from the width.
        **({} if family in ("cohere", "mixtral", "olmo2") else {"head_dim": dim}),
    )
    targets = draw(st.lists(prompts, min_size=1, max_size=3))
    sources = [draw(st.one_of(prompts, st.just(target))) for target in targets]
    count = len(targets)
    return (
        model,
        FAMILIES[family].api if family in FAMILIES else None,
        EdgeDerivatives(copy.deepcopy(model), family),
        Pairs([*map(tuple, sources)], [*map(tuple, targets)], ([1] * count, [2] * count)),
    )


def with_others(pairs: Pairs) -> Pairs:
    """The pairs, and those that give values a scale."""
    right, wrong = (
        [*one, *other] for one, other in zip(pairs.answers, BESIDE.answers, strict=True)
    )
    return Pairs(
        [*pairs.sources, *BESIDE.sources], [*pairs.targets, *BESIDE.targets], (right, wrong)
    )
