"""What checkpoints may follow: all that a run logs, and nothing else."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from moa_lightning.commands.fit import cli as command
from moa_lightning.commands.fit.monitors import check_monitors
from moa_lightning.errors import UserError
from tests.cli import preference_task
from tests.cli.task import make, moa

pytestmark = pytest.mark.filterwarnings("ignore:objective 'kind' did not score", "ignore:MOPO's labels")

Run = tuple[Any, Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Trainer and module of finished runs: rollouts with a critic, ratios to a reference, and labelled pairs."""
    found: list[Run] = []
    task, pairs = make(tmp_path_factory.mktemp("task")), preference_task.make(tmp_path_factory.mktemp("pairs"))
    rollouts = [f"--config={task.config}", "--model.objectives.short.scale=2", "--trainer.max_steps=2"]
    several = ["--model.source.num_generations=4", "--trainer.default_root_dir=" + str(task.folder / "other")]
    mopo = [
        "--model.combiner=MOPO",
        "--model.combiner.thresholds={short: 0.5}",
        "--model.source.advantages=GroupRelative",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "check_monitors", lambda trainer, module: found.append((trainer, module)))
        moa("fit", *rollouts)
        moa("fit", *rollouts, *several, *mopo)
        moa("fit", f"--config={pairs / 'run.yaml'}", "--trainer.max_steps=3")
    return found


def follow(run: Run, *names: str, beside: tuple[Any, ...] = ()) -> None:
    watching = [ModelCheckpoint(monitor=name, mode="max") for name in names]
    ours = [callback for callback in run[0].callbacks if not hasattr(callback, "monitor")]
    check_monitors(SimpleNamespace(callbacks=[*ours, *watching, *beside]), run[1])  # type: ignore[arg-type]


def test_all_that_is_logged_may_be_followed(runs: list[Run]) -> None:
    for run in runs:
        logged = [name for name in run[0].callback_metrics if name != "step"]
        assert len(logged) > 20
        follow(run, *logged)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("val/rewards/god/mean", "no metric 'val/rewards/god/mean'; did you mean 'val/rewards/good/mean'?"),
        ("val/rewards/good", "did you mean 'val/rewards/good/mean'?"),
        ("nothing", "no metric 'nothing'; evaluations log val/rewards/good/mean, val/rewards/short/mean, val/values"),
        ("weights/god", "did you mean 'weights/good'?"),
        ("thresholds_held/god", "did you mean 'thresholds_held/good'?"),
    ],
)
def test_what_nobody_logs_is_refused(runs: list[Run], name: str, says: str) -> None:
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        follow(runs[0], name)


def test_callbacks_of_others_may_log_what_they_like_but_not_for_ours(runs: list[Run]) -> None:
    class Mine(EarlyStopping):
        """Of a user."""

    for other in (Mine("val/rewards/good/mean"), LearningRateMonitor()):
        follow(runs[0], "nothing", "val/mine", "lr-AdamW", beside=(other,))
        with pytest.raises(UserError, match="no metric 'val/rewards/god/mean'"):
            follow(runs[0], "val/rewards/god/mean", beside=(other,))


def test_a_run_with_a_misspelt_monitor_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = make(tmp_path)
    with pytest.raises(SystemExit):
        moa("fit", "--config", task.config, "--checkpoint.monitor=val/rewards/god/mean", "--checkpoint.mode=max")
    assert "checkpoint.monitor: this run logs no metric 'val/rewards/god/mean'; did you" in capsys.readouterr().err
    assert not task.root.exists()
