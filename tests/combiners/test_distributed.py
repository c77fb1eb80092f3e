"""Two processes, each with its prompts, give what one process gives with all of them: every combiner."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.combiners.inputs import EVERY, begin, collected, missing, signals


def batch():
    rows = missing(collected(prompts=6))
    rows.group_B[20:] = torch.arange(5, 9)  # responses alone to their prompts are compared with the batch of both
    return rows


def shares(whole):
    """Unequal parts of the batch."""
    return [whole.select(torch.arange(8)), whole.select(torch.arange(8, 24))]


def run(combiner, rows):
    state = combiner.observe(rows, combiner.observe(rows, begin(combiner, rows)))
    combined = combiner.combine(signals(rows), state)
    return {"state": combined.state or state, "score": combined.score, "weights_N": combined.weights_N}


def one_of_two(rank, file, folder):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.save({name: run(c, shares(batch())[rank]) for name, c in EVERY.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    mp.spawn(one_of_two, args=(tmp_path / "meeting", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, combiner in EVERY.items():
        whole, mine, other = run(combiner, batch()), first[name], second[name]
        torch.testing.assert_close(other["state"], mine["state"], rtol=0, atol=0, equal_nan=True)  # to the bit
        assert torch.equal(mine["weights_N"], other["weights_N"]), name
        scores = torch.cat([mine["score"], other["score"]])
        for found, expected in (
            (mine["state"], whole["state"]),
            (mine["weights_N"], whole["weights_N"]),
            (scores, whole["score"]),
        ):
            torch.testing.assert_close(
                found, expected, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )
