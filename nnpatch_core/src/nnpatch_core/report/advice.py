"""Advice: what the rules say of some facts."""

from __future__ import annotations

import attrs

from nnpatch_core.report.facts import Facts
from nnpatch_core.report.rules import RULES


@attrs.frozen
class Advice:
    """Something to know, or to do, before a study is trusted.

    Args:
        rule: the name of the rule that gives it.
        text: one sentence.
        source: the paper that it comes from.
        link: where that can be read.
    """

    rule: str
    text: str
    source: str
    link: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.text} ({self.source}, {self.link})"


def advice_on(facts: Facts) -> list[Advice]:
    """The advice of all rules on some facts."""
    found = [(rule, rule.check(facts)) for rule in RULES]
    return [
        Advice(rule.name, text, str(rule.source), rule.source.link)
        for rule, text in found
        if text is not None
    ]
