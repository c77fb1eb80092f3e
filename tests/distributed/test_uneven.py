"""Prompts that do not divide over the processes: nobody waits, and nothing counts twice or not at all."""

import math

import pytest
import torch

from tests.helpers import pairs, processes, tiny, uneven

CELLS = {
    f"{'offline' if offline else 'online'}-{count}": {"offline": offline, "count": count}
    for offline in (False, True)
    for count in (1, 5)
}
CELLS["sampled-5"] = {"count": 5, "scripted": False}
UNDER = {
    "ddp": ("online-1", "offline-5"),
    "fsdp2": CELLS,
    "fsdp2-layerwise": ("online-5", "offline-1", "sampled-5"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:objective '.*' did not score", "ignore:no response was scored by good")
def test_an_evaluation_is_that_of_one_process(tmp_path):
    tiny.policy_folder(tmp_path / "policy", scale=1.0)
    pairs.write(tmp_path / "data.jsonl")
    cells = [(strategy, name, CELLS[name]) for strategy, names in UNDER.items() for name in names]
    alone = {name: uneven.evaluate("one", case, tmp_path) for name, case in CELLS.items()}
    found = processes.both(cells, tmp_path, uneven.evaluate)
    for (strategy, name), result in found.items():
        cell, count, one = f"{strategy} {name}", int(name[-1]), alone[name]
        assert len(set(result["seen"]["batches"])) == 1, cell  # every process runs as many forward passes
        assert result["seen"]["rows"] == [math.ceil(count / 2), count // 2], cell
        assert result["predictions"] == one["predictions"] == sorted(pairs.PROMPTS[:count]), cell
        assert result["samples"] == one["samples"][::2], cell  # the main process's own
        if "sampled" in name:  # random numbers depend on the process
            continue
        assert result["seen"]["counted"] == one["seen"]["counted"] == count, cell
        for stage in ("validated", "tested", "front"):
            torch.testing.assert_close(
                result[stage], one[stage], rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda m, c=cell: f"{c}: {m}"
            )
