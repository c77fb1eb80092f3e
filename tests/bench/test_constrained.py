"""The table of constrained training says what is in the run folders, and trains only what is not there."""

import json
import math

import pytest
from matplotlib.figure import Figure

from bench import constrained

POINTS = [(0, 0.1), (60, 0.7), (120, 0.52), (180, 0.3), (240, 0.51)]  # the fourth is below its interval


def write_run(folder, sentiment, informative, steps=240, duals=(9.0, 9.0, 9.0, 1.0)):
    folder.mkdir(parents=True)
    (folder / "policy").mkdir()
    (folder / "policy" / "config.json").write_text("{}")
    ends = {"sentiment": sentiment, "informative": informative}
    objectives = {name: {"end": end, "std_error": 0.01} for name, end in ends.items()}
    (folder / "summary.json").write_text(json.dumps({"steps": steps, "objectives": objectives}))
    lines = [f"{step},{sentiment},{value},.01,.01" for step, value in POINTS]
    header = "step,sentiment,informative,sentiment_std_error,informative_std_error"
    (folder / "front.csv").write_text("\n".join([header, *lines]) + "\n")
    lines = [f"{step},{dual}" for step, dual in enumerate(duals)]
    (folder / "metrics.csv").write_text("\n".join(["step,duals/informative", *lines, "5,"]) + "\n")
    return folder


def ended(method, primary, value, interval=0.02):
    return constrained.Ended(method, 0, primary, value, interval, 1.0, 1.0, 2.0)


def test_what_a_folder_says(tmp_path):
    run = constrained.read(write_run(tmp_path / "run", 0.6, 0.51, duals=(9, 9, 9, 9, 9, 9, 1, 2)), "lagrangian", 3)
    assert (run.primary, run.value, run.interval) == (0.6, 0.51, pytest.approx(0.0196))
    assert run.held == 0.5  # of the last two of four evaluations
    assert (run.dual_low, run.dual_high) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("value", "settled"), [(0.47, False), (0.481, True), (0.5, True), (0.55, True), (0.551, False), (0.7, False)]
)
def test_settled_is_near_on_the_feasible_side_or_within_the_interval(value, settled):
    assert ended("lagrangian", 0.6, value).settled is settled


def test_the_price_is_below_the_best_fixed_weight_that_meets_the_threshold():
    fixed = [ended("linear-0.4", 0.9, 0.1), ended("linear-0.5", 0.5, 0.6), ended("linear-0.6", 0.4, 0.8)]
    assert constrained.best_fixed(fixed) == ("linear-0.5", 0.5)
    assert math.isnan(constrained.best_fixed(fixed[:1])[1])
    told = constrained.table([ended("lagrangian", 0.62, 0.51), *fixed])
    assert "lagrangian: sentiment 0.620, informative 0.510, settled 1 of 1, price -0.120" in told


def test_only_what_is_not_complete_is_trained(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "lagrangian" / "seed-0", 0.6, 0.51)
    write_run(tmp_path / "linear-0.5" / "seed-0", 0.5, 0.7)
    write_run(tmp_path / "lagrangian" / "seed-1", 0.6, 0.9, steps=100)  # interrupted
    trained = []

    def train(folder, method, seed, steps):
        trained.append((method, seed, steps))
        if not folder.exists():
            write_run(folder, 0.4, 0.8)

    monkeypatch.setattr(constrained, "train", train)
    constrained.main(
        ["--methods", "lagrangian", "linear-0.5", "--seeds", "0", "1", "--steps", "240", "--keep", str(tmp_path)]
    )
    assert trained == [("lagrangian", 1, 240), ("linear-0.5", 1, 240)]
    assert "best fixed weight that meets 0.5: linear-0.5, sentiment 0.450" in capsys.readouterr().out
    assert len((tmp_path / "constrained.csv").read_text().splitlines()) == 5
    assert (tmp_path / "constrained.png").stat().st_size > 1000


@pytest.mark.parametrize(("methods", "panels"), [(("lagrangian", "linear-0.5"), 5), (("linear-0.4", "linear-0.5"), 4)])
def test_a_fixed_weight_has_no_panel_for_a_multiplier(tmp_path, monkeypatch, methods, panels):
    folders = []
    for method in methods:
        duals = () if method.startswith(constrained.FIXED) else (1.0, 2.0)
        folders.append((method, 0, write_run(tmp_path / method, 0.6, 0.51, duals=duals)))
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: drawn.append(self))
    constrained.draw(folders, tmp_path / "curves.png")
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert len(titles) == panels
    assert all(axes.lines for axes in drawn[0].axes)
    assert not any("linear" in title and "multiplier" in title for title in titles)


def test_a_method_that_there_is_not_is_named_at_once(tmp_path):
    with pytest.raises(ValueError, match="there is no method 'magic'; there are lagrangian"):
        constrained.main(["--methods", "magic", "--keep", str(tmp_path)])
    assert constrained.flags("linear-0.4")[1] == "--model.combiner.weights={sentiment: 0.6, informative: 0.4}"
