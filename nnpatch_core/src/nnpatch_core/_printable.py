"""Text of others, made safe to show: a terminal obeys the escape sequences that it is sent."""

from __future__ import annotations

from typing import Any

#: How much of a value an error shows.
_MOST = 160


def printable(text: str, keep: str = "") -> str:
    r"""The text with what is not printable escaped as Python does; `keep` has what may stay.

    Examples:
        >>> printable("\x1b[31mred")
        '\\x1b[31mred'
    """
    return "".join(
        letter if letter.isprintable() or letter in keep else _escaped(letter) for letter in text
    )


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def shown(value: Any) -> str:
    """Show any value in one line, by its representation, and only the beginning of a long one.

    Examples:
        >>> import torch
        >>> shown([1, 2]), shown(torch.zeros(2, 1))
        ('[1, 2]', 'tensor([[0.], [0.]])')
    """
    try:
        line = " ".join(repr(value).split())
    except Exception:  # an object may have a representation that fails
        line = f"an object of the type {type(value).__name__}"
    line = printable(line)
    return line if len(line) <= _MOST else f"{line[:_MOST]}…"


def named(name: Any) -> str:
    r"""Show a name or a path as it is; in quotes, if that could mislead.

    Examples:
        >>> named("clean prompt"), named("clean\n")
        ('clean prompt', "'clean\\n'")
    """
    text = str(name)
    return text if text.isprintable() and text.strip() == text != "" else repr(text)


def told_as_is(words: str) -> str:
    r"""Show words that a file may have as they are; in quotes, and cut, if that could mislead.

    Examples:
        >>> told_as_is("0.01"), told_as_is("0\n1")
        ('0.01', "'0\\n1'")
    """
    return words if words.isprintable() and len(words) <= _MOST else repr(words[:_MOST])
