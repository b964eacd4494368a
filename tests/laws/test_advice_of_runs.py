"""Advice that a run by command gives can be followed by command: its options are there."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import nnpatch_core
from nnpatch_core import Outcome, PromptPairs
from nnpatch_core.report import RULES, Facts
from nnpatch_core.report.advice import advice_on
from nnpatch_core.run import in_options, options
from nnpatch_core.run.command import PHRASES
from tests.laws.test_advice import PACKAGE, SOURCE
from tests.report.test_rules import CASES

OPTIONS = {name for name, *_ in options()}
ARGUMENTS = {
    name
    for call in (
        *(getattr(nnpatch_core, each) for each in nnpatch_core.__all__ if each.islower()),
        PromptPairs.from_texts,
        Outcome.report,
    )
    if callable(call)
    for name in inspect.signature(call).parameters
}
#: Rules that say nothing of what a command makes: the circuit that it finds has its controls.
NEVER = {"no-controls"}


def advised(name: str) -> str:
    """The advice of a rule, where its facts break it; a circuit's own is of another rule."""
    found = advice_on(Facts(**CASES[name][0]))
    return next(each.text for each in found if each.rule == name)


@pytest.mark.parametrize("name", [rule.name for rule in RULES])
def test_arguments_of_advice_are_there(name: str) -> None:
    text = advised(name)
    for argument in re.findall(r"\b([a-z_]+)=", text):
        assert argument in ARGUMENTS, text
    if name in NEVER:
        return
    said = in_options(text)
    assert not re.search(r"\b[a-z_]+=|\w\(|pairs\.", said), said
    for option in re.findall(r"--([a-z-]+)", said):
        assert option.replace("-", "_") in OPTIONS, said


def test_phrases_are_those_of_messages() -> None:
    every = "\n".join(text.value for text in SOURCE)
    joined = re.sub(r"\s+", " ", every)
    assert [phrase for phrase in PHRASES if phrase not in joined] == []
    for instead in PHRASES.values():
        for option in re.findall(r"--([a-z-]+)", instead):
            assert option.replace("-", "_") in OPTIONS


#: Warnings of these rooms may come of any run; their arguments are options, but for some.
ROOMS = ("prompts", "sweep", "engine", "gradients", "memory", "metrics", "seq_pos")
#: Arguments that no command gives, so that nothing is said of them.
PYTHON = {"orient", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"}
PYTHON |= {"extra", "mapping"}


def test_warnings_of_a_run_name_options() -> None:
    looked = 0
    for text in SOURCE:
        if text.file.relative_to(PACKAGE).parts[0] not in ROOMS or not text.message:
            continue
        for argument in re.findall(
            r"\b([a-z_]+)=(?=[\s,:;.)']|True|False|$)", in_options(text.value)
        ):
            looked += 1
            assert argument in PYTHON or argument not in ARGUMENTS, text
    assert looked > 3


def test_in_options() -> None:
    """What is no argument of a call stays."""
    same: list[Any] = ["p=0.05", "a = b", "x='y z'", "<a href='x'>", "model=x"]
    assert [in_options(each) for each in same] == same
