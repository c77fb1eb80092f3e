"""What checkpoints may follow: all that a run logs, and nothing else."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

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
def started(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trainer and module of a run that has not begun."""
    found: list[Run] = []

    def stop(*run: Any) -> NoReturn:
        found.append(run)
        raise KeyboardInterrupt

    config = make(tmp_path_factory.mktemp("task")).config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "check_monitors", stop)
        with pytest.raises(KeyboardInterrupt):
            moa("fit", f"--config={config}", "--model.objectives.short.scale=2")
    return found[0]


def follow(run: Run, *names: str, beside: tuple[Any, ...] = ()) -> None:
    watching = [ModelCheckpoint(monitor=name, mode="max") for name in names]
    ours = [callback for callback in run[0].callbacks if not hasattr(callback, "monitor")]
    check_monitors(SimpleNamespace(callbacks=[*ours, *watching, *beside]), run[1])  # type: ignore[arg-type]


@pytest.mark.slow
def test_all_that_is_logged_may_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rollouts with a critic, rollouts with ratios to a reference, and labelled pairs."""
    found: list[Run] = []
    monkeypatch.setattr(command, "check_monitors", lambda *run: found.append(run))
    task, pairs = make(tmp_path), preference_task.make(tmp_path / "pairs")
    rollouts = [f"--config={task.config}", "--model.objectives.short.scale=2", "--trainer.val_check_interval=2"]
    several = ["--model.source.num_generations=4", "--model.source.advantages=GroupRelative"]
    mopo = ["--model.combiner=MOPO", "--model.combiner.thresholds={short: 0.5}"]
    moa("fit", *rollouts)
    moa("fit", *rollouts, *several, *mopo, f"--trainer.default_root_dir={task.folder / 'other'}")
    moa("fit", f"--config={pairs / 'run.yaml'}", "--trainer.max_steps=3")
    for run in found:
        logged = [name for name in run[0].callback_metrics if name != "step"]
        assert len(logged) > 20
        follow(run, *logged)
    assert len(found) == 3


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
def test_what_nobody_logs_is_refused(started: Run, name: str, says: str) -> None:
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        follow(started, name)


def test_callbacks_of_others_may_log_what_they_like_but_not_for_ours(started: Run) -> None:
    class Mine(EarlyStopping):
        """Of a user."""

    for other in (Mine("val/rewards/good/mean"), LearningRateMonitor()):
        follow(started, "nothing", "val/mine", "lr-AdamW", beside=(other,))
        with pytest.raises(UserError, match="no metric 'val/rewards/god/mean'"):
            follow(started, "val/rewards/god/mean", beside=(other,))


def test_a_run_with_a_misspelt_monitor_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = make(tmp_path)
    with pytest.raises(SystemExit):
        moa("fit", "--config", task.config, "--checkpoint.monitor=val/rewards/god/mean", "--checkpoint.mode=max")
    assert "checkpoint.monitor: this run logs no metric 'val/rewards/god/mean'; did you" in capsys.readouterr().err
    assert not task.root.exists()
