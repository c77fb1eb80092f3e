"""``moa compare``: several runs side by side."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.image import imread

from moa_lightning.commands.compare.picture import comparison
from moa_lightning.commands.compare.reached import Reached
from tests.cli.task import complaint, moa


def run(folder: Path, combiner: str, ends: dict[str, tuple[float, float | None]], **more: object) -> Path:
    """A run's folder with these ends and standard errors."""
    objectives = {name: {**numbers(*end), "transform": ""} for name, end in ends.items()}
    return write(folder, {"combiner": combiner, "steps": 7, "objectives": objectives, **more})


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of the output, without the table's edges and its rule below the headings."""
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    return [line for line in lines if line.strip("─")]


def numbers(end: float, error: float | None, prefix: str = "") -> dict[str, Any]:
    return {
        f"{prefix}start": 0.0,
        f"{prefix}end": end,
        f"{prefix}std_error": error,
        f"{prefix}start_std_error": error,
    }


def write(folder: Path, summary: dict[str, Any], model: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    if model is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}))
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
    lines = printed(capsys)
    assert lines[0].split() == [
        "run", "combiner", "steps", "good", "(95", "%)", "short", "(95", "%)", "front", "thresholds"
    ]  # fmt: skip
    told = [" ".join(line.split()[1:]) for line in lines[1:5]]
    assert told == [
        "PAMA 7 0.500 ± 0.020 0.500 ± 0.020 *",
        "MOPO 7 0.400 ± 0.020 0.700 ± 0.020 * short 0.6: met",
        "MOPO 7 0.400 ± 0.196 0.450 ± 0.196 short 0.6: open",
        "MOPO 7 0.300 0.100 ± 0.196 short 0.6: missed",
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
    lines = printed(capsys)
    assert "thresholds" not in lines[0]
    assert [line.endswith("*") for line in lines[1:]] == [False, True]
    assert len(lines) == 3


def test_a_pipe_gets_the_whole_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    folders = [run(tmp_path / f"[red]{letter * 150}", "PAMA", {"good": (0.5, 0.01)}) for letter in "ab"]
    moa("compare", f"--runs={tmp_path}/*")
    assert [line.split()[0] for line in printed(capsys)[1:]] == [str(folder) for folder in folders]


def test_runs_may_each_have_a_flag(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    for flags in (
        [f"--runs={runs / 'a'}", f"--runs={runs / 'b'}", f"--runs={runs / 'c'}"],
        ["--runs", runs / "a", "--runs", runs / "b", f"--runs={runs}/c*"],
        [f"--runs=[{runs / 'a'}, {runs / 'b'}]", f"--runs={runs / 'c'}"],
        ["--runs=[ab]*", "--runs=c"],  # a pattern, and no list
    ):
        moa("compare", *flags)
        lines = printed(capsys)[1:]
        assert [Path(line.split()[0]).name for line in lines] == ["a", "b", "c"]


def test_a_pattern_passes_over_what_is_no_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "comparison").mkdir()
    moa("compare", f"--runs={runs}/*")
    assert len(printed(capsys)) == 5
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


# Costs: what is compared is the value.


def table(capsys: pytest.CaptureFixture[str], *folders: Path) -> list[str]:
    capsys.readouterr()
    moa("compare", f"--runs=[{', '.join(map(str, folders))}]")
    return [" ".join(line.split()) for line in printed(capsys)[1:]]


def test_a_cost_is_compared_by_its_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal helpfulness, lengths .7 and .05, threshold -.1 on minus the length."""
    for name, length in (("long", 0.7), ("short", 0.05)):
        cost = {**numbers(-length, 0.01), **numbers(length, 0.01, "raw_"), "transform": "-1 x raw"}
        good = {**numbers(0.5, 0.01), "transform": ""}
        objectives = {"good": good, "cost": cost}
        summary = {"combiner": "CAID", "steps": 7, "objectives": objectives, "thresholds": {"cost": -0.1}}
        write(tmp_path / name, summary)
    assert [line.removeprefix(f"{tmp_path}/") for line in table(capsys, tmp_path / "long", tmp_path / "short")] == [
        "long CAID 7 0.500 ± 0.020 -0.700 ± 0.020 (raw 0.700) cost -0.1: missed",
        "short CAID 7 0.500 ± 0.020 -0.050 ± 0.020 (raw 0.050) * cost -0.1: met",
    ]
    moa("compare", f"--runs={tmp_path}/*", "--output", tmp_path / "out")
    with (tmp_path / "out" / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["cost"], row["cost_raw"], row["cost_value"]) for row in rows] == [
        ("-0.7", "0.7", "'-1 x raw"),
        ("-0.05", "0.05", "'-1 x raw"),
    ]
    assert "good_raw" not in rows[0]


ROLLOUT = {"class_path": "moa_lightning.sources.Rollout"}
ROWS = {"class_path": "moa_lightning.sources.PreferenceRows"}


@pytest.mark.parametrize(
    ("model", "cells", "said"),
    [
        ({"source": ROLLOUT, "objectives": {"cost": {}}}, "0.700 ± 0.020 * cost -0.1: met", None),
        (
            {"source": ROLLOUT, "objectives": {"cost": {"scale": -1.0, "shift": 0.5}}},
            "-0.200 ± 0.020 (raw 0.700) * cost -0.1: missed",
            "means of values follow from its config.yaml (cost = -1 x raw + 0.5)",
        ),
        (
            {"source": ROLLOUT, "objectives": {"cost": {"scale": -1.0, "clip": [-0.5, 0.0]}}},
            "? (raw 0.700) cost -0.1: unknown",
            "the values of cost do not follow (clipped): no verdict, no place on the front",
        ),
        ({"source": ROWS, "objectives": {"cost": {"scale": -1.0}}}, "0.700 ± 0.020 * cost -0.1: met", None),
        (
            {"source": {"class_path": "somebodys.Source"}, "objectives": {"cost": {"scale": -1.0}}},
            "? (raw 0.700) cost -0.1: unknown",
            "the values of cost do not follow (no config.yaml says their scale): no verdict, no place on the front",
        ),
        (
            None,
            "? (raw 0.700) cost -0.1: unknown",
            "the values of cost do not follow (no config.yaml says their scale): no verdict, no place on the front",
        ),
    ],
    ids=["no scale", "scale", "clip", "win probabilities", "unknown source", "no config"],
)
def test_old_runs_recorded_raw_means(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: dict[str, Any] | None,
    cells: str,
    said: str | None,
) -> None:
    summary = {"combiner": "CAID", "steps": 7, "objectives": {"cost": numbers(0.7, 0.01)}, "thresholds": {"cost": -0.1}}
    old = write(tmp_path / "old", summary, model)
    unit = "-1 x raw + 0.5" if said and "config.yaml (" in said else ""
    cost = {**numbers(-1.0, 0.01), "transform": unit}
    new = write(tmp_path / "new", {"combiner": "Linear", "steps": 7, "objectives": {"cost": cost}})
    rows = table(capsys, old, new)
    assert rows[0] == f"{old} CAID 7 {cells}"
    notes = [row for row in rows[2:] if row.startswith(f"{old}: ")]
    assert len(notes) == (said is not None)
    assert said is None or notes[0].endswith(said)


def test_runs_whose_values_are_in_different_units_have_no_front(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cost = {**numbers(-7.0, 0.01), **numbers(0.7, 0.01, "raw_"), "transform": "-10 x raw"}
    one = write(tmp_path / "one", {"combiner": "CAID", "steps": 7, "objectives": {"cost": cost}})
    two = run(tmp_path / "two", "CAID", {"cost": (0.5, 0.01)})
    rows = table(capsys, one, two)
    assert not [row for row in rows if row.endswith("*")]
    assert rows[-1] == "'cost' is -10 x raw in some runs, raw in others: in different units, no front"


def test_the_picture_mixes_no_units_and_writes_no_label_over_another(tmp_path: Path) -> None:
    def reached(name: str, unit: str, short: float) -> Reached:
        mean, unknown = {"good": 0.5, "short": short}, {"good": 0.1, "short": math.nan}
        return Reached(name, "MOPO", 7, mean, unknown, {}, {"good": "", "short": unit}, {"short": 0.6}, {}, ())

    found = [reached("a", "", 0.50), reached("b", "-1 x raw", -2.0), reached("c", "", 0.51)]
    figure = comparison([*found, reached("d", "", math.nan)], ["good", "short"], [True, False, False, False])
    assert [axes.get_ylabel() for axes in figure.axes] == ["short", "short (value, -1 x raw)"]
    assert [len(axes.containers) for axes in figure.axes] == [2, 1]
    assert [len(axes.texts) for axes in figure.axes] == [0, 0]
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["a", "b", "c", "d", "no other run dominates it", "threshold"]
