"""Workers that can be looked at, and to whom things happen: by files of one folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch

from nnpatch_core.engine.cone import execution as cone
from nnpatch_core.interventions import pairs
from nnpatch_core.sweep import held
from nnpatch_core.sweep.ledger import Ledger
from nnpatch_core.testing import tiny_model


@attrs.frozen
class Scene:
    """What happens in workers.

    Args:
        folder: where they look, and write.
    """

    folder: Path

    def load(self) -> Any:
        """A tiny model, each trace of which is written down; runs in a worker.

        Of estimates the parts are, as they are made.
        """
        (self.folder / "loaded").open("a").write(f"{os.getpid()}\n")
        cone.ConeExecution._run = self._watched(cone.ConeExecution._run)
        Ledger.note = self._watched(Ledger.note)
        for module, name in ((held, "unpatched"), (pairs, "unpatched again")):
            self._watch(module, name)
        return tiny_model("llama")

    def _watched(self, real: Callable[..., Any]) -> Any:
        def watched(*arguments: Any, **options: Any) -> Any:
            self.happens()
            found = real(*arguments, **options)
            (self.folder / "traces").open("a").write(f"{os.getpid()}\n")
            return found

        return watched

    def _watch(self, module: Any, name: str) -> None:
        """Write down each time a module runs prompts unpatched."""
        real, scene = module.run_unpatched, self

        def watched(*arguments: Any) -> Any:
            scene.happens()
            (scene.folder / name).open("a").write(f"{os.getpid()}\n")
            return real(*arguments)

        module.run_unpatched = watched

    def happens(self) -> None:
        """What this very worker is to suffer."""
        slow = self.folder / "slow"
        if slow.exists():
            time.sleep(float(slow.read_text()))
        if self._is_mine("hang"):
            time.sleep(1000)
        # Always: of what does not fit together, half is tried.
        if self._is_mine("exhausted") or (self.folder / "no memory").exists():
            raise torch.OutOfMemoryError("no room")

    def order(self, what: str, words: str = "") -> None:
        """Let something happen: to the one worker that finds it first, or, as slow, to all."""
        (self.folder / what).write_text(words)

    def clear(self) -> None:
        """Let nothing happen, and forget what was."""
        for file in self.folder.iterdir():
            if file.name != "loaded":
                file.unlink()

    def pids(self, what: str = "traces") -> list[int]:
        """The processes that have run a trace, once for each; or that have loaded."""
        file = self.folder / what
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def _is_mine(self, what: str) -> bool:
        mine = self.folder / f"{what}.{os.getpid()}"
        if mine.exists():
            return True
        try:
            (self.folder / what).rename(mine)
        except OSError:
            return False
        return True
