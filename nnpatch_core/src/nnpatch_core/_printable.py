"""Text of others, made safe to show: a terminal obeys the escape sequences that it is sent."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    r"""The text with what is not printable escaped as Python does; `keep` has what may stay.

    Examples:
        >>> printable("\x1b[31mred")
        '\\x1b[31mred'
    """
    return "".join(
        each if each.isprintable() or each in keep else each.encode("unicode_escape").decode()
        for each in text
    )
