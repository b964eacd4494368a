"""Pieces of HTML for notebooks, in which every text is shown as it is."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_CELL = "text-align: left; white-space: pre; padding: 0 1em 0 0"


def block(*parts: str) -> str:
    """Pieces below each other; a token that is a dollar sign begins no formula in them."""
    return f'<div class="tex2jax_ignore mathjax_ignore">{"".join(parts)}</div>'


def heading(text: str) -> str:
    """A line in bold.

    Examples:
        >>> heading("a < b")
        '<p><b>a &lt; b</b></p>'
    """
    return f"<p><b>{html.escape(text)}</b></p>"


def paragraph(text: str) -> str:
    """A line of text.

    Examples:
        >>> paragraph("a < b")
        '<p>a &lt; b</p>'
    """
    return f"<p>{html.escape(text)}</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; without a head if there is none."""
    lines = [_row("th", head)] if head else []
    lines += [_row("td", row) for row in rows]
    return f"<table>{''.join(lines)}</table>"


def preformatted(text: str) -> str:
    """Text whose columns stand below each other."""
    return f"<pre>{html.escape(text)}</pre>"


def in_plotly(text: str) -> str:
    """As plotly shows it: it would read <s> as markup, and $x$ as a formula.

    Examples:
        >>> in_plotly("<s>"), in_plotly("$x$"), in_plotly("$5")
        ('&lt;s&gt;', '&#36;x&#36;', '$5')
    """
    written = html.escape(text)
    return written.replace("$", "&#36;") if text.count("$") > 1 else written


def in_template(text: str) -> str:
    """The same in a template of plotly's, which would put a number for a token such as %{y}.

    Examples:
        >>> in_template("%{y}"), in_template("5 %")
        ('&#37;{y}', '5 %')
    """
    return in_plotly(text).replace("%{", "&#37;{")


def _row(tag: str, cells: Sequence[object]) -> str:
    written = (f'<{tag} style="{_CELL}">{html.escape(str(cell))}</{tag}>' for cell in cells)
    return f"<tr>{''.join(written)}</tr>"
