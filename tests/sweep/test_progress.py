"""Bars: when they are shown, where, and how often."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr
from typing import Any

import numpy as np
import pytest
import torch
import tqdm.auto

from nnpatch_core import Sites, ablation_patching, activation_patching, attribution_patching
from nnpatch_core.sweep import progress
from nnpatch_core.sweep.progress import Progress
from nnpatch_core.testing import tiny_api, tiny_model

SOURCE, TARGET = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]])
ANSWERS = torch.tensor([1]), torch.tensor([2])
SWEEPS = {
    "activation": lambda **options: activation_patching(
        tiny_model(), tiny_api(), Sites("resid"), SOURCE, TARGET, *ANSWERS, **options
    ),
    "screen": lambda **options: activation_patching(
        tiny_model(),
        tiny_api(),
        Sites("resid"),
        SOURCE,
        TARGET,
        *ANSWERS,
        screen="attribution",
        top_k=1,
        **options,
    ),
    "ablation": lambda **options: ablation_patching(
        tiny_model(), tiny_api(), Sites("resid"), SOURCE, *ANSWERS, **options
    ),
    "attribution": lambda **options: attribution_patching(
        tiny_model(), tiny_api(), Sites("resid"), SOURCE, TARGET, *ANSWERS, **options
    ),
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def told(sweep: str, into: Any = None, **options: Any) -> str:
    into = io.StringIO() if into is None else into
    with redirect_stderr(into):
        SWEEPS[sweep](**options)
    return into.getvalue()


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("value", ["1", "True", "yes"])
def test_the_variable_hides_them(sweep: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", value)
    assert told(sweep) == ""
    assert told(sweep, progress=True) == ""


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("value", [None, "", "0", "false"])
def test_they_are_shown_by_default_and_hidden_on_demand(
    sweep: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv("TQDM_DISABLE", value)
    assert "100%" in told(sweep)
    assert told(sweep, progress=False) == ""


def test_they_are_those_that_fit_the_frontend() -> None:
    assert progress.tqdm is tqdm.auto.tqdm


@pytest.mark.parametrize(("stream", "seconds"), [(io.StringIO(), 1.0), (Terminal(), 0.1)])
def test_what_is_kept_is_told_less_often(
    stream: Any, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    nothing = np.zeros((512, 1), dtype=np.bool_)
    with redirect_stderr(stream), Progress(512, 1, shown=True) as bar:
        bar.begin(slice(0, 1), "cone", 512.0, nothing, nothing)
        before = stream.getvalue().count("\r")
        for _ in range(512):
            clock[0] += 1 / 128
            bar.advance(1, 1.0)
        between = stream.getvalue().count("\r") - before
    assert 0.9 * 4.0 / seconds <= between <= 4.0 / seconds
    assert "512/512 cells" in stream.getvalue(), "the end is told, however soon it comes"


def test_a_notebook_without_widgets_breaks_nothing() -> None:
    """There tqdm warns on import, which a user may have made an error."""
    script = (
        "import sys, types, warnings\n"
        "warnings.simplefilter('error')\n"
        "class ZMQInteractiveShell: pass\n"
        "shell = types.ModuleType('IPython')\n"
        "shell.get_ipython = ZMQInteractiveShell\n"
        "sys.modules['IPython'] = shell\n"
        "sys.modules['ipykernel.zmqshell'] = types.ModuleType('zmqshell')\n"
        "sys.modules['ipywidgets'] = None\n"
        "from nnpatch_core.sweep.progress import make_bar\n"
        "with make_bar(3, True) as bar: bar.update(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    assert "3/3" in done.stderr
