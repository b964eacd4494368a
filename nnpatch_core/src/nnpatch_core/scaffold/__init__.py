"""Packages for adapters, written for their authors to go on from."""

from nnpatch_core.scaffold.package import Names, package_names, write_package
from nnpatch_core.scaffold.source import adapter_source

__all__ = ["Names", "adapter_source", "package_names", "write_package"]
