"""Paths: what senders write, as receivers read it, with or without what stands between."""

from nnpatch_core.paths.named import Named, Reader, sites_of
from nnpatch_core.paths.put import PathPut, Through
from nnpatch_core.paths.sites import PATH, PathSites

__all__ = ["PATH", "Named", "PathPut", "PathSites", "Reader", "Through", "sites_of"]
