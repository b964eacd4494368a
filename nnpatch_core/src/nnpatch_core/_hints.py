"""What somebody who has misspelled a name may have meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """` (did you mean Llama3?)`, for names that are alike but for case; "" if none is.

    Examples:
        >>> did_you_mean("llama", ["Gemma2", "Llama3"])
        ' (did you mean Llama3?)'
        >>> did_you_mean("martian", ["Gemma2", "Llama3"])
        ''
    """
    lowered: dict[str, list[str]] = {}
    for each in known:
        lowered.setdefault(each.lower(), []).append(each)
    like = get_close_matches(name.lower(), lowered) if isinstance(name, str) else []
    names = [each for match in like for each in lowered[match]]
    return f" (did you mean {' or '.join(names)}?)" if names else ""
