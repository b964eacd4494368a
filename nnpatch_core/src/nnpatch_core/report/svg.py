"""A matplotlib figure as a piece of a page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup, escape

#: Dots of an inch that heatmaps have, which stand in a picture as bitmaps.
_DOTS = 160
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
#: What no page needs: who wrote the file, and rules that would hold for the whole page.
_LEFT_OUT = ("metadata", "style", "title", "desc")
#: What those rules say, of one picture.
_OF_ALL = {"stroke-linejoin": "round", "stroke-linecap": "butt"}
#: In a comment matplotlib names the letters that it draws; none of them is needed.
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_NUMBER = re.compile(r"\d+\.\d{3,}")


def as_svg(figure: Any, prefix: str, label: str) -> Markup:
    """Draw a figure as SVG that can stand in a page, beside others.

    Letters are drawn as outlines, so that it looks the same without the fonts; the same figure
    gives the same bytes.

    Args:
        figure: of matplotlib.
        prefix: of all names in it, which must be unique in a page.
        label: what is seen in it, in words.
    """
    import matplotlib as mpl

    file = io.StringIO()
    options: Any = {"svg.hashsalt": "nnpatch", "svg.fonttype": "path", "svg.image_inline": True}
    with mpl.rc_context(options):
        figure.savefig(file, format="svg", dpi=_DOTS, metadata={"Date": None})
    text = file.getvalue()
    root = ElementTree.fromstring(_COMMENT.sub("", text[text.index("<svg") :]))
    wide = float(root.attrib["viewBox"].split()[2])
    kept = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label, **_OF_ALL}
    # Points, of which an inch has 72, as pixels, of which it has 96; a screen that is narrower than
    # 40 letters or so shows a part, to be scrolled.
    size = f"{wide * 4 / 3:.0f}px"
    kept["style"] = f"max-width: {size}; min-width: min({size}, 40rem)"
    root.attrib.clear()
    root.attrib.update(kept)
    # What is escaped here is in no name: letters and figures of matplotlib's own.
    return Markup("".join(_written(root, prefix)))


def _written(element: ElementTree.Element, prefix: str) -> Iterator[str]:
    name = element.tag.removeprefix(_SVG)
    if name in _LEFT_OUT:
        return
    yield f"<{name}"
    for key, value in element.attrib.items():
        yield f' {key.removeprefix(_LINK)}="{escape(_named(key, value, prefix))}"'
    children = [*element]
    if not children and not (element.text or "").strip():
        yield "/>"
        return
    yield ">"
    if element.text and element.text.strip():
        yield str(escape(element.text))
    for child in children:
        yield from _written(child, prefix)
    yield f"</{name}>"


def _named(key: str, value: str, prefix: str) -> str:
    """The value of an attribute, with names that are this picture's own, and short numbers."""
    if key == "id":
        return f"{prefix}{value}"
    if key.removeprefix(_LINK) == "href":
        return f"#{prefix}{value[1:]}" if value.startswith("#") else "".join(value.split())
    if "url(#" in value:
        value = value.replace("url(#", f"url(#{prefix}")
    if key in ("d", "x", "y"):
        # Points, of which a hundredth is seen by nobody; letters are drawn much larger than shown.
        value = _NUMBER.sub(lambda found: f"{float(found[0]):.2f}", " ".join(value.split()))
    return value
