"""A model that is served by another process, which has no nnpatch; see `ndif_server.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
from nnsight import TransformersModel
from nnsight.modeling import huggingface
from transformers import AutoConfig, AutoModelForCausalLM

from nnpatch_core.testing import tiny_model, tiny_tokenizer
from tests.helpers.paths import ROOT

TOKENIZER = tiny_tokenizer(["a b c d e f g"])


@attrs.define
class Served:
    """A model with weights, in this process and in another one.

    Args:
        model: the model itself.
        folder: where its weights are, for the other process alone.
        process: that one.
        url: its address.
        log: what it writes of requests.
    """

    model: Any
    folder: Path
    process: subprocess.Popen[str]
    url: str
    log: Path

    @classmethod
    def start(cls, folder: Path, family: str = "llama", *key: str, **settings: Any) -> Served:
        tiny_model(family, **settings).save_pretrained(folder / "weights")
        # Read as the server reads it: where weights lie in memory decides on last digits.
        model = AutoModelForCausalLM.from_pretrained(folder / "weights").eval()
        TOKENIZER.save_pretrained(folder / "weights")
        # What the client may know of it.
        model.config.save_pretrained(folder / "config")
        log = folder / "log"
        log.touch()
        script = ROOT / "tests" / "helpers" / "ndif_server.py"
        environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        process = subprocess.Popen(
            [sys.executable, str(script), str(folder / "weights"), str(log), *key],
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port.isdigit(), "the server does not start"
        return cls(model, folder, process, f"http://127.0.0.1:{port}", log)

    def stop(self) -> None:
        self.process.kill()
        # It waits for its end, and closes what it said.
        self.process.communicate()

    def here(self) -> Any:
        """The model in this process, as nnsight wraps one with weights."""
        return TransformersModel(self.model, tokenizer=TOKENIZER)

    def there(self, **config: Any) -> Any:
        """The same as a client has it that has no weights, and can load none."""
        folder = str(self.folder / "config")
        # Which the hub would be asked for.
        huggingface._ID_CACHE[folder] = folder
        options = {"config": AutoConfig.from_pretrained(folder, **config)} if config else {}
        return TransformersModel(folder, task="text-generation", tokenizer=TOKENIZER, **options)

    @property
    def requests(self) -> list[dict[str, Any]]:
        """What the other process says of each request so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]
