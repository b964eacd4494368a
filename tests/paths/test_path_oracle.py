"""Path patching against plain hooks, path by path: every family, engine, and kind of path."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.path_cases import NAMES, Case

#: Padding is a part of what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

ATOL = 1e-5


@pytest.mark.parametrize("through", [None, "mlps"])
@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("family", NAMES)
def test_each_path_is_as_hooks_have_it(family: str, members: int, through: str | None) -> None:
    case = Case.drawn(family, members, seed=0 if through is None else 1)
    outcomes = {engine: case.run(through, engine) for engine in ("cone", "full")}
    paths = case.paths
    assert paths
    for engine, outcome in outcomes.items():
        assert outcome.info["engine"] == engine
        patched = outcome.raw["logit_difference"]["path"]
        assert len(patched) == len(paths)
        for number, path in enumerate(paths):
            expected = case.expected(through, path)
            torch.testing.assert_close(patched[number], expected, atol=ATOL, rtol=1e-5)
