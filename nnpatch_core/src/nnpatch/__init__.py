"""The names of the older library nnpatch, and its defaults, on top of nnpatch_core.

Code that was written for it runs as it stands. New code imports `nnpatch_core`, which has more.
"""

from nnpatch._patching import activation_patching, attribution_patching
from nnpatch._sites import Sites
from nnpatch_core import MultiSite, Site

__all__ = ["MultiSite", "Site", "Sites", "activation_patching", "attribution_patching"]
