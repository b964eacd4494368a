"""The files of subspaces: our own, an older library's, and pyvene's."""

from nnpatch_core.spaces.files.content import Content
from nnpatch_core.spaces.files.hub import push
from nnpatch_core.spaces.files.own import save
from nnpatch_core.spaces.files.reading import read

__all__ = ["Content", "push", "read", "save"]
