"""A subspace for each site of a grid: the same as one call for each, with tables and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nnpatch_core import MultiSite, Sites, activation_patching
from nnpatch_core.errors import (
    CheckpointError,
    LayerError,
    PatchingError,
    SubspaceError,
    TokensError,
)
from nnpatch_core.subspace import SubspaceSweep, sweep_subspaces
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.lessons import QUICK, as_pairs, last, learned, some_pairs, taught_pairs

LAST = Sites("resid", [0, 2], seq_pos_type="last")


def swept(sites: Any = LAST, pairs: Any = None, **options: Any) -> SubspaceSweep:
    known = {**QUICK, "epochs": 1, **options}
    return sweep_subspaces(
        tiny_model("llama"), None, sites, pairs or some_pairs(), known.pop("rank", 1), **known
    )


def test_each_site_is_learned_as_by_a_call_of_its_own() -> None:
    found = swept()
    assert list(found) == ["resid L0 [-1]", "resid L2 [-1]"]
    assert len(found) == 2
    held = [tuple(each.held_out_pairs.pairs) for each in found.values()]
    assert held[0] == held[1]
    for layer, each in zip((0, 2), found.values(), strict=True):
        alone = learned(tiny_model("llama"), site=last(layer=layer), epochs=1)
        assert torch.equal(each.subspace.basis, alone.subspace.basis)
        assert str(each.evaluation) == str(alone.evaluation)


def test_subspaces_by_layer_are_what_sites_take() -> None:
    found = swept(rank=2)
    assert set(found.subspaces) == {0, 2}
    pairs = some_pairs()
    out = activation_patching(
        tiny_model("llama"),
        None,
        Sites("resid", seq_pos_type="last", subspace=found.subspaces),
        pairs,
        progress=False,
    )
    alone = activation_patching(
        tiny_model("llama"),
        None,
        Sites("resid", [2], seq_pos_type="last", subspace=found["resid L2 [-1]"]),
        pairs,
        progress=False,
    )
    torch.testing.assert_close(out["resid"][2], alone["resid"][2])


def test_heads_and_spans_are_cells_too() -> None:
    heads = swept(Sites("o", [1], seq_pos_type="last", heads=[0, 3]))
    assert list(heads) == ["o L1 H0 [-1]", "o L1 H3 [-1]"]
    assert [each.subspace.width for each in heads.values()] == [8, 8]
    with pytest.raises(SubspaceError, match="several subspaces"):
        _ = heads.subspaces
    taught = taught_pairs([4, 5, 6, 5, 4, 6, 5, 4], 1)
    words = [
        tuple(
            (len(f" w{prompt[0]}"), len(f" w{prompt[0]} w{prompt[1]}"))
            for prompt in (pair.source, pair.target)
        )
        for pair in taught
    ]
    by_name = swept(
        Sites("resid", [1], seq_pos_type="spans", seq_pos=["word", "last"]),
        as_pairs(taught, {"word": words}),
    )
    assert list(by_name) == ["resid L1 'word'", "resid L1 'last'"]


def test_tables_and_the_best_site() -> None:
    found = swept()
    frame = found.to_dataframe()
    assert list(frame["layer"].unique()) == [0, 2]
    rows = frame[(frame["layer"] == 2) & (frame["patched"] == "subspace")]
    assert rows["accuracy"].item() == found["resid L2 [-1]"].accuracy.value
    best = max(found, key=lambda at: (found[at].accuracy.value, -found[at].best.held_out_loss))
    assert found.best == best
    assert best in repr(found)
    lines = str(found).splitlines()
    assert len(lines) == 3
    assert "whole component" in lines[0]
    assert str(found[best].accuracy) in str(found)
    assert "whole component" in found._repr_html_()


def test_a_picture_has_a_line_for_each_control_or_for_each_site() -> None:
    (axes,) = swept().plot().axes
    labels = [line.get_label() for line in axes.lines]
    assert labels == list(swept()["resid L0 [-1]"].evaluation)
    assert list(axes.lines[0].get_xdata()) == [0, 2]
    (axes,) = swept(Sites("o", [0, 1], seq_pos_type="last", heads=[0, 3])).plot().axes
    assert [line.get_label() for line in axes.lines] == ["o H0 [-1]", "o H3 [-1]"]


def test_a_folder_of_checkpoints_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    first = swept(checkpoint=folder)
    assert sorted(each.name for each in folder.iterdir()) == [
        "0000.safetensors",
        "0001.safetensors",
    ]
    again = swept(checkpoint=folder)
    for one, other in zip(first.values(), again.values(), strict=True):
        assert torch.equal(one.subspace.basis, other.subspace.basis)
    with pytest.raises(CheckpointError, match="another call"):
        swept(checkpoint=folder, seed=1)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match="must name a folder"):
        swept(checkpoint=file)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"sites": "resid"}, SubspaceError, "sites must be Sites"),
        ({"sites": Sites}, SubspaceError, "sites must be Sites"),
        ({"pairs": [1]}, TokensError, "must be a PromptPairs"),
        ({"sites": Sites("resid", [9])}, LayerError, "9"),
        ({"rank": 33}, SubspaceError, "32"),
        ({"progress": "no"}, PatchingError, "progress"),
        (
            {"sites": Sites.from_sites([MultiSite([last(), last("mlp")])])},
            SubspaceError,
            "one site",
        ),
    ],
)
def test_bad_input_is_said_first(
    options: dict[str, Any], error: type[PatchingError], told: str
) -> None:
    with pytest.raises(error, match=told):
        swept(**options)


def test_an_adapter_may_be_named() -> None:
    found = sweep_subspaces(
        tiny_model("llama"), tiny_api(), LAST, some_pairs(), **{**QUICK, "epochs": 1}
    )
    assert list(found) == ["resid L0 [-1]", "resid L2 [-1]"]
