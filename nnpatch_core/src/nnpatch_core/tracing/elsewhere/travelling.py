"""Functions that travel: made anew from the text of `body.py`, so that they go by their text.

A function of an installed module would go by its name, and where the model is there is no nnpatch.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import linecache
from collections.abc import Callable
from typing import Any

from nnpatch_core.errors import RemoteError
from nnpatch_core.tracing.elsewhere import body


@functools.cache
def travelling(function: str) -> Callable[..., Any]:
    """A function of `body.py` that travels.

    Args:
        function: its name.

    Raises:
        RemoteError: nnpatch is installed without its sources.
    """
    try:
        source = inspect.getsource(body)
    except OSError as error:
        raise RemoteError(
            "a trace goes elsewhere as text, and nnpatch's own is not at hand: install it "
            "as pip does, in a folder, with its sources"
        ) from error
    # nnsight writes a block anew as it goes: so here, too, that both have the same lines.
    text = ast.unparse(_Plain().visit(ast.parse(source))) + "\n"
    digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    # For each block and each of its versions a name of its own: nnsight keeps what it has read
    # under a name, also where it runs, from one request to the next.
    name = f"<nnpatch {function} {digest}>"
    # Without a time it is never held to be out of date.
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    # No module has this name, so that what is defined here goes by its text.
    space: dict[str, Any] = {"__name__": f"nnpatch_elsewhere_{digest}"}
    exec(compile(text, name, "exec"), space)
    found: Callable[..., Any] = space[function]
    return found


class _Plain(ast.NodeTransformer):
    """Takes types and docstrings away, which would go along, with all that they name."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        if ast.get_docstring(node) is not None:
            del node.body[0]
        self.generic_visit(node)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node
