"""Sphinx: `sphinx-build -W -b html docs docs/_build/html`."""

from importlib import metadata

project = "nnpatch"
author = project_copyright = "The nnpatch developers"
version = release = metadata.version("nnpatch-core")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "examples"]

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
html_css_files = ["wrap.css"]
html_copy_source = False
