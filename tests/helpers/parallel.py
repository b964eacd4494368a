"""A model over two processes, each a process of its own: `python -m tests.helpers.parallel ...`.

It prints, as JSON, what each call gave with the model parted in each way.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nnpatch_core import (
    Add,
    Site,
    Sites,
    activation_patching,
    attribution_patching,
    edge_patching,
    plan_sweep,
    steer,
)
from nnpatch_core.errors import PatchingError
from nnpatch_core.testing import tiny_model
from nnpatch_llama import Llama3

SOURCE = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 1, 2, 3, 4]])
TARGET = torch.tensor([[5, 16, 7, 18, 9, 10], [0, 0, 1, 12, 3, 4]])
MASK = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
RUNS = SOURCE, TARGET, torch.tensor([20, 21]), torch.tensor([30, 31])
QUIET: dict[str, Any] = {"attention_mask": MASK, "progress": False}
COMPONENTS = ["resid", "q", "k", "v", "o", "attn", "mlp"]
SITES = Sites(COMPONENTS, seq_pos_type="each")
#: Where each cell is a whole forward: a position is an index there, and two will do.
TWO = Sites(COMPONENTS, seq_pos_type="custom", seq_pos=[-1, -3])
WAYS = ("tensor-parallel", "fully sharded")


def steered(model: Any) -> Any:
    with steer(model, Site.get_site(Llama3, "o", 1, 2), Add(torch.full([8], 0.3))):
        return {"logits": model(TARGET, attention_mask=MASK).logits}


CALLS: dict[str, Callable[[Any], Any]] = {
    "cone": lambda it: activation_patching(it, None, SITES, *RUNS, **QUIET, engine="cone"),
    "full": lambda it: activation_patching(it, None, TWO, *RUNS, **QUIET, engine="full"),
    "attribution": lambda it: attribution_patching(it, None, SITES, *RUNS, **QUIET),
    "edges": lambda it: edge_patching(it, None, *RUNS, **QUIET, senders=["m1"]).outcome,
    "plan": lambda it: plan_sweep(it, None, SITES, SOURCE, TARGET, attention_mask=MASK) and {},
    "steer": steered,
}


def parted(how: str, folder: str) -> Any:
    """The model, of which each process has a part."""
    from transformers import AutoModelForCausalLM

    if how == "tensor-parallel":
        from transformers.distributed import DistributedConfig

        config: Any = DistributedConfig(tp_size=2)
        return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).eval()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = tiny_model("llama")
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def told(model: Any, call: Callable[[Any], Any]) -> Any:
    """The largest gap to the whole model, or the error."""
    try:
        with torch.no_grad():
            found = call(model)
    except PatchingError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except Exception as error:
        return {"error": f"not ours: {type(error).__name__}", "message": str(error)}
    with torch.no_grad():
        wanted = call(tiny_model("llama"))
    gaps = [float((found[name] - wanted[name]).abs().max()) for name in wanted]
    return {"gap": max(gaps, default=0.0)}


def of_way(how: str, folder: str) -> dict[str, Any]:
    """What each call gives, and how far the model is from the whole one before and after."""
    model = parted(how, folder)
    whole = tiny_model("llama")(TARGET, attention_mask=MASK).logits

    def gap() -> float:
        with torch.no_grad():
            found = model(TARGET, attention_mask=MASK).logits
        return float((found - whole)[MASK.bool()].abs().max())

    found: dict[str, Any] = {"before": gap()}
    found |= {name: told(model, call) for name, call in CALLS.items()}
    found["after"] = gap()
    return found


def main(folder: str) -> None:
    """Run as one of two processes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = {how: of_way(how, folder) for how in WAYS}
    torch.distributed.destroy_process_group()
    sys.stdout.write(json.dumps(found) + "\n")


def run_parted(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes prints."""
    tiny_model("llama").save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.parallel", str(folder)],
            env={
                **os.environ,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "WORLD_SIZE": "2",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [process.communicate(timeout=300) for process in started]
    for process, (_, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in ended]


if __name__ == "__main__":
    main(*sys.argv[1:])
