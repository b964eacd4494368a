"""Runs the notebooks of this folder, offline, as their readers would: from top to bottom.

`python docs/notebooks.py` stores what their cells show, without the bars and warnings of a
terminal.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import nbclient
import nbformat

DOCS = Path(__file__).resolve().parent
NOTEBOOKS = ("tutorial.ipynb",)

sys.path.insert(0, str(DOCS / "examples"))

import follow  # noqa: E402
import smollm2  # noqa: E402

#: A number, as Python and tables print it.
_NUMBER = re.compile(r"[-+]?\d+\.\d+(?:e[-+]?\d+)?")


def read(name: str) -> Any:
    """A notebook as it is stored."""
    return nbformat.read(DOCS / name, as_version=4)


def run(notebook: Any, folder: Path) -> Any:
    """The same notebook, run in an empty folder; a cell that fails is an error."""
    smollm2.load()
    follow.place(smollm2.default_cache(), folder)
    client = nbclient.NotebookClient(
        nbformat.from_dict(notebook),
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    # No network, and one thread; matplotlib draws as in any notebook.
    with mock.patch.dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"):
        os.environ.pop("MPLBACKEND", None)
        return client.execute()


def shown(cell: Any) -> dict[str, str]:
    """What a cell shows, by kind; what it prints is `print`."""
    found: dict[str, str] = {}
    for output in cell.get("outputs", ()):
        if output.output_type == "stream" and output.name == "stdout":
            found["print"] = found.get("print", "") + output.text
        elif output.output_type in ("display_data", "execute_result"):
            found |= output.data
    return found


def same(one: str, other: str, tolerance: float = 2e-3) -> bool:
    """Whether two texts are the same but for the last digits of their numbers."""
    if [each.split() for each in _NUMBER.split(one)] != [
        each.split() for each in _NUMBER.split(other)
    ]:
        return False
    numbers = zip(_NUMBER.findall(one), _NUMBER.findall(other), strict=True)
    return all(abs(float(a) - float(b)) <= tolerance * max(1, abs(float(b))) for a, b in numbers)


def stored(notebook: Any) -> Any:
    """The notebook as it is kept: no bars, no warnings of a terminal, no marks of a machine."""
    for cell in notebook.cells:
        cell.metadata = {}
        cell.outputs = [
            output
            for output in cell.get("outputs", ())
            if not (output.output_type == "stream" and output.name == "stderr")
        ]
        if cell.cell_type != "code":
            del cell["outputs"]
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    return notebook


def main() -> None:
    """Run all, and store what they show."""
    for name in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            done = stored(run(read(name), Path(folder)))
        nbformat.validate(done)
        nbformat.write(done, DOCS / name)


if __name__ == "__main__":
    main()
