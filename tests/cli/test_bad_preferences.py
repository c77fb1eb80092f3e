"""``moa`` on preference data: what users get wrong."""

from pathlib import Path
from typing import Any

import pytest

from tests.cli.preference_task import changed, make
from tests.cli.task import complaint, moa
from tests.helpers import pairs

pytestmark = pytest.mark.filterwarnings("ignore:objective 'kind' did not score", "ignore:MOPO's labels")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--model.combiner.thresholds={kind: 1.2}"],
            "MOPO.thresholds.kind must lie in (0, 1), as a win probability; got 1.2",
        ),
        (
            ["--model.combiner.thresholds={kind: 0.0}"],
            "MOPO.thresholds.kind must lie in (0, 1), as a win probability; got 0",
        ),
        (
            ["--model.combiner.thresholds={kin: 0.6}"],
            "MOPO.thresholds names 'kin', which is no trained objective; they are good, kind, short",
        ),
        (
            ["--model.combiner.thresholds={good: 0.6}"],
            "MOPO.thresholds names 'good', the primary objective, which is maximised; remove it",
        ),
        (["--model.combiner.primary=god"], "MOPO.primary 'god' is no trained objective; they are good, kind, short"),
        (
            ["--model.objectives.kind.reward.label=kin"],
            "objective 'kind': the data have no label 'kin'; they have good, kind",
        ),
        (
            ["--model.objectives.kind.scale=-1"],
            "FromLabels gives win probabilities, which scale -1 and shift 0 take out of [0, 1]; remove them, or turn ",
        ),
        (["--model.source=Rollout"], "MOPO needs wins, which Rollout does not provide; choose another combiner or "),
        (["--data.format=SafeRLHF"], "data.jsonl' line 1: there is no 'response_0'; the row has "),
        (["--data.format=Candidate"], "unknown format 'Candidate'; did you mean 'Candidates'"),
        (
            ["--data.format=ChosenRejected", "--data.format.objektive=h"],
            "ChosenRejected has no field 'objektive'; did ",
        ),
        (["--data.on_bad_row=ignore"], "'data.on_bad_row' must be one of fail, skip; got 'ignore'"),
        (["--model.reference.interval=0"], "LaggedCopy.interval must be at least 1, got 0"),
        (["--model.loss.max_weight=0"], "WeightedLikelihood needs max_weight > 0 (or null), got 0"),
        (["--model.source.win_scale=0"], "source.win_scale must be above 0, got 0.0"),
        (["--data.val_size=99"], "data.val_size 99 leaves nothing to train on: "),
        (
            ["--model.source.max_response_length=4"],
            "line 2: response 2 has 5 tokens with its end token, more than source.max_response_length 4; raise that, ",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_one_line_and_nothing_left_behind(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str], says: str
) -> None:
    monkeypatch.setattr("moa_lightning.training.strategies.load_model", lambda *a: pytest.fail("a model was loaded"))
    assert says in complaint(capsys, "fit", "--config", folder / "run.yaml", *flags)
    assert not (folder / "run").exists()


def test_labels_do_not_go_with_prompts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def prompts(given: dict[str, Any]) -> None:
        given["data"]["class_path"] = "Prompts"

    line = complaint(capsys, "fit", "--config", changed(folder, prompts))
    assert line == "objective 'good': the data have no label 'good'; FromLabels goes with data class Preferences"


def test_labels_do_not_go_with_new_responses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(
        capsys,
        "fit",
        "--config",
        folder / "run.yaml",
        "--model.source=Rollout",
        "--model.source.num_generations=2",
        "--model.source.max_new_tokens=6",
    )
    assert "FromLabels knows the responses of the data alone, not new ones; use source PreferenceRows" in line


def test_a_score_of_either_sign_does_not_go_with_weighted_likelihood(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = complaint(capsys, "fit", "--config", folder / "run.yaml", "--model.combiner=Linear")
    assert line.startswith("loss WeightedLikelihood needs weights of at least 0, and ")
    assert line.endswith(" is an advantage of either sign; use loss ClippedSurrogate with it")


def test_bad_rows_by_their_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pairs.rows(16)
    rows[9]["preferences"]["good"] = {"winner": 7}
    rows[11]["responses"][1] = "very " * 40 + "bad"
    pairs.write(folder / "data.jsonl", rows)
    line = complaint(capsys, "fit", "--config", folder / "run.yaml")
    assert line.startswith(
        f"'{folder / 'data.jsonl'}' line 10: 'preferences.good': winner 7 is no candidate; there are"
    )
    assert line.endswith("; or set --data.on_bad_row=skip")
    rows[9] = rows[0]
    pairs.write(folder / "data.jsonl", rows)
    line = complaint(capsys, "fit", "--config", folder / "run.yaml")
    assert line.startswith(
        f"'{folder / 'data.jsonl'}' line 12: response 1 has 42 tokens with its end token, more than "
    )
    with pytest.warns(UserWarning, match=r"^1 of \d+ (train|validate) rows cannot be used and are left out; the first"):
        moa("fit", "--config", folder / "run.yaml", "--data.on_bad_row=skip", "--trainer.max_steps=1")
