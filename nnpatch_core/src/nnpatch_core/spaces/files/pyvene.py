"""Rotations that pyvene has learned (`intkey_*.bin`, beside a `config.json`), from release 0.1.8.

Each file is the state dict of one intervention. Which of the rotated coordinates it exchanges is
told by its numbers, or, where the user chooses it for each call, by the `part=` of the reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import attrs
import torch
from torch import Tensor

from nnpatch_core._integers import strict_int
from nnpatch_core._printable import shown
from nnpatch_core.errors import SubspaceError
from nnpatch_core.spaces.files.content import Content
from nnpatch_core.spaces.files.orthogonal import parametrised

#: pyvene's components and ours. It picks heads when it runs, so that no file tells which.
_COMPONENTS = {
    "block_input": "resid_pre",
    "block_output": "resid",
    "attention_output": "attn",
    "attention_value_output": "o",
    "mlp_output": "mlp",
    "query_output": "q",
    "key_output": "k",
    "value_output": "v",
}
#: The fields of one of its representations, in the order in which a saved config lists them.
_FIELDS = (
    "layer", "component", "unit", "max_number_of_units", "low_rank_dimension", "intervention_type",
    "intervention", "subspace_partition",
)  # fmt: skip
#: Its own layer, or the older nnpatch's projection inside one of its interventions.
_LAYERS = ("rotate_layer.", "proj.")
_WEIGHT, _BASE = "parametrizations.weight.original", "parametrizations.weight.0.base"
#: A mask may be so far from 0 and 1: rounding of float32.
_HARD = 1e-6


@attrs.frozen
class Representation:
    """One intervention of a config.

    Args:
        kind: its class's name, "" if the config does not say.
        fields: of the config, by name.
        dimension: how many coordinates its config says that it exchanges; None if it says nothing.
    """

    kind: str = ""
    fields: Mapping[str, Any] = attrs.field(factory=dict)
    dimension: Any = None

    @property
    def partition(self) -> Any:
        """The groups of coordinates, of which each call chooses some; None if there are none."""
        return self.fields.get("subspace_partition")


#: Of a file that lies alone.
NOTHING_TOLD = Representation()


def is_pyvene(names: Mapping[str, Any]) -> bool:
    """Whether a state dict is one of pyvene's interventions, by its names."""
    own = {"masks", "mask", "intervention_boundaries", "interchange_dim", "pca_components"}
    return any(name in own or name.startswith(_LAYERS) for name in names)


def is_pyvene_config(config: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a `config.json` is pyvene's."""
    return isinstance(config, Mapping) and {"representations", "intervention_types"} <= set(config)


def file_names(config: Mapping[str, Any]) -> list[str]:
    """The files that a config speaks of, in the order of its representations.

    Raises:
        SubspaceError: it is malformed.
    """
    met: dict[str, int] = {}
    names = []
    for fields in _representations(config):
        component, unit = str(fields.get("component")), str(fields.get("unit"))
        # As pyvene makes its keys: a path of modules names the layer by itself.
        layer = "" if "." in component else f"layer_{fields.get('layer')}_"
        key = f"{layer}comp_{component}_unit_{unit}_nunit_{fields.get('max_number_of_units')}"
        key = key.replace(".", "_")
        names.append(f"intkey_{key}#{met.get(key, 0)}.bin")
        met[key] = met.get(key, 0) + 1
    return names


def representation(config: Mapping[str, Any], name: str) -> Representation:
    """The part of a config that is about the intervention of one file.

    Raises:
        SubspaceError: it is malformed, or does not speak of it.
    """
    names = file_names(config)
    if name not in names:
        raise SubspaceError(f"its config.json speaks of {shown(names)}, and not of {shown(name)}")
    number = names.index(name)
    kinds = config.get("intervention_types")
    dimensions = config.get("intervention_dimensions") or [None] * len(names)
    if not all(isinstance(each, list) and len(each) == len(names) for each in (kinds, dimensions)):
        raise SubspaceError(
            f"its config.json lists {len(names)} representations, and not a type for each"
        )
    assert isinstance(kinds, list)
    kind = str(kinds[number]).rpartition(".")[2].rstrip("'>")
    return Representation(kind, _representations(config)[number], dimensions[number])


def _representations(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Their fields by name."""
    listed = config.get("representations")
    found = []
    for each in listed if isinstance(listed, list) else [None]:
        if isinstance(each, list):
            each = dict(zip(_FIELDS, each, strict=False))
        if not isinstance(each, dict) or not {"layer", "component", "unit"} <= set(each):
            raise SubspaceError(f"its config.json has the representation {shown(each)}")
        found.append(each)
    return found


def content_of(tensors: Mapping[str, Tensor], told: Representation, part: int | None) -> Content:
    """The subspace that an intervention exchanges.

    Args:
        tensors: its state dict.
        told: what its config says.
        part: which group of coordinates, where the config has a partition.

    Raises:
        SubspaceError: it exchanges no subspace, or the file does not say which one.
    """
    _check_kind(tensors, told)
    units = told.fields.get("max_number_of_units")
    if units not in (None, 1):
        raise SubspaceError(
            f"it joins the activations of {shown(units)} positions to one, and a subspace is of "
            "the activation of one position"
        )
    weight = _weight(tensors)
    chosen = _columns(tensors, told, part, weight)
    info: dict[str, Any] = {"method": "learned", "file": f"pyvene's {told.kind or 'rotation'}"}
    where = {
        name: told.fields[name]
        for name in ("layer", "component", "unit")
        if isinstance(told.fields.get(name), int | str)
    }
    if where:
        info["pyvene"] = where
    return Content(weight[:, chosen].contiguous(), site=_site(told.fields), info=info)


def _check_kind(tensors: Mapping[str, Tensor], told: Representation) -> None:
    """Raise `SubspaceError` for interventions that exchange something else than a subspace."""
    if "intervention_boundaries" in tensors:
        raise SubspaceError(
            "pyvene's boundless rotation exchanges no subspace: its mask is soft, whatever its "
            "temperature, in use as in training (of the first coordinate it exchanges at most "
            "half); to have the first k coordinates as a subspace, load it with pyvene and give "
            "Subspace(intervention.rotate_layer.weight.detach()[:, :k])"
        )
    if any(name.startswith("autoencoder.") or name in ("W_enc", "W_dec") for name in tensors):
        raise SubspaceError(
            "it is an autoencoder, whose features are no linear subspace: load it with pyvene, "
            "and give an object with its encode and decode to Features"
        )
    if "pca_components" in tensors:
        raise SubspaceError(
            "pyvene's rotation by PCA scales each coordinate of the activation, and exchanges no "
            "linear subspace of it: make one with Subspace.pca"
        )
    known = [f"{layer}{_WEIGHT}" in tensors for layer in _LAYERS]
    if not any(known) and "mask" not in tensors:
        raise SubspaceError(
            f"an intervention of pyvene's with the tensors {shown(sorted(tensors))} has no rotation"
        )


def _weight(tensors: Mapping[str, Tensor]) -> Tensor:
    """The rotation `[width, coordinates]`; the standard basis, where only a mask was learned."""
    for layer in _LAYERS:
        if f"{layer}{_WEIGHT}" in tensors:
            return parametrised(tensors[f"{layer}{_WEIGHT}"], tensors.get(f"{layer}{_BASE}"))
    mask = tensors["mask"]
    kind = torch.promote_types(mask.dtype, torch.float32)
    return torch.eye(mask.numel(), dtype=kind, device="cpu")


def _columns(
    tensors: Mapping[str, Tensor], told: Representation, part: int | None, weight: Tensor
) -> list[int]:
    """Which columns of a rotation are exchanged."""
    width, many = weight.shape
    if told.partition is not None:
        return _of_partition(told.partition, part, many)
    if part is not None:
        raise SubspaceError("part= is of interventions that have a partition, and this has none")
    masks = tensors.get("masks", tensors.get("mask"))
    if masks is not None:
        return _of_mask(masks, tensors.get("temperature"), many)
    if many < width:
        return list(range(many))
    counted = tensors.get("interchange_dim")
    if counted is not None and counted.numel() != 1:
        raise SubspaceError(f"its interchange_dim is {shown(counted)}")
    number = told.dimension if counted is None else int(counted)
    if not isinstance(number, int) or not 1 <= number <= many:
        raise SubspaceError(
            f"it does not say how many of its {many} coordinates are exchanged: interchange_dim "
            f"is {shown(number)}"
        )
    return list(range(number))


def _of_partition(partition: Any, part: int | None, many: int) -> list[int]:
    groups = [_group(each) for each in partition] if isinstance(partition, list) else [None]
    if any(group is None or not set(group) <= set(range(many)) for group in groups):
        raise SubspaceError(f"its partition of {many} coordinates is {shown(partition)}")
    if part is None:
        raise SubspaceError(
            f"its coordinates have the partition {shown(partition)}, of which each call of pyvene "
            f"exchanges some: choose one with part=, from 0 to {len(groups) - 1}"
        )
    number = strict_int(part, "part", SubspaceError)
    if not 0 <= number < len(groups):
        raise SubspaceError(f"part must be from 0 to {len(groups) - 1}, got {number}")
    found = groups[number]
    assert found is not None
    return found


def _group(each: Any) -> list[int] | None:
    """The coordinates of one group: as pyvene reads them, two numbers are a range."""
    if not isinstance(each, list) or not all(type(number) is int for number in each):
        return None
    found = list(range(*each)) if len(each) == 2 else each
    return found if found and len(set(found)) == len(found) else None


def _of_mask(masks: Tensor, temperature: Tensor | None, many: int) -> list[int]:
    """The coordinates whose mask is 1."""
    if masks.numel() != many or temperature is None or temperature.numel() != 1:
        raise SubspaceError(
            f"its mask of {masks.numel()} numbers and its temperature do not fit {many} coordinates"
        )
    shares = torch.sigmoid(masks.flatten().double() / temperature.flatten().double())
    hard = (shares - shares.round()).abs() <= _HARD
    if not bool(hard.all()):
        raise SubspaceError(
            f"pyvene exchanges a share of {int((~hard).sum())} of its {many} coordinates, in use "
            "as in training: its mask is no subspace, unless each is 0 or 1, as at a lower "
            "temperature"
        )
    found = shares.round().nonzero().flatten().tolist()
    if not found:
        raise SubspaceError("its mask exchanges no coordinate")
    return [int(each) for each in found]


def _site(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    component, layer = fields.get("component"), fields.get("layer")
    # With another unit, the width may be that of one head, and nobody has written which.
    if component not in _COMPONENTS or type(layer) is not int or fields.get("unit") != "pos":
        return None
    name = _COMPONENTS[component]
    where = "positions that the file does not tell"
    return {"component": name, "layer": layer, "head": None, "seq_pos": None, "where": where}
