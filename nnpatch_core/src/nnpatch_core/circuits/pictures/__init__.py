"""A circuit as a graph: layers up, an edge as wide as its score is large.

`shown` chooses the edges and the words, `boxes` what stands in which row, `arrange` the places;
`drawing` puts lengths to it, which `static` draws by matplotlib and `page` as HTML.
"""

from nnpatch_core.circuits.pictures.draw import draw_page, draw_static

__all__ = ["draw_page", "draw_static"]
