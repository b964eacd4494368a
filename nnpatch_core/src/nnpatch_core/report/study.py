"""A study: what any kind of outcome has to tell, before a page is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from nnpatch_core.report.facts import Facts
from nnpatch_core.report.parts import Table


@attrs.frozen(eq=False)
class Drawing:
    """A picture that is yet to be drawn.

    Args:
        caption: below it.
        label: what is seen in it, in words, for who cannot see it.
        draw: gives a matplotlib figure; raises `PatchingError` where it cannot.
    """

    caption: str
    label: str
    draw: Callable[[], Any]


@attrs.frozen(eq=False, kw_only=True)
class Study:
    """All that an outcome has to tell.

    Args:
        title: of the page.
        question: in a sentence.
        answer: sentences that say what was found.
        drawings: the pictures, in their order.
        tables: what was found, in numbers.
        bounds: sentences on what was not measured.
        prompts: tables of the prompts, their answers and their baselines.
        prompts_in_words: what is said of them.
        info: how it was run, by name.
        call: the call that makes it, as Python.
        facts: what advice goes by.
    """

    title: str
    question: str
    answer: Sequence[str]
    drawings: Sequence[Drawing] = ()
    tables: Sequence[Table] = ()
    bounds: Sequence[str] = ()
    prompts: Sequence[Table] = ()
    prompts_in_words: Sequence[str] = ()
    info: Mapping[str, str]
    call: str
    facts: Facts
