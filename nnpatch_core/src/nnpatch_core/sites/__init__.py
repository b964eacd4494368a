"""The sites of a sweep: grids of them, the user's own, and both found in a model."""

from nnpatch_core.sites.arguments import make_strategy, strategy_of
from nnpatch_core.sites.bound import bind_cells, bind_grids
from nnpatch_core.sites.grid import Axis, Grid, GridSites
from nnpatch_core.sites.listed import SiteList, Together
from nnpatch_core.sites.sites import Sites
from nnpatch_core.sites.sweep_sites import SweepSites

__all__ = [
    "Axis",
    "Grid",
    "GridSites",
    "SiteList",
    "Sites",
    "SweepSites",
    "Together",
    "bind_cells",
    "bind_grids",
    "make_strategy",
    "strategy_of",
]
