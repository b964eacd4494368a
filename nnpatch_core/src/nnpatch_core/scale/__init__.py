"""Sweeps in several processes: shards that are measured apart, and merged."""

from nnpatch_core.scale.ray import RayWorkers
from nnpatch_core.scale.shards import Shard, measure_shard, merge_shards

__all__ = ["RayWorkers", "Shard", "measure_shard", "merge_shards"]
