"""What a finished run tells."""

import json
from pathlib import Path

import pytest

from moa_lightning.commands.fit.summary import print_summary

SUMMARY = {
    "combiner": "MOPO",
    "steps": 80,
    "seconds": 61.4,
    "tokens_per_second": 250.0,
    "seed": 0,
    "objectives": {
        "good": {"start": 0.5, "end": 0.7, "std_error": 0.03, "start_std_error": 0.04, "transform": ""},
        "short": {"start": 0.5, "end": 0.65, "std_error": 0.0, "start_std_error": None, "transform": ""},
        "cost": {
            "start": -0.5,
            "end": -0.7,
            "std_error": 0.03,
            "start_std_error": 0.04,
            "transform": "-1 x raw",
            "raw_start": 0.5,
            "raw_end": 0.7,
            "raw_std_error": 0.03,
            "raw_start_std_error": 0.04,
        },
    },
    "hypervolume": {"start": 0.25, "end": 0.5, "reference": {"good": 0.0, "short": -1.0}},
    "thresholds": {"short": 0.6, "cost": -0.1, "good": 0.65},
}


def test_numbers_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "front.png").touch()
    print_summary(tmp_path)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "objective before after change change / s.e. threshold" in lines
    assert "good 0.500 0.700 +0.200 +4.0 0.65 open" in lines  # .2 / sqrt(.03^2 + .04^2); 1.96 * .03 is over .05
    assert "short 0.500 0.650 +0.150 - 0.6 met" in lines
    assert "cost -0.500 -0.700 -0.200 -4.0 -0.1 missed" in lines  # although the raw mean .7 is above -.1
    assert "cost: value = -1 x raw; raw mean 0.500 -> 0.700" in lines
    assert sum("raw" in line for line in lines) == 1  # nothing is doubled where value and raw score are one
    assert "hypervolume 0.250 -> 0.500 (reference point good 0, short -1)" in lines
    assert "80 steps in 61 s, 250 tokens/s" in lines
    assert f"{tmp_path / 'front.png'} the Pareto front of the run, as a picture" in lines
    assert not [line for line in lines if "metrics.csv" in line]  # it was not written


def test_what_was_not_measured_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(tmp_path)
    assert capsys.readouterr().out == ""
    worse = {**SUMMARY, "hypervolume": {**SUMMARY["hypervolume"], "start": 0.0, "end": 0.0}}
    (tmp_path / "summary.json").write_text(json.dumps(worse))
    print_summary(tmp_path)
    assert "it is 0 because no evaluation is better than the reference point" in capsys.readouterr().out
    bare = {**SUMMARY, "hypervolume": None, "tokens_per_second": None}
    del bare["thresholds"]
    (tmp_path / "summary.json").write_text(json.dumps(bare))
    print_summary(tmp_path)
    printed = capsys.readouterr().out
    assert "hypervolume" not in printed and "threshold" not in printed and "tokens" not in printed
    assert "80 steps in 61 s\n" in printed


def test_a_folder_and_names_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "[x] [/bold] :smile:"  # two folders
    root.mkdir(parents=True)
    (root / "summary.json").write_text(json.dumps({**SUMMARY, "combiner": "[/red]"}))
    (root / "config.yaml").touch()
    print_summary(root)
    printed = capsys.readouterr().out
    assert f"{root / 'config.yaml'}  the record" in printed
    assert "[/red]: means" in printed
