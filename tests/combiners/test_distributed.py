"""Two processes, each with its prompts, give what one process gives with all of them: combiners and losses."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moa_lightning.combiners import Combined
from moa_lightning.losses import ClippedSurrogate, LossKL, PairwiseLogistic, WeightedLikelihood
from tests.combiners.inputs import EVERY, begin, collected, missing, signals, without

LOSSES = {
    "clipped": ClippedSurrogate(),
    "likelihood": WeightedLikelihood(max_weight=0.8),
    "pairwise": PairwiseLogistic(),
    "ipo": PairwiseLogistic(loss_type="ipo"),
}


def batch():
    rows = missing(collected(prompts=6))
    rows.group_B[20:] = torch.arange(5, 9)  # responses alone to their prompts are compared with the batch of both
    return rows


def half_silent():
    """The first process has rewards for none of its responses, and the second no score of one objective."""
    rows = collected(prompts=6, seed=1)
    gone_BN = torch.zeros_like(rows.valid_BN)
    gone_BN[:8] = gone_BN[:, 1] = True
    return without(rows, gone_BN, advantage=0.0)


BATCHES = {"missing": batch, "half silent": half_silent}


def shares(whole):
    """Unequal parts of the batch."""
    parts = [whole.select(torch.arange(8)), whole.select(torch.arange(8, 24))]
    return [dataclasses.replace(part, row_share=12 / len(part)) for part in parts]


def run(combiner, rows):
    state = combiner.observe(rows, combiner.observe(rows, begin(combiner, rows)))
    combined = combiner.combine(signals(rows), state)
    return {
        "state": state if combined.state is None else combined.state,
        "score": combined.score,
        "weights_N": combined.mean_weights(),
    }


def loss_of(loss, rows):
    """Loss and terms on some policy, for the first objective's win probabilities as scores."""
    reference_BT = rows.reference_logprobs_BT
    output = SimpleNamespace(logprobs_BT=0.9 * reference_BT, entropy_BT=reference_BT.square(), values_BTN=None)
    score_B = rows.wins_BN[:, 0].nan_to_num(0.0)
    result = loss(Combined(score_B, torch.ones(1)), rows, output, LossKL(0.1))
    return {"loss": result.loss, **result.terms}


def one_of_two(rank, file, folder):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    found = {}
    for name, make in BATCHES.items():
        rows = shares(make())[rank]
        found[name] = {n: run(c, rows) for n, c in EVERY.items()}, {n: loss_of(c, rows) for n, c in LOSSES.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    mp.spawn(one_of_two, args=(tmp_path / "meeting", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for kind, make in BATCHES.items():
        assert_combined_alike(make(), kind, first[kind][0], second[kind][0])
        for name, loss in LOSSES.items():  # the mean over the processes is that of all rows
            mine, other, whole = first[kind][1][name], second[kind][1][name], loss_of(loss, make())
            means = {term: (mine[term] + other[term]) / 2 for term in whole}
            torch.testing.assert_close(means, whole, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def assert_combined_alike(rows, kind, first, second):
    for name, combiner in EVERY.items():
        whole, mine, other, cell = run(combiner, rows), first[name], second[name], f"{name}, {kind}"
        torch.testing.assert_close(other["state"], mine["state"], rtol=0, atol=0, equal_nan=True)  # to the bit
        assert torch.equal(mine["weights_N"], other["weights_N"]), cell
        scores = torch.cat([mine["score"], other["score"]])
        for found, expected in (
            (mine["state"], whole["state"]),
            (mine["weights_N"], whole["weights_N"]),
            (scores, whole["score"]),
        ):
            torch.testing.assert_close(
                found, expected, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m, c=cell: f"{c}: {m}"
            )
