"""Writes the files of tests/spaces/files, with the libraries that they are of.

    pip install pyvene==0.1.8
    git clone https://github.com/jkminder/nnpatch older
    python tests/scripts/foreign_subspaces.py --older older tests/spaces/files

Run it where nnpatch itself is not installed: both libraries are called nnpatch. Every intervention
is trained for some steps, so that its parameters are not those of its start, and then run on some
vectors: `expected.safetensors` has what its own library makes of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import huggingface_hub.hf_api  # noqa: F401 - before nnsight, which pyvene imports
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH, LAYERS, MANY = 8, 2, 5


def model() -> Any:
    """A model, for its sizes alone."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes, **heads))


def vectors(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    source, target = torch.randn(2, MANY, width, generator=generator)
    return source, target


def trained(module: Any, exchange: Any, width: int = WIDTH, steps: int = 5) -> None:
    """Some steps towards anything."""
    source, target = vectors(width)
    parameters = [each for each in module.parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (exchange(source.clone(), target.clone()) - 1).square().mean().backward()
        optimizer.step()


def keep(folder: Path, exchange: Any, width: int = WIDTH) -> None:
    source, target = vectors(width)
    with torch.no_grad():
        result = exchange(source.clone(), target.clone())
    tensors = {"source": source, "target": target, "result": result}
    save_file(
        {name: each.clone() for name, each in tensors.items()}, folder / "expected.safetensors"
    )


def rotations(folder: Path) -> None:
    """What pyvene writes."""
    import pyvene as pv

    def made(
        name: str, prepare: Any, *each: dict[str, Any], call: Any = None, steps: int = 5
    ) -> None:
        torch.manual_seed(0)
        intervenable = pv.IntervenableModel(pv.IntervenableConfig(list(each)), model())
        for intervention in intervenable.interventions.values():

            def exchange(source: Any, target: Any, own: Any = intervention) -> Any:
                return own(target, source, **(call or {}))

            prepare(intervention)
            width = int(intervention.embed_dim)
            trained(intervention, exchange, width, steps)
            prepare(intervention)
        intervenable.save(str(folder / name))
        keep(folder / name, exchange, width)

    def nothing(_: Any) -> None:
        pass

    def of(kind: str, **more: Any) -> dict[str, Any]:
        where = {"layer": 1, "component": "block_output", "intervention_type": getattr(pv, kind)}
        return {**where, **more}

    low = of("LowRankRotatedSpaceIntervention", low_rank_dimension=2)
    made("low_rank", nothing, low)
    made("two", nothing, low, {**low, "layer": 0, "component": "mlp_output"})
    heads = {"component": "head_attention_value_output", "unit": "h.pos"}
    made("one_head", nothing, {**low, **heads})
    parts = [[0, 2], [2, 3], [4, 6, 7]]
    rotated = of("RotatedSpaceIntervention", subspace_partition=parts)
    # As pyvene calls it: the same groups for each prompt.
    made("partition", nothing, rotated, call={"subspaces": [[2]] * MANY})
    made(
        "rotated",
        lambda intervention: intervention.set_interchange_dim(3),
        of("RotatedSpaceIntervention"),
    )
    made("boundless", nothing, of("BoundlessRotatedSpaceIntervention"))
    from pyvene.models.interventions import SigmoidMaskRotatedSpaceIntervention

    masked = {**of("VanillaIntervention"), "intervention_type": SigmoidMaskRotatedSpaceIntervention}
    made("soft_mask", nothing, masked)

    def harden(intervention: Any) -> None:
        signs = [1.0, -1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0]
        intervention.masks.data = torch.tensor(signs)
        intervention.set_temperature(torch.tensor(0.01))

    made("hard_mask", harden, masked)
    made("autoencoder", nothing, of("AutoencoderIntervention", latent_dim=16), steps=0)


def projections(folder: Path, older: Path) -> None:
    """What the older nnpatch writes; of it one file is run, and what it imports is not needed."""
    for name in ("lightning", "datasets", "nnsight", "older", "older.api", "older.api.model_api"):
        sys.modules[name] = types.ModuleType(name)
    for name, attributes in {
        "lightning": ("LightningModule", "Trainer"), "datasets": ("Dataset",),
        "nnsight": ("NNsight",), "older.api.model_api": ("ModelAPI",),
    }.items():  # fmt: skip
        for attribute in attributes:
            setattr(sys.modules[name], attribute, object)
    path = older / "nnpatch" / "subspace" / "interventions.py"
    spec = importlib.util.spec_from_file_location("older.subspace.interventions", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kind: Any = module.LowRankOrthogonalProjection
    for name, arguments in {
        "rank1": (WIDTH, 1), "rank3": (WIDTH, 3), "square": (WIDTH, WIDTH),
        "plain": (WIDTH, 2, False),
    }.items():  # fmt: skip
        torch.manual_seed(0)
        projection = kind(*arguments)
        if name != "plain":
            trained(projection, projection)
        projection.save_pretrained(folder / name)
        (folder / name / "README.md").unlink(missing_ok=True)
        # Not after eval(): its projection is then the one before the last step.
        keep(folder / name, projection)
        if name == "rank3":
            sizes = {"embed_dim": torch.tensor(WIDTH), "rank": torch.tensor(3)}
            torch.save({**projection.state_dict(), **sizes}, folder / name / "projection.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--older", type=Path, required=True, help="a checkout")
    arguments = parser.parse_args()
    for name in ("pyvene", "older"):
        shutil.rmtree(arguments.folder / name, ignore_errors=True)
        (arguments.folder / name).mkdir(parents=True)
    rotations(arguments.folder / "pyvene")
    projections(arguments.folder / "older", arguments.older)


if __name__ == "__main__":
    main()
