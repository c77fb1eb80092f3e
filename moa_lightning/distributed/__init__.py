"""The only package, besides the sharding plan, that imports torch.distributed.

It re-exports the collectives. Sharded parameters and sharded checkpoints are in ``shards``.
"""

from moa_lightning.distributed.collectives import (
    all_max,
    all_min,
    all_objects,
    all_rows,
    all_sum,
    any_rank,
    end_process_group,
    is_distributed,
    raise_on_all_ranks,
    rank,
    world_size,
)

__all__ = [
    "all_max",
    "all_min",
    "all_objects",
    "all_rows",
    "all_sum",
    "any_rank",
    "end_process_group",
    "is_distributed",
    "raise_on_all_ranks",
    "rank",
    "world_size",
]
