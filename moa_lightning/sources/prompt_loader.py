"""The prompt loader: batches of prompts for evaluation, equally many on every process."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from moa_lightning.distributed import rank, world_size
from moa_lightning.types import PromptBatch


class PromptLoader:
    """Iterates over batches of prompts in order; each process gets its share.

    All processes have the same number of batches, because all take part when a sharded policy is all-gathered for a
    batch. A process that has run out of rows gets a placeholder batch with the first row, which does not count.

    Args:
        rows: rows of all processes.
        batch_size: prompts per batch.
        encode: collates rows into a batch.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        batch_size: int,
        encode: Callable[[Sequence[dict[str, Any]]], PromptBatch],
    ) -> None:
        self.rows = [rows[i] for i in range(rank(), len(rows), world_size())]
        self.first = [rows[i] for i in range(min(len(rows), 1))]
        self.most = (len(rows) + world_size() - 1) // world_size()  # rows of the process that has the most
        self.batch_size, self.encode = batch_size, encode

    def __len__(self) -> int:
        """Batches on each process."""
        return (self.most + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[PromptBatch]:
        """Yield the batches; the last one may be smaller."""
        for start in range(0, self.most, self.batch_size):
            rows = self.rows[start : start + self.batch_size]
            yield self.encode(rows) if rows else replace(self.encode(self.first), is_placeholder=True)
