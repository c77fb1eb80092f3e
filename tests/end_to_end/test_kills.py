"""Runs that are killed at named moments and called again end with the weights of the run that nobody killed."""

import multiprocessing
import random
import signal

import pytest
import torch

from tests.helpers import killed, tiny

# Four steps, two passes over each rollout, an evaluation before them and after each, two files for each checkpoint. The
# call that dies is drawn from these, so that there is a checkpoint to go on from.
CALLS = {
    "in a rollout": (2, 2),
    "between rollout and update": (2, 2),
    "in an update": (2, 4),
    "in an evaluation": (2, 5),
    "in the writing of a checkpoint": (3, 8),
}


@pytest.fixture(scope="module")
def started():
    """Runs in processes of their own that have their imports behind them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.killed"])

    def start(*arguments):
        process = context.Process(target=killed.run, args=arguments)
        process.start()
        process.join(120)
        return process.exitcode

    return start


@pytest.mark.slow
def test_a_killed_run_that_is_called_again_ends_alike(tmp_path, started):
    tiny.policy_folder(tmp_path / "policy", scale=1.0)
    assert started(tmp_path, tmp_path / "whole") == 0
    whole = torch.load(tmp_path / "whole/end.pt")
    draw = random.Random(5)
    for place, moment in enumerate(killed.MOMENTS):
        root, number = tmp_path / str(place), draw.randint(*CALLS[moment])
        assert started(tmp_path, root, moment, number) == -signal.SIGKILL, moment
        assert started(tmp_path, root) == 0, moment
        assert (root / "went-on-from").read_text() != "None", (moment, number)
        assert list((root / "checkpoints").glob("*.ckpt"))
        torch.testing.assert_close(
            torch.load(root / "end.pt"), whole, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=moment: f"{n}: {m}"
        )
