"""What a cluster does to a run: it asks it to stop, kills a process, fills the disk. Nothing is lost, nothing hangs."""

import csv
from pathlib import Path

import pytest
import torch
import yaml

from tests.cli.conftest import _process_as_before, task  # noqa: F401  # fixtures
from tests.cli.task import Task, moa
from tests.helpers import interruptions
from tests.training.test_checkpoints import policy


@pytest.fixture
def noisy(task: Task) -> Task:  # noqa: F811
    """Evaluations in two batches, one at every second step; rewards that draw; weights that evaluations move."""
    settings = task.settings()
    settings["trainer"] |= {"max_steps": 4, "val_check_interval": 2}
    settings["data"]["init_args"]["val_batch_size"] = 2
    settings["model"]["objectives"]["good"]["reward"]["init_args"]["function"] = "tests.helpers.interruptions.noisy"
    settings["model"]["combiner"] = {"class_path": "DynamicWeights"}
    settings["pareto_front"] = {"reference": {"good": -9.0, "short": -9.0}}
    task.config.write_text(yaml.safe_dump(settings))
    return task


def steps_with_a_loss(root: Path) -> list[str]:
    with (root / "metrics.csv").open(newline="") as file:
        return [row["step"] for row in csv.DictReader(file) if row["loss"]]


# Calls of the reward: 1 and 2 in the evaluation before training, one in each rollout, two in each evaluation.
MOMENTS = {"a rollout": (3, 1), "a rollout before an evaluation": (4, 2), "an evaluation": (5, 2)}


def test_asked_to_stop_a_run_saves_and_goes_on_to_the_bit(noisy: Task, capsys: pytest.CaptureFixture[str]) -> None:
    roots = {name: noisy.root.with_name(f"run-{i}") for i, name in enumerate(["straight", *MOMENTS])}
    interruptions.begin()
    moa("fit", "--config", noisy.config, f"--trainer.default_root_dir={roots['straight']}")
    for moment, (call, step) in MOMENTS.items():
        again = ("fit", "--config", noisy.config, f"--trainer.default_root_dir={roots[moment]}", "--ckpt_path=last")
        interruptions.begin(call, interruptions.ask)
        with pytest.raises(SystemExit) as stopped:
            moa(*again)
        assert stopped.value.code == 75, moment
        last = roots[moment] / "checkpoints" / "last.ckpt"
        says = f"moa: stopped at step {step} as asked; saved {last}; resume with --ckpt_path=last"
        assert says in capsys.readouterr().err
        assert torch.load(last, weights_only=True)["global_step"] == step
        interruptions.begin()
        if step == 2:  # of which it saved that its evaluation is still to be made
            moa("validate", "--config", roots[moment] / "config.yaml", "--ckpt_path=last")
        moa(*again)
        torch.testing.assert_close(policy(roots[moment]), policy(roots["straight"]), rtol=0, atol=0, msg=moment)
        assert steps_with_a_loss(roots[moment]) == steps_with_a_loss(roots["straight"]), moment
        assert (roots[moment] / "front.csv").read_text() == (roots["straight"] / "front.csv").read_text(), moment
        assert {path.name for path in last.parent.iterdir()} == {"last.ckpt", "step-4.ckpt"}, moment


def test_asked_to_stop_before_the_first_update_there_is_nothing_to_save(
    noisy: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    interruptions.begin(1, interruptions.ask)
    with pytest.raises(SystemExit) as stopped:
        moa("fit", "--config", noisy.config)
    assert stopped.value.code == 75
    assert "moa: stopped at step 0 as asked; nothing to save" in capsys.readouterr().err
    assert not (noisy.root / "checkpoints").exists()
