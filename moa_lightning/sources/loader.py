"""The experience loader: collects a batch, yields it in minibatches, and can be resumed in between."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from moa_lightning.distributed import all_objects, rank, world_size
from moa_lightning.errors import UserError
from moa_lightning.sources.in_flight import InFlight, redistribute
from moa_lightning.types import Experience, Minibatch
from moa_lightning.utils.random_state import random_state, restore_random_state

Row = dict[str, Any]


class ExperienceLoader:
    """Iterates over minibatches of collected experience; one iteration is one epoch over the prompts.

    It has a length, so Lightning does not prefetch, and every rollout uses the current policy. It has a state, so a run
    can resume between two minibatches of the same rollout. The order of prompts and of rows depends only on the seed
    and the position.

    Args:
        rows: training rows.
        batch_size: prompts per collected batch on each process; the last incomplete batch of an epoch is dropped.
        collect: collects experience on rows, with a seed.
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
            raise UserError(
                f"{len(rows)} training prompts do not fill one batch of {batch_size} prompts on each of "
                f"{world_size()} processes; lower data.batch_size"
            )
        if batch_size * responses_per_prompt % minibatches:
            raise UserError(
                f"source.num_mini_batches {minibatches} does not divide the {batch_size * responses_per_prompt} "
                "responses of a batch (data.batch_size x source.num_generations)"
            )
        self.epoch = 0
        self.position = 0  # minibatches yielded in this epoch
        self.used = 0  # prompts of this epoch that experience was collected on, over all processes
        self.in_flight: InFlight | None = None
        self.random: dict[str, Any] | None = None  # random state to resume with (dropout, rewards that sample)

    def __len__(self) -> int:
        """Minibatches in this epoch: those already yielded, and those to come."""
        of_this_batch = -self.position % self.updates_per_batch
        left = (len(self.rows) - self.used) // self.prompts_per_batch * self.updates_per_batch
        return self.position + of_this_batch + left

    def __iter__(self) -> Iterator[Minibatch]:
        """Yield the rest of the current epoch; the next iteration is the next epoch."""
        if self.position >= len(self):  # Lightning stopped at the last minibatch, before the loop below ended
            self.epoch, self.position, self.used = self.epoch + 1, 0, 0
        if self.random is not None:
            restore_random_state(self.random)  # as late as possible: from here on only the training uses it
            self.random = None
        order = self._order()
        while self.position < len(self):
            batch, update = divmod(self.position, self.updates_per_batch)
            collected = None
            if update == 0 or self.in_flight is None:
                taken = order[self.used : self.used + self.prompts_per_batch]
                collected = self.collect([self.rows[i] for i in taken[rank() :: world_size()]], self._seed(batch))
                picked = [self._pick(collected, batch, later) for later in range(update, self.updates_per_batch)]
                self.in_flight = InFlight(collected, picked, [1.0] * len(picked))
                self.used += self.prompts_per_batch
            minibatch = self.in_flight.take()
            # Before the yield: a checkpoint taken after this step must not repeat it.
            self.position += 1
            yield Minibatch(minibatch, collected)

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed(-1))
        order: list[int] = torch.randperm(len(self.rows), generator=generator).tolist()
        return order

    def _pick(self, experience: Experience, batch: int, update: int) -> torch.Tensor:
        sweep, minibatch = divmod(update, self.minibatches)
        if self.minibatches == 1:
            return torch.arange(len(experience))
        generator = torch.Generator().manual_seed(self._seed(batch) + 1 + sweep)
        # Some combiners compare the responses to a prompt, so these share a minibatch where that keeps the minibatches
        # equally large.
        group = self.responses_per_prompt if self.batch_size % self.minibatches == 0 else 1
        order = torch.randperm(len(experience) // group, generator=generator)
        rows = (order.unsqueeze(1) * group + torch.arange(group)).flatten()
        size = len(experience) // self.minibatches
        return rows[minibatch * size : (minibatch + 1) * size]

    def _seed(self, batch: int) -> int:
        # Seeds of neighbouring positions are far apart, so that no two batches share random numbers.
        return (self.seed * 1_000_003 + self.epoch * 10_007 + batch + 1) * 100_003 % (2**62)

    def state_dict(self) -> dict[str, Any]:
        """The position, and every process's batch in flight and random state, as plain containers and tensors."""
        between = self.in_flight is not None and self.position % self.updates_per_batch != 0
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "used": self.used,
            "prompts_per_batch": self.prompts_per_batch,
            "in_flight": all_objects(self.in_flight.plain()) if self.in_flight is not None and between else None,
            "random": all_objects(random_state()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved position. A different number of processes redistributes the batch in flight."""
        # The saved seed determines the order that the position refers to. Earlier checkpoints do not hold it.
        self.seed = state.get("seed", self.seed)
        self.epoch, self.position, self.used = state["epoch"], state["position"], state["used"]
        before, saved = len(state["random"]), state["in_flight"]
        same = before == world_size()
        self.random = state["random"][rank()] if same else None
        self.in_flight = None
        if saved is not None:
            parts = [InFlight.of(part) for part in saved]
            self.in_flight = (parts if same else redistribute(parts, world_size()))[rank()]
        if not same:
            rank_zero_warn(self._resume_message(before, state["prompts_per_batch"]))

    def _resume_message(self, before: int, prompts_per_batch: int) -> str:
        """The warning for another number of processes than the checkpoint's."""
        left = -self.position % self.updates_per_batch
        flight = (
            f"the {left} updates left of the batch in flight are redistributed" if left else "no batch is in flight"
        )
        sizes = (
            f"of {self.prompts_per_batch} prompts each, as before"
            if prompts_per_batch == self.prompts_per_batch
            else f"of {self.prompts_per_batch} prompts each, {prompts_per_batch} before"
        )
        return (
            f"the checkpoint was written by {before} processes and this run has {world_size()}: it resumes in epoch "
            f"{self.epoch} after {self.used} of {len(self.rows)} prompts, in batches {sizes}; {flight}; the random "
            "states are not restored"
        )
