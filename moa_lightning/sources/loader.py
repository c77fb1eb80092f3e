"""The experience loader: collects a batch, hands it out in minibatches, and can be resumed in between."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from moa_lightning.distributed import all_objects, rank, world_size
from moa_lightning.random_streams import random_state, restore_random_state
from moa_lightning.types import Experience, Minibatch, PromptBatch, Responses, RewardTable

Row = dict[str, Any]


class PromptLoader:
    """Batches of prompts in order, each process its share; for evaluation.

    Args:
        rows: rows to go through.
        batch_size: prompts per batch.
        encode: from rows to a batch.
    """

    def __init__(self, rows: Sequence[Row], batch_size: int, encode: Callable[[Sequence[Row]], PromptBatch]) -> None:
        self.rows = [rows[i] for i in range(rank(), len(rows), world_size())]
        self.batch_size, self.encode = batch_size, encode

    def __len__(self) -> int:
        """Batches of this process."""
        return (len(self.rows) + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[PromptBatch]:
        """The batches; the last one may be smaller."""
        for start in range(0, len(self.rows), self.batch_size):
            yield self.encode(self.rows[start : start + self.batch_size])


class ExperienceLoader:
    """Iterates over minibatches of collected experience; one iteration over it is one epoch over the prompts.

    It has a length, so Lightning does not fetch ahead and every rollout uses the policy of its moment. It has a
    state, so a run resumes between two minibatches of the same rollout. The order of prompts and of rows depends on
    the seed and the position alone.

    Args:
        rows: training rows.
        batch_size: prompts per collected batch on each process; the last incomplete batch of an epoch is left out.
        collect: from rows and a seed to experience.
        responses_per_prompt: rows of experience for each prompt.
        minibatches: minibatches in one pass over a collected batch.
        updates_per_batch: minibatches over all passes.
        seed: of order and sampling.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        collect: Callable[[list[Row], int], Experience],
        responses_per_prompt: int,
        minibatches: int,
        updates_per_batch: int,
        seed: int,
    ) -> None:
        self.rows, self.batch_size, self.collect = rows, batch_size, collect
        self.minibatches, self.updates_per_batch, self.seed = minibatches, updates_per_batch, seed
        self.responses_per_prompt = responses_per_prompt
        self.prompts_per_batch = batch_size * world_size()
        if len(rows) < self.prompts_per_batch:
            raise ValueError(
                f"{len(rows)} training prompts do not fill one batch of {batch_size} prompts on each of "
                f"{world_size()} processes; lower data.batch_size"
            )
        if batch_size * responses_per_prompt % minibatches:
            raise ValueError(
                f"source.num_mini_batches {minibatches} does not divide the {batch_size * responses_per_prompt} "
                "responses of a batch (data.batch_size x source.num_generations)"
            )
        self.epoch = 0
        self.position = 0  # minibatches handed out in this epoch
        self.used = 0  # prompts that this epoch's earlier batches took, over all processes
        self.experience: Experience | None = None  # the batch in flight
        self.random: dict[str, Any] | None = None  # random streams to go on with (dropout, rewards that draw)

    def __len__(self) -> int:
        """Minibatches in one epoch: those handed out, and those to come."""
        begun = self.position % self.updates_per_batch
        left = (len(self.rows) - self.used) // self.prompts_per_batch * self.updates_per_batch
        return self.position - begun + left

    def __iter__(self) -> Iterator[Minibatch]:
        """The rest of the present epoch; after it, the next iteration is the next epoch."""
        if self.position >= len(self):  # the last epoch ended without being asked for one more minibatch
            self.epoch, self.position, self.used, self.experience = self.epoch + 1, 0, 0, None
        if self.random is not None:
            restore_random_state(self.random)  # now, when nothing but the training draws from it any more
            self.random = None
        order = self._order()
        while self.position < len(self):
            batch, update = divmod(self.position, self.updates_per_batch)
            if update == 0 or self.experience is None:
                taken = order[self.used : self.used + self.prompts_per_batch]
                self.experience = self.collect([self.rows[i] for i in taken[rank() :: world_size()]], self._seed(batch))
            experience = self.experience
            picked = self._pick(experience, batch, update)
            # Before the yield: a checkpoint taken after this step must not repeat it.
            self.position += 1
            if update == self.updates_per_batch - 1:
                self.used += self.prompts_per_batch
            yield Minibatch(experience.select(picked), experience if update == 0 else None)

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed(-1))
        order: list[int] = torch.randperm(len(self.rows), generator=generator).tolist()
        return order

    def _pick(self, experience: Experience, batch: int, update: int) -> torch.Tensor:
        sweep, minibatch = divmod(update, self.minibatches)
        if self.minibatches == 1:
            return torch.arange(len(experience))
        generator = torch.Generator().manual_seed(self._seed(batch) + 1 + sweep)
        # The responses to one prompt stay together where that fills every minibatch equally: some combiners
        # compare them.
        together = self.responses_per_prompt if self.batch_size % self.minibatches == 0 else 1
        order = torch.randperm(len(experience) // together, generator=generator)
        rows = (order.unsqueeze(1) * together + torch.arange(together)).flatten()
        size = len(experience) // self.minibatches
        return rows[minibatch * size : (minibatch + 1) * size]

    def _seed(self, batch: int) -> int:
        # Far apart for neighbouring positions, so that no two batches share random numbers.
        return (self.seed * 1_000_003 + self.epoch * 10_007 + batch + 1) * 100_003 % (2**62)

    def state_dict(self) -> dict[str, Any]:
        """Position; of every process the batch in flight and the random streams. Plain containers and tensors."""
        between = self.position % self.updates_per_batch != 0
        return {
            "epoch": self.epoch,
            "position": self.position,
            "used": self.used,
            "experiences": all_objects(_to_plain(self.experience)) if between else None,
            "random": all_objects(random_state()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position; with another number of processes, from the next batch of prompts."""
        self.epoch, self.position, self.used = state["epoch"], state["position"], state["used"]
        saved, self.experience = state["experiences"], None
        if len(state["random"]) == world_size():
            self.random = state["random"][rank()]
        if saved is None:
            return
        if len(saved) == world_size():
            self.experience = _to_experience(saved[rank()])
            return
        update = self.position % self.updates_per_batch
        self.position += self.updates_per_batch - update
        self.used += len(saved) * len(saved[0]["mask_BT"]) // self.responses_per_prompt
        rank_zero_warn(
            f"the checkpoint was written by {len(saved)} processes and this run has {world_size()}: the batch in "
            f"flight ends after {update} of its {self.updates_per_batch} updates; the run goes on with the next prompts"
        )


def _to_plain(record: Any) -> Any:
    if is_dataclass(record):
        return {f.name: _to_plain(getattr(record, f.name)) for f in fields(record)}
    return record.cpu() if isinstance(record, torch.Tensor) else record


def _to_experience(plain: dict[str, Any]) -> Experience:
    return Experience(
        **{**plain, "responses": Responses(**plain["responses"]), "rewards": RewardTable(**plain["rewards"])}
    )
