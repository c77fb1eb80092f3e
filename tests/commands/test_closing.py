"""What a finished run tells."""

import json
from pathlib import Path

import pytest

from moa_lightning.commands.closing import tell

SUMMARY = {
    "combiner": "MOPO",
    "steps": 80,
    "seconds": 61.4,
    "tokens_per_second": 250.0,
    "seed": 0,
    "objectives": {
        "good": {"start": 0.5, "end": 0.7, "std_error": 0.03, "start_std_error": 0.04},
        "short": {"start": 0.5, "end": 0.45, "std_error": 0.0, "start_std_error": None},
    },
    "hypervolume": {"start": 0.25, "end": 0.5, "reference": {"good": 0.0, "short": -1.0}},
    "thresholds": {"short": 0.6},
}


def test_numbers_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "front.png").touch()
    tell(tmp_path)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "objective before after change change / s.e. threshold" in lines
    assert "good 0.500 0.700 +0.200 +4.0" in lines  # .2 / sqrt(.03^2 + .04^2)
    assert "short 0.500 0.450 -0.050 - 0.6" in lines
    assert "hypervolume 0.250 -> 0.500 (reference point good 0, short -1)" in lines
    assert "80 steps in 61 s, 250 tokens/s" in lines
    assert f"{tmp_path / 'front.png'} the Pareto front of the run, as a picture" in lines
    assert not [line for line in lines if "metrics.csv" in line]  # it was not written


def test_what_was_not_measured_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell(tmp_path)
    assert capsys.readouterr().out == ""
    bare = {**SUMMARY, "hypervolume": None, "tokens_per_second": None}
    del bare["thresholds"]
    (tmp_path / "summary.json").write_text(json.dumps(bare))
    tell(tmp_path)
    printed = capsys.readouterr().out
    assert "hypervolume" not in printed and "threshold" not in printed and "tokens" not in printed
    assert "80 steps in 61 s\n" in printed


def test_a_folder_and_names_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "[x] [/bold] :smile:"  # two folders
    root.mkdir(parents=True)
    (root / "summary.json").write_text(json.dumps({**SUMMARY, "combiner": "[/red]"}))
    (root / "config.yaml").touch()
    tell(root)
    printed = capsys.readouterr().out
    assert f"{root / 'config.yaml'}  the record" in printed
    assert "[/red]: means" in printed
