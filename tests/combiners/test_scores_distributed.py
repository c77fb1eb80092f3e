"""Two processes, each with its prompts, give what one process gives with all of them."""

import dataclasses
import inspect

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import moa_lightning.combiners as package
from moa_lightning.combiners.scores import ResponseCombiner
from tests.combiners import scored

COMBINERS = [c for _, c in inspect.getmembers(package, inspect.isclass) if issubclass(c, ResponseCombiner)]
STEPS = 4  # one of them has its policy stand still before


def batch():
    scores_BN, group_B = scored.draw(prompts=6)
    scores_BN[1, 0] = torch.nan
    group_B[20:] = torch.arange(5, 9)  # responses alone to their prompts are compared with the batch of both processes
    return dataclasses.replace(scored.experience(scores_BN, group_B), metrics={"kl_coefficient": 0.2})


def shares(whole):
    """Unequal parts of the batch."""
    return [whole.select(torch.arange(8)), whole.select(torch.arange(8, 24))]


def one_of_two(rank, file, folder):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    found = {c.__name__: scored.run(c(), shares(batch())[rank], STEPS) for c in COMBINERS}
    torch.save({name: (state, vars(combined)) for name, (state, combined) in found.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    mp.spawn(one_of_two, args=(tmp_path / "meeting", tmp_path), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for combiner in COMBINERS:
        state, combined = scored.run(combiner(), batch(), STEPS)
        (first, mine), (second, other) = (part[combiner.__name__] for part in parts)
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(mine["weights_N"], other["weights_N"])
        torch.testing.assert_close(first, state, equal_nan=True)
        torch.testing.assert_close(mine["weights_N"], combined.weights_N)
        torch.testing.assert_close(torch.cat([mine["score"], other["score"]]), combined.score)
