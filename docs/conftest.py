"""Makes the python blocks of each README and of each page of docs run as tests, offline.

A page is one namespace, and runs in an empty folder. A block that begins with `>>>` is a doctest;
the numbers it shows are compared to the digits shown. A `csv` block is the file that the text
before it names last. SmolLM2 is asked for by its name on the model hub, as a reader would, and
comes from its PyPI package. The files and commands of some pages are left to `follow.py`.
"""

from __future__ import annotations

import doctest
import linecache
import os
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from sybil import Document, Example, Region, Sybil
from sybil.evaluators.doctest import NUMBER, DocTestEvaluator
from sybil.parsers.abstract import DocTestStringParser
from sybil.parsers.markdown import CodeBlockParser
from transformers import AutoModelForCausalLM, AutoTokenizer

DOCS = Path(__file__).resolve().parent
SHOWN = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | NUMBER

sys.path.insert(0, str(DOCS / "examples"))

import follow  # noqa: E402
import smollm2  # noqa: E402


def evaluate(example: Example) -> None:
    """Run a block under a file name of its own, where nnsight finds the source of a trace."""
    name = f"<{Path(example.path).name}:{example.line}>"
    source = str(example.parsed)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec", dont_inherit=True), example.namespace)


def write(example: Example) -> None:
    """Write a table into the folder of the page."""
    named = follow.TABLE.findall(example.document.text[: example.region.start])
    Path(named[-1]).write_text(str(example.parsed), encoding="utf-8")


def redirect(loader: Any, place: int) -> Any:
    """`loader.from_pretrained`, which gives what `smollm2.load` gives for SmolLM2's name."""
    original = loader.from_pretrained

    def from_pretrained(name: Any, **options: Any) -> Any:
        if name != follow.SMOLLM2:
            return original(name, **options)
        # What `smollm2.load` does; a page that asks for more would not run as it is printed.
        expected = {"dtype": torch.float32} if loader is AutoModelForCausalLM else {}
        assert options == expected, f"docs/conftest.py does not know {options}"
        return smollm2.load()[place]

    return mock.patch.object(loader, "from_pretrained", from_pretrained)


class Page:
    """What surrounds the blocks of one page."""

    def __init__(self) -> None:
        self.stack = ExitStack()

    def setup(self, namespace: dict[str, Any]) -> None:
        """An empty folder, and models without a network."""
        namespace["__name__"] = "__main__"
        self.stack.enter_context(redirect(AutoModelForCausalLM, 0))
        self.stack.enter_context(redirect(AutoTokenizer, 1))
        folder = self.stack.enter_context(tempfile.TemporaryDirectory())
        self.stack.callback(os.chdir, Path.cwd())
        os.chdir(folder)

    def teardown(self, namespace: dict[str, Any]) -> None:
        """Put everything back, and let go of the models."""
        self.stack.close()
        namespace.clear()


def python_blocks(document: Document) -> Iterable[Region]:
    """The python blocks of a page, those that begin with `>>>` as doctests."""
    doctests = DocTestStringParser(DocTestEvaluator(SHOWN))
    followed = Path(document.path).name in follow.PAGES
    yield from CodeBlockParser("csv", write)(document)
    for block in CodeBlockParser("python", evaluate)(document):
        if followed and follow.is_file(block.parsed):
            continue
        if not block.parsed.startswith(">>>"):
            yield block
            continue
        for line in doctests(block.parsed, document.path):
            line.adjust(block, block.parsed)
            yield line


class Collector:
    """A plugin rather than a hook of this file, which would not reach a README above it."""

    def __init__(self, collect: Any) -> None:
        self.pytest_collect_file = collect


def pytest_configure(config: pytest.Config) -> None:
    """Collect README.md, those of the distributions, and the pages of this folder."""
    page = Page()
    sybil = Sybil(
        path=str(DOCS.parent),
        parsers=[python_blocks],
        patterns=["README.md", "nnpatch_*/README.md", "docs/*.md", "docs/how-to/*.md"],
        document_types={".md": Document},
        setup=page.setup,
        teardown=page.teardown,
    )
    config.pluginmanager.register(Collector(sybil.pytest()), "blocks")
