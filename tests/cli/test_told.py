"""What a run tells on its way and at its end, with the progress bar on."""

import json
import shlex

import pytest
import yaml

from moa_lightning.callbacks import ObjectiveMetrics
from moa_lightning.data.reviews import warm_start
from moa_lightning.sources import Rollout
from tests.cli.task import PROMPTS, Task, complaint, moa, write_prompts

BAR = "--trainer.enable_progress_bar=true"


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the end of a step, as Lightning sees it."""
    original = ObjectiveMetrics.on_train_batch_end

    def interrupted(self, trainer, *arguments):
        original(self, trainer, *arguments)
        if trainer.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(ObjectiveMetrics, "on_train_batch_end", interrupted)


def test_the_command_that_ctrl_c_prints_resumes(
    task: Task, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        with pytest.raises(SystemExit):
            moa("fit", "--config", task.config, "--trainer.max_steps=3")
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stopped")]
    assert len(told) == 1
    said, _, command = told[0].partition("; resume with: ")
    assert said == "stopped at step 2; the last checkpoint is of step 1"
    program, *arguments = shlex.split(command)
    assert program == "moa"
    moa(*arguments)
    assert json.loads((task.root / "summary.json").read_text())["steps"] == 3


def test_ctrl_c_before_any_checkpoint_says_so(
    task: Task, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(1, monkeypatch)
    with pytest.raises(SystemExit):
        moa("fit", "--config", task.config, "--trainer.val_check_interval=2")
    assert "stopped at step 1; no checkpoint had been written yet" in capsys.readouterr().err


def test_ctrl_c_in_an_evaluation_offers_no_resume(
    task: Task, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Rollout, *arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Rollout, "evaluate", interrupted)
    with pytest.raises(SystemExit):
        moa("validate", "--config", task.config)
    assert "go on with" not in (told := capsys.readouterr().err)
    assert "stopped at step" not in told
    assert [path.name for path in (task.root / "validate").iterdir()] == ["config.yaml"]  # and no lock


def test_the_end_of_fit_and_predict_names_the_files(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    moa("fit", "--config", task.config, BAR)
    printed = capsys.readouterr().out
    assert "change / s.e." in printed
    assert f"{task.root / 'front.png'}  the Pareto front" in printed
    out = task.folder / "answers.jsonl"
    moa("predict", "--config", task.config, BAR, f"--predictions.path={out}")
    assert capsys.readouterr().out.splitlines()[-1] == f"responses written to {out}"
    assert complaint(capsys, "predict", "--config", task.config, f"--predictions.path={out}").startswith(
        f"{out} exists already; remove it"
    )


def test_thresholds_in_win_probability_are_not_held_against_rewards(
    task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    several = ("--model.source.num_generations=2", "--model.combiner=MOPO", "--model.combiner.thresholds={short: 0.4}")
    moa("fit", "--config", task.config, BAR, *several, "--model.loss=WeightedLikelihood")
    summary = json.loads((task.root / "summary.json").read_text())
    assert "thresholds" not in summary
    assert summary["training_thresholds"] == {"short": pytest.approx(0.4)}
    assert "short: threshold 0.4 on the win probability among the responses to a prompt" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_threshold_on_fixed_rivals_has_a_verdict_beside_a_plain_primary(
    task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prompts(task.prompts, [{"prompt": PROMPTS[i % 5], "wish": 2, "old": "bad film"} for i in range(12)])
    settings = task.settings()
    plain = settings["model"]["objectives"]["short"]["reward"]
    fixed = {"class_path": "WinProbability", "init_args": {"reward": plain, "baseline": "old"}}
    settings["model"]["objectives"]["short"]["reward"] = fixed
    task.config.write_text(yaml.safe_dump(settings))
    several = ("--model.source.num_generations=2", "--model.combiner=MOPO", "--model.combiner.thresholds={short: 0.01}")
    moa("fit", "--config", task.config, BAR, *several, "--model.loss=WeightedLikelihood")
    summary = json.loads((task.root / "summary.json").read_text())
    assert "training_thresholds" not in summary
    assert summary["thresholds"] == {"short": pytest.approx(0.01)}
    told = " ".join(capsys.readouterr().out.split())
    assert "0.01 met" in told
    assert "held-out means reach all thresholds (good" in told
    assert "among the responses" not in told
    assert (task.root / "checkpoints" / "best.ckpt").is_file()


def test_upper_and_lower_case_are_near(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, "fit", "--config", task.config, "--model.combiner=Pama")
    assert "unknown combiner 'Pama'; did you mean 'PAMA'?" in line


@pytest.mark.parametrize("path", ["gpt2-nope", "owner/gpt2-nope"])
def test_a_misspelt_model_is_not_trained_from_scratch(path: str) -> None:
    with pytest.raises(ValueError, match="is no folder, and reads like a model on the hub"):
        warm_start(path)
