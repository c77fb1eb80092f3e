"""``moa compare``: several runs side by side."""

import csv
import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from tests.cli.task import complaint, moa


def run(folder: Path, combiner: str, ends: dict[str, tuple[float, float | None]], **more: object) -> Path:
    folder.mkdir(parents=True)
    objectives = {n: {"start": 0.0, "end": e, "std_error": s, "start_std_error": s} for n, (e, s) in ends.items()}
    summary = {"combiner": combiner, "steps": 7, "objectives": objectives, **more}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    run(tmp_path / "runs" / "a", "PAMA", {"good": (0.5, 0.01), "short": (0.5, 0.01)})
    run(tmp_path / "runs" / "b", "MOPO", {"good": (0.4, 0.01), "short": (0.7, 0.01)}, thresholds={"short": 0.6})
    run(tmp_path / "runs" / "c", "MOPO", {"good": (0.4, 0.1), "short": (0.45, 0.1)}, thresholds={"short": 0.6})
    run(tmp_path / "runs" / "d", "MOPO", {"short": (0.1, 0.1), "good": (0.3, None)}, thresholds={"short": 0.6})
    return tmp_path / "runs"


def test_the_table(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moa("compare", f"--runs={runs}/*", "--output", tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "run", "combiner", "steps", "good", "(95", "%)", "short", "(95", "%)", "front", "thresholds"
    ]  # fmt: skip
    told = [" ".join(line.split()[1:]) for line in lines[1:5]]
    assert told == [
        "PAMA 7 0.500 ± 0.020 0.500 ± 0.020 *",
        "MOPO 7 0.400 ± 0.020 0.700 ± 0.020 * short 0.6: met",
        "MOPO 7 0.400 ± 0.196 0.450 ± 0.196 short 0.6: open",
        "MOPO 7 0.300 ± 0.000 0.100 ± 0.196 short 0.6: missed",
    ]
    with (tmp_path / "out" / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["non_dominated"] for row in rows] == ["1", "1", "0", "0"]
    assert [row["short_outcome"] for row in rows] == ["", "met", "open", "missed"]
    assert imread(tmp_path / "out" / "comparison.png").std() > 0


def test_runs_may_be_named_one_by_one_and_thresholds_be_absent(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "other", "Linear", {"good": (0.6, 0.01), "short": (0.6, 0.01)})
    moa("compare", f"--runs=[{runs / 'a'}, {tmp_path / 'other' / 'summary.json'}]")
    lines = capsys.readouterr().out.splitlines()
    assert "thresholds" not in lines[0]
    assert [line.endswith("*") for line in lines[1:]] == [False, True]
    assert len(lines) == 3


def test_a_pattern_passes_over_what_is_no_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "comparison").mkdir()
    moa("compare", f"--runs={runs}/*")
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert "holds no summary.json" in complaint(capsys, "compare", f"--runs=[{runs / 'a'}, {runs / 'comparison'}]")


def test_mistakes(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, "compare", f"--runs={runs}/nothing*")
    assert line == f"'{runs}/nothing*' holds no summary.json of a run; give folders that moa fit wrote"
    line = complaint(capsys, "compare", f"--runs={runs}/a")
    assert line == "--runs needs two or more runs, got 1; such as --runs='runs/mopo-*'"
    run(tmp_path / "other", "PAMA", {"good": (0.5, 0.01)})
    line = complaint(capsys, "compare", f"--runs=[{runs / 'a'}, {tmp_path / 'other'}]")
    assert line == (
        f"'{tmp_path / 'other'}' has the objectives good, '{runs / 'a'}' has good, short; compare runs on the same ones"
    )
    (tmp_path / "other" / "summary.json").write_text('{"combiner": ')
    assert "holds no summary.json of a run" in complaint(
        capsys, "compare", f"--runs=[{runs / 'a'}, {tmp_path / 'other'}]"
    )


def test_a_run_is_no_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(Path("=1+1"), "@SUM(1)", {"good": (0.5, 0.01)})
    run(Path("$\\frac$"), "PAMA", {"good": (0.5, 0.01)})  # no mathematics either
    moa("compare", "--runs=[=1+1,$\\frac$]", "--output=out")
    with Path("out/comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["combiner"]) for row in rows] == [("'=1+1", "'@SUM(1)"), ("$\\frac$", "PAMA")]
