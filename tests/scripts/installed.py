"""Run by the `build` session from installed wheels: discovery, and a small sweep."""

import importlib
import sys

import torch

import nnpatch_core
from nnpatch_core import Sites, activation_patching
from nnpatch_core.plugins import load_plugins
from nnpatch_core.testing import tiny_model

#: The older library's modules of adapters, and the distribution that each takes its adapter from.
OLDER = {
    "llama": ("Llama3", "nnpatch-llama"),
    "mistral": ("Mistral", "nnpatch-mistral"),
    "gemma": ("Gemma2", "nnpatch-gemma"),
}


def check_older(expected: list[str]) -> None:
    """Its names are there, and an adapter where its plugin is."""
    importlib.import_module("nnpatch")
    for module, (name, distribution) in OLDER.items():
        try:
            found = hasattr(importlib.import_module(f"nnpatch.api.{module}"), name)
        except ImportError as error:
            found = f"pip install {distribution}" not in str(error)
        if found != (name in expected):
            raise SystemExit(f"nnpatch.api.{module} does not fit {expected}")


def main(expected: list[str]) -> None:
    location = nnpatch_core.__file__
    if "site-packages" not in location:
        raise SystemExit(f"nnpatch_core was imported from {location}, not from a wheel")
    registry = load_plugins()
    types = {adapter.name: adapter.value.model_types for adapter in registry.adapters}
    found = sorted(types)
    if found != sorted(expected) or registry.failures:
        raise SystemExit(f"expected {expected}, found {found}, failures {registry.failures}")
    check_older(expected)
    source, target = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 9, 7, 8]])
    for name in expected:
        out = activation_patching(
            tiny_model(types[name][0]),
            None,
            Sites(["resid", "q"], seq_pos_type="each"),
            source,
            target,
            torch.tensor([1]),
            torch.tensor([2]),
            progress=False,
        )
        restored = abs(out["resid"][-1, -1].item() - 1) < 1e-4
        if (out.info["adapter"], out.info["engine"]) != (name, "cone") or not restored:
            raise SystemExit(f"{name}: {out.info}, {out['resid']}")
        sys.stdout.write(f"{name}: {out}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
