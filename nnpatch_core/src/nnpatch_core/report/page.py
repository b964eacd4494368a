"""A study as a page: its sections in their order, laid out by the template."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import attrs
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from nnpatch_core._printable import printable
from nnpatch_core.errors import PatchingError
from nnpatch_core.report.advice import advice_on
from nnpatch_core.report.asked import Asked
from nnpatch_core.report.parts import (
    Advices,
    Code,
    Items,
    Links,
    Listing,
    Part,
    Picture,
    Section,
    Words,
)
from nnpatch_core.report.study import Drawing, Study
from nnpatch_core.report.svg import as_svg

#: What the entries of `info` are called, in their order; others come behind them.
_NAMES = {
    "model": "model",
    "revision": "revision",
    "model_type": "kind of model",
    "weights": "digest of the weights",
    "dtype": "numbers",
    "adapter": "adapter",
    "adapter_from": "adapter from",
    "engine": "engine",
    "fallback": "not the cone engine, because",
    "hooks": "hooks on the model",
    "groups": "groups",
    "pieces": "long prompts",
    "subspace": "limited to",
    "elided": "not run",
    "together": "several at once",
    "seed": "seed",
    "started": "started (UTC)",
    "seconds": "seconds",
    "resumed": "resumed",
    "memory": "memory",
    "environment": "machine",
}
_NO_ADVICE = "No rule has anything to say. That is no proof that all is well."


def page_of(study: Study, asked: Asked) -> str:
    """The whole page, as HTML."""
    title = study.title if asked.title is None else asked.title
    question = study.question if asked.question is None else asked.question
    sections = [each for each in _sections(study, asked) if each.parts]
    return _template().render(title=title, question=question, sections=sections)


def _sections(study: Study, asked: Asked) -> Iterator[Section]:
    yield Section("answer", "What was found", [Items(tuple(study.answer))] if study.answer else [])
    pictures: list[Part] = [*_pictures(study.drawings)]
    if asked.pages:
        pictures.append(Links(asked.pages))
    yield Section("pictures", "Pictures", pictures)
    yield Section("numbers", "The numbers", [*study.tables, *map(Words, study.bounds)])
    given = tuple(
        attrs.evolve(each, text=asked.spelled(each.text)) for each in advice_on(study.facts)
    )
    yield Section(
        "advice", "Before you trust it", [Advices(given)] if given else [Words(_NO_ADVICE)]
    )
    told = map(asked.spelled, study.prompts_in_words)
    yield Section("prompts", "The prompts", [*map(Words, told), *study.prompts])
    yield Section(
        "warnings", "Warnings on the way", _list(tuple(map(asked.spelled, asked.warnings)))
    )
    yield Section("run", "How it was run", [Listing(_told(study))])
    yield Section("again", "Run it again", [*_again(study, asked)])


def _list(texts: tuple[str, ...]) -> list[Part]:
    return [Items(texts)] if texts else []


def _pictures(drawings: Any) -> Iterator[Part]:
    reasons: dict[str, None] = {}
    for number, each in enumerate(drawings):
        try:
            yield Picture(_drawn(each, number), each.caption)
        except PatchingError as error:
            reasons[str(error)] = None
    for reason in reasons:
        yield Words(f"Pictures are missing here: {reason}.")


def _drawn(drawing: Drawing, number: int) -> Markup:
    return as_svg(drawing.draw(), f"p{number}-", printable(drawing.label))


def _told(study: Study) -> tuple[tuple[str, str], ...]:
    order = {name: number for number, name in enumerate(_NAMES)}
    names = sorted(study.info, key=lambda name: order.get(name, len(order)))
    return tuple((_NAMES.get(name, name), study.info[name]) for name in names if study.info[name])


def _again(study: Study, asked: Asked) -> Iterator[Part]:
    if asked.command is not None:
        yield Words("This command makes it anew:")
        yield Code(asked.command)
        return
    yield Words("No command was given. In Python it was a call such as:")
    yield Code(study.call)


@functools.cache
def _template() -> Template:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string(files(__package__).joinpath("page.html.j2").read_text("utf-8"))


def _finalize(value: Any) -> Any:
    """Every text that stands in the page, made safe to show; then it is escaped."""
    if isinstance(value, Markup):
        return value
    return printable(str(value), keep="\n\t")
