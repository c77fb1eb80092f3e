"""The only place, with the sharding plan, that talks to torch.distributed.

The collectives are handed on; what shards parameters and reads sharded checkpoints is in ``shards``.
"""

from moa_lightning.distributed.collectives import (
    all_least,
    all_most,
    all_objects,
    all_rows,
    all_sum,
    any_rank,
    is_distributed,
    rank,
    together,
    world_size,
)

__all__ = [
    "all_least",
    "all_most",
    "all_objects",
    "all_rows",
    "all_sum",
    "any_rank",
    "is_distributed",
    "rank",
    "together",
    "world_size",
]
