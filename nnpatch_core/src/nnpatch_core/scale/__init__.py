"""Sweeps in several processes: shards that are measured apart, and merged."""

from nnpatch_core.scale.shards import Shard, measure_shard, merge_shards

__all__ = ["Shard", "measure_shard", "merge_shards"]
