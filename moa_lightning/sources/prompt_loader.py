"""The prompt loader: batches of prompts for evaluation, on several processes in step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from moa_lightning.distributed import rank, world_size
from moa_lightning.types import PromptBatch


class PromptLoader:
    """Batches of prompts in order, each process its share.

    All processes have the same number of batches, because a sharded policy is put together by all of them for each one:
    one whose rows are used up gets the first row again, marked as a stand-in, of which nothing counts.

    Args:
        rows: rows to go through, all processes' together.
        batch_size: prompts per batch.
        encode: from rows to a batch.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        batch_size: int,
        encode: Callable[[Sequence[dict[str, Any]]], PromptBatch],
    ) -> None:
        self.rows = [rows[i] for i in range(rank(), len(rows), world_size())]
        self.first = [rows[i] for i in range(min(len(rows), 1))]
        self.most = (len(rows) + world_size() - 1) // world_size()  # rows of the process that has most
        self.batch_size, self.encode = batch_size, encode

    def __len__(self) -> int:
        """Batches of every process."""
        return (self.most + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[PromptBatch]:
        """The batches; the last one may be smaller."""
        for start in range(0, self.most, self.batch_size):
            rows = self.rows[start : start + self.batch_size]
            yield self.encode(rows) if rows else replace(self.encode(self.first), stands_in=True)
