"""Processes that wait for requests: one for each contestant, so that they take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contestants import APART, BOUND, CONTESTANTS

if TYPE_CHECKING:  # torch is not needed to start a process
    from subject import Subject

SCRIPT = Path(__file__).with_name("worker.py")


class Worker:
    """One contestant's process; a context manager that ends it.

    Args:
        name: the contestant.
        settings: the options of `worker.py`.
        apart: the Python for a contestant that lives in an environment of its own.
        environment: variables that are set for it.
        script: what runs in it.
    """

    def __init__(
        self,
        name: str,
        settings: Mapping[str, str],
        apart: Path | None = None,
        environment: Mapping[str, str] | None = None,
        script: Path = SCRIPT,
    ) -> None:
        self.name = name
        python = str(apart) if name in APART else sys.executable
        options = [part for key, value in settings.items() for part in (f"--{key}", value)]
        # Bars and warnings of libraries are of interest only when something fails.
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, str(script), name, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._said.close()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """What the contestant answers.

        Raises:
            RuntimeError: it failed, with what it said.
        """
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._said.seek(0)
            raise RuntimeError(f"{self.name} ended:\n{self._said.read()[-4000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name} failed:\n{answer['error']}")
        return answer


class Together:
    """All contestants in this one process, in an environment that has all of their libraries.

    On a GPU, where a large model has no room for a copy of it for each. There are three: nnpatch,
    TransformerLens and torch's own hooks each change modules of their model, and slow it down.

    Args:
        settings: the options of `worker.py`.
    """

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._settings = dict(settings)
        self._subjects: dict[str, Subject] = {}

    def worker(self, name: str) -> Resident:
        """One contestant, or the bound's, which leaves the model as it is."""
        import torch
        from subject import load
        from worker import Answers

        os.environ["HF_HUB_OFFLINE"] = "1"
        torch.set_grad_enabled(False)
        module = CONTESTANTS["hooks" if name == BOUND else name].module
        if module not in self._subjects:
            given = self._settings
            self._subjects[module] = load(given["model"], given["device"], given["dtype"])
        return Resident(Answers(name, self._subjects[module]))


class Resident:
    """A contestant of this process; asked as a `Worker` is."""

    def __init__(self, answers: Any) -> None:
        self._answers = answers

    def __enter__(self) -> Resident:
        return self

    def __exit__(self, *_: object) -> None:
        """There is nothing to end."""

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """What the contestant answers."""
        found: dict[str, Any] = getattr(self._answers, do)(**arguments)
        return found
