"""Files of the older library and of pyvene, against what their own libraries made of vectors."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nnpatch_core.errors import SubspaceError
from nnpatch_core.spaces.files.orthogonal import parametrised
from nnpatch_core.subspace import SiteRecord, Subspace
from tests.helpers.paths import ROOT
from tests.helpers.refusals import raises

FILES = ROOT / "tests" / "spaces" / "files"
OLDER, PYVENE = FILES / "older", FILES / "pyvene"
MLP = "intkey_layer_0_comp_mlp_output_unit_pos_nunit_1#0.bin"
KEY = "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin"
WHERE = "positions that the file does not tell"


def check(subspace: Subspace, folder: Path) -> None:
    """It exchanges what the library exchanged that the file is of."""
    expected = load_file(folder / "expected.safetensors")
    found = subspace.interchange(expected["source"], expected["target"])
    assert torch.allclose(found, expected["result"], atol=5e-6)
    assert not torch.allclose(expected["result"], expected["target"], atol=0.1)


def copied(folder: Path, to: Path, **changed: Any) -> Path:
    """A copy whose state dict has other entries, or lacks those that are None."""
    shutil.copytree(folder, to)
    for file in to.glob("intkey_*.bin"):
        state = torch.load(file, weights_only=True)
        state.update(changed)
        torch.save({key: each for key, each in state.items() if each is not None}, file)
    return to


def reconfigured(folder: Path, to: Path, **changed: Any) -> Path:
    """A copy whose config has other entries."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changed}))
    return to


# torch's parametrisation.


class Weighted(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_parametrisation_is_that_of_torch(data: st.DataObject) -> None:
    """Tall and square, with its base and without, as made and after steps of an optimiser."""
    width = data.draw(st.integers(1, 12), "width")
    rank = data.draw(st.integers(1, width), "rank")
    based = data.draw(st.booleans(), "based") or rank == width
    kind = data.draw(st.sampled_from([torch.float32, torch.float64]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    made = Weighted(torch.randn(width, rank, dtype=kind))
    module = nn.utils.parametrizations.orthogonal(made, use_trivialization=based)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.2)
    for _ in range(data.draw(st.integers(0, 4))):
        optimizer.zero_grad()
        (module.weight * torch.randn(width, rank, dtype=kind)).sum().backward()
        optimizer.step()
    state = module.state_dict()
    found = parametrised(
        state["parametrizations.weight.original"], state.get("parametrizations.weight.0.base")
    )
    # In float32 torch's own exponential is off by 5e-5, and not orthonormal.
    exact = module.double().weight.detach()
    tolerance = 1e-12 if kind == torch.float64 else 1e-6
    assert found.dtype == kind
    assert torch.allclose(found.double(), exact, atol=tolerance, rtol=0)
    Subspace(found)


def test_weight_decay_has_eaten_the_signs() -> None:
    """torch itself gives vectors of the length 0 then."""
    module = nn.utils.parametrizations.orthogonal(Weighted(torch.randn(6, 2)))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    (module.weight * torch.randn(6, 2)).sum().backward()
    optimizer.step()
    assert float(module.weight.detach().abs().max()) == 0
    state = module.state_dict()
    with raises(SubspaceError, "as weight decay does", "put the signs of the diagonal"):
        parametrised(
            state["parametrizations.weight.original"], state["parametrizations.weight.0.base"]
        )


@pytest.mark.parametrize(
    ("parameter", "base", "words"),
    [
        (torch.zeros(3), None, "must be [width, rank]"),
        (torch.zeros(0, 0), None, "must be [width, rank]"),
        (torch.zeros(3, 1, dtype=torch.int64), None, "must be [width, rank]"),
        (torch.zeros(2, 3), None, "3 vectors of width 2 are no basis"),
        (-torch.eye(3)[:, :1], torch.eye(2), "is 3 wide, and its base torch.float32 [2, 2]"),
        (torch.full((3, 1), torch.nan), None, "not finite"),
    ],
)
def test_parameters_that_are_none(parameter: Tensor, base: Tensor | None, words: str) -> None:
    with raises(SubspaceError, words):
        parametrised(parameter, base)


# The older library.


@pytest.mark.parametrize(
    ("name", "rank"), [("rank1", 1), ("rank3", 3), ("square", 8), ("plain", 2)]
)
def test_projections_of_the_older_library(name: str, rank: int) -> None:
    folder = OLDER / name
    found = Subspace.from_pretrained(folder)
    assert (found.width, found.rank, found.site) == (8, rank, None)
    assert found.info["file"] == "a projection of the older nnpatch"
    if name == "square":
        expected = load_file(folder / "expected.safetensors")
        assert torch.allclose(expected["result"], expected["source"], atol=1e-5)
    check(found, folder)


def test_older_still_it_was_a_state_dict(tmp_path: Path) -> None:
    file = OLDER / "rank3" / "projection.pt"
    check(Subspace.from_pretrained(file), OLDER / "rank3")
    shutil.copy(file, tmp_path / "pytorch_model.bin")
    check(Subspace.from_pretrained(tmp_path), OLDER / "rank3")
    check(Subspace.from_pretrained(tmp_path, filename="pytorch_model.bin"), OLDER / "rank3")


def test_a_projection_without_its_config(tmp_path: Path) -> None:
    shutil.copy(OLDER / "rank1" / "model.safetensors", tmp_path)
    check(Subspace.from_pretrained(tmp_path), OLDER / "rank1")


def test_a_projection_of_another_size_than_it_says(tmp_path: Path) -> None:
    folder = reconfigured(OLDER / "rank3", tmp_path / "a", rank=2)
    with raises(SubspaceError, str(folder), "it says rank 2, and its weight has the shape [8, 3]"):
        Subspace.from_pretrained(folder)
    state = torch.load(OLDER / "rank3" / "projection.pt", weights_only=True)
    torch.save({**state, "embed_dim": torch.tensor(9)}, tmp_path / "p.pt")
    with raises(SubspaceError, "it says embed_dim 9"):
        Subspace.from_pretrained(tmp_path / "p.pt")


def test_a_weight_that_is_not_orthonormal(tmp_path: Path) -> None:
    save_file({"weight": torch.full((3, 1), 2.0)}, tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    with raises(SubspaceError, f"{file} cannot be read as a subspace", "not orthonormal"):
        Subspace.from_pretrained(tmp_path)


# pyvene.


@pytest.mark.parametrize(
    ("name", "options", "rank", "site"),
    [
        ("low_rank", {}, 2, SiteRecord("resid", 1, where=WHERE)),
        ("two", {"filename": MLP}, 2, SiteRecord("mlp", 0, where=WHERE)),
        ("one_head", {}, 2, None),
        ("rotated", {}, 3, SiteRecord("resid", 1, where=WHERE)),
        ("partition", {"part": 2}, 3, SiteRecord("resid", 1, where=WHERE)),
        ("hard_mask", {}, 3, SiteRecord("resid", 1, where=WHERE)),
    ],
)
def test_rotations_of_pyvene(
    name: str, options: dict[str, Any], rank: int, site: SiteRecord | None
) -> None:
    found = Subspace.from_pretrained(PYVENE / name, **options)
    assert (found.rank, found.site) == (rank, site)
    assert found.info["method"] == "learned"
    assert found.info["pyvene"]["layer"] in (0, 1)
    check(found, PYVENE / name)


def test_a_partition_is_read_as_pyvene_reads_it() -> None:
    """Two numbers are a range, more of them are those coordinates; each file has it all."""
    bases = [Subspace.from_pretrained(PYVENE / "partition", part=part).basis for part in range(3)]
    assert [each.shape[1] for each in bases] == [2, 1, 3]
    # Columns 0, 1 | 2 | 4, 6, 7 of one rotation.
    Subspace(torch.cat(bases, 1))
    with raises(SubspaceError, "choose one with part=, from 0 to 2"):
        Subspace.from_pretrained(PYVENE / "partition")
    for part in (3, -1):
        with raises(SubspaceError, f"part must be from 0 to 2, got {part}"):
            Subspace.from_pretrained(PYVENE / "partition", part=part)
    with raises(SubspaceError, "part must be an integer"):
        Subspace.from_pretrained(PYVENE / "partition", part="a")
    with raises(SubspaceError, "this has none"):
        Subspace.from_pretrained(PYVENE / "rotated", part=0)


def test_a_file_of_pyvene_that_lies_alone(tmp_path: Path) -> None:
    shutil.copy(PYVENE / "low_rank" / KEY, tmp_path / "rotation.bin")
    found = Subspace.from_pretrained(tmp_path / "rotation.bin")
    assert found.site is None
    check(found, PYVENE / "low_rank")


def test_several_interventions_need_a_name() -> None:
    with raises(SubspaceError, "speaks of 2 interventions: choose one with filename=", MLP, KEY):
        Subspace.from_pretrained(PYVENE / "two")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("boundless", "its mask is soft, whatever its temperature"),
        ("soft_mask", "exchanges a share of 8 of its 8 coordinates"),
        ("autoencoder", "features are no linear subspace"),
    ],
)
def test_interventions_that_exchange_no_subspace(name: str, words: str) -> None:
    with raises(SubspaceError, str(PYVENE / name / KEY), words):
        Subspace.from_pretrained(PYVENE / name)


def test_a_boundless_rotation_is_soft_at_any_temperature() -> None:
    """By pyvene's formula: of the first coordinate it exchanges a half, or less."""
    state = torch.load(PYVENE / "boundless" / KEY, weights_only=True)
    coordinates, end = torch.arange(8.0), state["intervention_boundaries"].clamp(1e-3, 1) * 8
    for temperature in (50.0, 1.0, 1e-3, 1e-6):
        mask = torch.sigmoid(coordinates / temperature)
        mask *= torch.sigmoid((end - coordinates) / temperature)
        assert 0.2 < float(mask[0]) <= 0.5


def test_a_mask_of_plain_coordinates(tmp_path: Path) -> None:
    """pyvene's mask without a rotation: the same formula, of the activation as it is."""
    mask = torch.tensor([1.0, -1.0, 1.0])
    state = {"mask": mask, "temperature": torch.tensor(0.01), "embed_dim": torch.tensor(3)}
    torch.save(state, tmp_path / "mask.bin")
    found = Subspace.from_pretrained(tmp_path / "mask.bin")
    assert torch.equal(found.basis, torch.eye(3)[:, [0, 2]])
    torch.save({**state, "mask": -mask.abs()}, tmp_path / "mask.bin")
    with raises(SubspaceError, "its mask exchanges no coordinate"):
        Subspace.from_pretrained(tmp_path / "mask.bin")
    torch.save({**state, "temperature": torch.tensor(1.0)}, tmp_path / "mask.bin")
    with raises(SubspaceError, "a share of 3 of its 3 coordinates"):
        Subspace.from_pretrained(tmp_path / "mask.bin")
    torch.save({"mask": mask}, tmp_path / "mask.bin")
    with raises(SubspaceError, "and its temperature do not fit"):
        Subspace.from_pretrained(tmp_path / "mask.bin")


def test_a_rotation_that_does_not_say_how_much_it_exchanges(tmp_path: Path) -> None:
    folder = copied(PYVENE / "rotated", tmp_path / "a", interchange_dim=torch.tensor([1, 2]))
    with raises(SubspaceError, "its interchange_dim is"):
        Subspace.from_pretrained(folder)
    folder = copied(PYVENE / "rotated", tmp_path / "b", interchange_dim=None)
    assert Subspace.from_pretrained(folder).rank == 3
    (folder / "config.json").unlink()
    with raises(SubspaceError, "it does not say how many of its 8 coordinates"):
        Subspace.from_pretrained(folder / KEY)
    folder = copied(PYVENE / "rotated", tmp_path / "c", interchange_dim=torch.tensor(9))
    with raises(SubspaceError, "interchange_dim is 9"):
        Subspace.from_pretrained(folder)


LISTED = [1, "block_output", "pos", 1, 2, None, None, None]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"representations": "x"}, "has the representation None"),
        ({"representations": [3]}, "has the representation 3"),
        ({"representations": [{"layer": 1}]}, "has the representation {'layer': 1}"),
        ({"representations": []}, "speaks of 0 interventions"),
        ({"intervention_types": []}, "and not a type for each"),
        ({"representations": [[0, *LISTED[1:]]]}, "layer_0_comp_block_output"),
        ({"representations": [[1, "block_output", "pos", 4, *LISTED[4:]]]}, "nunit_4"),
        ({"representations": [[1, "../x", "pos", 1, *LISTED[4:]]]}, "there is no"),
    ],
    ids=str,
)
def test_configs_of_pyvene_that_are_malformed(
    tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    folder = reconfigured(PYVENE / "low_rank", tmp_path / "a", **changed)
    with raises(SubspaceError, str(folder), words):
        Subspace.from_pretrained(folder)


def test_activations_of_several_positions_in_one(tmp_path: Path) -> None:
    listed = [[1, "block_output", "pos", 2, *LISTED[4:]]]
    folder = reconfigured(PYVENE / "low_rank", tmp_path / "a", representations=listed)
    (folder / KEY).rename(folder / KEY.replace("nunit_1", "nunit_2"))
    with raises(SubspaceError, "joins the activations of 2 positions"):
        Subspace.from_pretrained(folder)


def test_the_layer_is_that_of_the_file_whatever_the_order_of_keys(tmp_path: Path) -> None:
    """pyvene may sort the keys; types and representations stay in their own order."""
    config = json.loads((PYVENE / "two" / "config.json").read_text())
    keys = config["sorted_keys"][::-1]
    folder = reconfigured(PYVENE / "two", tmp_path / "a", sorted_keys=keys)
    assert Subspace.from_pretrained(folder, filename=MLP).site.component == "mlp"
    assert Subspace.from_pretrained(folder, filename=KEY).site.component == "resid"


def test_a_component_that_nnpatch_does_not_have_is_told(tmp_path: Path) -> None:
    listed = [[1, "mlp_activation", *LISTED[2:]]]
    folder = reconfigured(PYVENE / "low_rank", tmp_path / "a", representations=listed)
    (folder / KEY).rename(folder / KEY.replace("block_output", "mlp_activation"))
    found = Subspace.from_pretrained(folder)
    assert found.site is None
    assert found.info["pyvene"] == {"layer": 1, "component": "mlp_activation", "unit": "pos"}


# What is nothing of all this.


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('it ran')",)


def test_no_code_of_a_file_runs(tmp_path: Path) -> None:
    trap = tmp_path / "trap.bin"
    trap.write_bytes(pickle.dumps({"weight": Trap()}))
    torch.save({"weight": Trap()}, tmp_path / "saved.bin")
    for file in (trap, tmp_path / "saved.bin"):
        with raises(SubspaceError, str(file), "without running code of it"):
            Subspace.from_pretrained(file)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a.weight": torch.zeros(2)}, "it holds the tensors ['a.weight']"),
        ({}, "it holds the tensors []"),
        ([1, 2], "no state dict of tensors, but [1, 2]"),
        ({"weight": 3}, "no state dict of tensors"),
        ({1: torch.zeros(2)}, "no state dict of tensors"),
        ({"weight": torch.eye(2).to_sparse()}, "sparse, quantised or empty"),
        ({"weight": torch.zeros(2, 1, device="meta")}, "sparse, quantised or empty"),
        ({"weight": torch.zeros(2, 1, dtype=torch.complex64)}, "must be real numbers"),
        ({"weight": torch.zeros(2)}, "must have the shape [width, rank]"),
        ({"rotate_layer.other": torch.zeros(2)}, "has no rotation"),
        ({"pca_components": torch.eye(2)}, "make one with Subspace.pca"),
    ],
    ids=str,
)
def test_state_dicts_of_something_else(tmp_path: Path, state: Any, words: str) -> None:
    file = tmp_path / "other.pt"
    torch.save(state, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with raises(SubspaceError, str(file), words):
            Subspace.from_pretrained(file)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama"}, "is of a model of the type 'llama'"),
        ({"a": 1}, "is of no subspace"),
        ([], "is of no subspace"),
    ],
    ids=str,
)
def test_folders_of_something_else(tmp_path: Path, config: Any, words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with raises(SubspaceError, str(tmp_path / "config.json"), words, "what can be read is"):
        Subspace.from_pretrained(tmp_path)


def test_weights_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 20)
    with raises(SubspaceError, "is not a safetensors file"):
        Subspace.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff")
    with raises(SubspaceError, "is not JSON"):
        Subspace.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with raises(SubspaceError, "is not JSON"):
        Subspace.from_pretrained(tmp_path)


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_damaged_files_of_others_are_told(tmp_path_factory: Any, data: st.DataObject) -> None:
    """Whatever bytes change: a subspace, or an error of one line that names the file."""
    sources = [OLDER / "rank3" / "projection.pt", OLDER / "rank1" / "model.safetensors"]
    source = data.draw(st.sampled_from([*sources, PYVENE / "low_rank" / KEY]))
    whole = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] ^= data.draw(st.integers(1, 255))
    del whole[data.draw(st.integers(len(whole) // 2, len(whole))) :]
    file = tmp_path_factory.mktemp("damaged") / source.name
    file.write_bytes(whole)
    try:
        Subspace.from_pretrained(file)
    except SubspaceError as error:
        told = str(error)
    else:
        return
    assert source.name in told
    assert told.isprintable()
    assert len(told) < 1000
