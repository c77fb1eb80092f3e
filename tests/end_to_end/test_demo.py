"""The embedded task's claim: PAMA raises both objectives, on every seed, by far more than chance."""

import json
from pathlib import Path

import pytest

from moa_lightning.cli import main

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
STEPS = 30  # the demo takes 80; the effect is there before


@pytest.mark.slow
def test_both_objectives_rise_on_three_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    summaries = []
    for seed in range(3):
        main(["fit", f"--config={CONFIG}", f"--seed_everything={seed}",
              f"--trainer.max_steps={STEPS}", f"--trainer.val_check_interval={STEPS}",
              f"--trainer.default_root_dir=runs/{seed}", "--trainer.enable_progress_bar=false"])  # fmt: skip
        summaries.append(json.loads((tmp_path / "runs" / str(seed) / "summary.json").read_text()))
    assert capsys.readouterr().out.count("warm start: teaching") == 1  # kept for the second and third run
    ends = []
    for name in ("sentiment", "length"):
        for numbers in (summary["objectives"][name] for summary in summaries):
            rise = numbers["end"] - numbers["start"]
            assert rise > 3 * (numbers["std_error"] ** 2 + numbers["start_std_error"] ** 2) ** 0.5, (name, numbers)
        ends.append([summary["objectives"][name]["end"] for summary in summaries])
    assert len({tuple(end) for end in zip(*ends, strict=True)}) == 3, "the seed changes nothing"
    for summary in summaries:
        assert summary["hypervolume"]["end"] > 1.5 * summary["hypervolume"]["start"]
