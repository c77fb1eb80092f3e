"""A checkpoint of one process resumed by two, and of two by one: the same updates, no prompt twice or left out."""

import pytest
import torch

from moa_lightning.combiners import MOPO, PAMA
from tests.helpers import pairs, processes, tiny

# Two passes over three batches in an epoch: step 3 is in the middle of the second batch; 8 is in the second epoch.
PASSES = {"combiner": PAMA, "passes": 2}
# Two minibatches, two passes. Those of later batches depend on the number of processes: it ends with the first batch.
SEVERAL = {"combiner": PAMA, "passes": 2, "minibatches": 2}
LAGGED = {"combiner": MOPO, "offline": True, "lagged": True}
WRITTEN = {
    "straight-passes": PASSES | {"steps": 8},
    "half-passes": PASSES | {"steps": 3, "save": "passes.ckpt"},
    "straight-several": SEVERAL | {"steps": 4},
    "first-several": SEVERAL | {"steps": 1, "save": "early.ckpt"},
    "half-several": SEVERAL | {"steps": 3, "save": "late.ckpt"},
    "straight-lagged": LAGGED | {"steps": 5},
    "half-lagged": LAGGED | {"steps": 3, "save": "lagged.ckpt"},
}
RESUMED = {
    "passes": ("half-passes", PASSES | {"steps": 8, "resume": "passes.ckpt"}),
    "early": ("first-several", SEVERAL | {"steps": 4, "resume": "early.ckpt"}),
    "late": ("half-several", SEVERAL | {"steps": 4, "resume": "late.ckpt"}),
    "lagged": ("half-lagged", LAGGED | {"steps": 5, "resume": "lagged.ckpt"}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:objective '.*' did not score", "ignore:MOPO's labels")
def test_another_number_of_processes_goes_on_alike(tmp_path):
    tiny.policy_folder(tmp_path / "policy", scale=1.0)
    pairs.write(tmp_path / "data.jsonl")
    found = {("one", name): processes.run("one", case, tmp_path) for name, case in WRITTEN.items()}
    two = [(strategy, name, case) for strategy in ("ddp", "fsdp2") for name, case in WRITTEN.items()]
    by_two = [
        (strategy, f"resumed-{name}", case | {"written_by": "one"})
        for strategy in ("ddp", "fsdp2")
        for name, (_, case) in RESUMED.items()
    ]
    found |= processes.both([*two, *by_two], tmp_path)
    resumed = {}
    for strategy in ("ddp", "fsdp2"):
        for name, (_, case) in RESUMED.items():
            resumed["one", strategy, name] = found[strategy, f"resumed-{name}"]
            file = tmp_path / f"{strategy}-{case['resume']}"
            with pytest.warns(UserWarning, match="written by 2 processes and this run has 1") as told:
                resumed[strategy, "one", name] = processes.run("one", case, tmp_path, ckpt_path=file, weights_only=True)
            (line,) = {str(w.message) for w in told if "written by" in str(w.message)}
            assert ("no batch is in flight" in line) == (name == "lagged")
    for (writer, reader, name), result in resumed.items():
        cell, before = f"{writer} -> {reader}, {name}", found[writer, RESUMED[name][0]]
        straight = found[writer, f"straight-{name.replace('early', 'several').replace('late', 'several')}"]
        torch.testing.assert_close(
            before["losses"] + result["losses"],
            straight["losses"],
            rtol=1e-4,
            atol=1e-5,
            msg=lambda m, c=cell: f"{c}: {m}",
        )
        torch.testing.assert_close(
            result["weights"], straight["weights"], rtol=1e-3, atol=1e-5, msg=lambda m, c=cell: f"{c}: {m}"
        )
        torch.testing.assert_close(result["state"], straight["state"], rtol=1e-4, atol=1e-5, equal_nan=True)
        assert before["rows"] + result["rows"] == straight["rows"], cell
        if name == "passes":  # an epoch takes each of the twelve prompts once
            assert sorted(row for rows in straight["rows"][:3] for row in rows) == list(range(12)), cell
