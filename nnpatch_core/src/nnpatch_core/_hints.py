"""Guesses the name that somebody has misspelled."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Say ` (did you mean Llama3?)` of names that are like this one, whatever their case.

    Examples:
        >>> did_you_mean("llama", ["Gemma2", "Llama3"])
        ' (did you mean Llama3?)'
        >>> did_you_mean("martian", ["Gemma2", "Llama3"])
        ''
    """
    lowered: dict[str, list[str]] = {}
    for registered in names:
        lowered.setdefault(registered.lower(), []).append(registered)
    like = get_close_matches(name.lower(), lowered) if isinstance(name, str) else []
    meant = [registered for match in like for registered in lowered[match]]
    return f" (did you mean {' or '.join(meant)}?)" if meant else ""
