"""Sphinx: `sphinx-build -W -b html docs docs/_build/html`.

With `NNPATCH_DOCS_VERSION` set, to `dev` or to a release, pages look for the other versions that
are published beside them; `.github/workflows/site.yml` sets it.
"""

import os
from importlib import metadata
from typing import Any

from pygments.lexers.special import TextLexer

project = "nnpatch"
author = project_copyright = "The nnpatch developers"
version = release = metadata.version("nnpatch-core")

# myst_nb reads Markdown by myst_parser, and notebooks.
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "examples"]

# Notebooks are shown as they are stored; test_tutorial.py runs them.
nb_execution_mode = "off"
# No page loads anything from elsewhere.
nb_ipywidgets_js: dict[str, Any] = {}

# In docstrings a name in single backticks is code, and a link where there is something to link to.
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_type_aliases = {name: name for name in ("MetricSpec", "Scale")}
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
myst_heading_anchors = 3

html_theme = "furo"
html_title = "nnpatch"
html_static_path = ["_static"]
templates_path = ["_templates"]
html_css_files = ["wrap.css", "site.css"]
html_favicon = "_static/favicon.svg"
html_copy_source = False
published = os.environ.get("NNPATCH_DOCS_VERSION", "")
html_context = {"published": published}
html_js_files = ["versions.js"] if published else []
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "versions.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
html_theme_options = {
    "source_repository": "https://github.com/nnpatch/nnpatch/",
    "source_branch": "main",
    "source_directory": "docs/",
}


def setup(app: Any) -> None:
    """Pygments knows no tables of commas."""
    app.add_lexer("csv", TextLexer)
