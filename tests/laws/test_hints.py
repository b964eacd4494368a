"""A misspelled name is told what is like it, wherever names are looked up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nnpatch_core import Sites, activation_patching
from nnpatch_core._hints import did_you_mean
from nnpatch_core.adapters import find_component
from nnpatch_core.cli import main
from nnpatch_core.errors import UnknownNameError
from nnpatch_core.plugins import find_adapter, find_metric, find_seq_pos
from nnpatch_core.testing import tiny_api, tiny_model


def component(name: str) -> Any:
    return find_component(tiny_api(), name)


@pytest.mark.parametrize(
    ("find", "name", "meant"),
    [
        (find_adapter, "llama", "Llama3"),
        (find_adapter, "MISTRAL", "Mistral"),
        (find_metric, "logit_diff", "logit_difference"),
        (find_metric, "KL-Divergence", "kl_divergence"),
        (find_seq_pos, "Each", "each"),
        (find_seq_pos, "custom-constant", "custom_constant"),
        (component, "Q", "q"),
        (component, "residual", "resid"),
        (component, "resid_prex", "resid_pre"),
    ],
)
def test_name_that_is_like_another(find: Callable[..., Any], name: str, meant: str) -> None:
    with pytest.raises(UnknownNameError, match=rf"did you mean .*\b{meant}\b.*\?\); "):
        find(name)


@pytest.mark.parametrize("find", [find_adapter, find_metric, find_seq_pos, component])
@pytest.mark.parametrize("name", ["xyzxyz", ""])
def test_name_that_is_like_none(find: Callable[..., Any], name: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        find(name)
    assert "did you mean" not in str(caught.value)


def test_hint_for_what_is_no_name() -> None:
    assert did_you_mean(3, ["each"]) == ""
    assert did_you_mean("EACH", ["each", "Each"]) == " (did you mean each or Each?)"


def test_names_in_an_argument() -> None:
    runs = torch.tensor([[5, 6]]), torch.tensor([[5, 9]]), torch.tensor([1]), torch.tensor([2])
    with pytest.raises(UnknownNameError, match=r"'llama' \(did you mean Llama3\?\)"):
        activation_patching(tiny_model("llama"), "llama", Sites("resid"), *runs)


# The command line -------------------------------------------------------------------------------


def test_command_says_what_is_like_an_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "llama"]) == 2
    assert "unknown adapter 'llama' (did you mean Llama3?)" in capsys.readouterr().err


def test_module_is_the_command() -> None:
    command = [sys.executable, "-m", "nnpatch_core.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("nnpatch-core ")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_components_by_an_adapter_of_another_type(
    capsys: pytest.CaptureFixture[str], options: Any
) -> None:
    assert main(["components", "llama", "--adapter", "Mistral", *options]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nnpatch: warning: adapter 'Mistral' is for model_type mistral, but ")
    assert main(["components", "llama", *options]) == 0
    assert capsys.readouterr().err == ""
