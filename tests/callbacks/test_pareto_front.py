"""The archive of a run's evaluations: who is on the front, how much it covers, and what is written about it."""

import csv
import math

import matplotlib.image
import pytest
import torch
from lightning.pytorch import Callback
from matplotlib.figure import Figure

from moa_lightning.callbacks import ParetoFront
from tests.callbacks.scripted import Scripted, around, evaluation, trainer

MEANS = [(1.0, 1.0), (3.0, 0.5), (2.0, 2.0), (1.0, 2.0)]
ORIGIN = {"good": 0.0, "short": 0.0}


class Snapshots(Callback):
    """``front.csv`` and ``front.png`` as they lie there after each evaluation."""

    def __init__(self):
        self.tables, self.pictures = [], []

    def on_validation_end(self, trainer, pl_module):
        root = trainer.default_root_dir
        with open(f"{root}/front.csv", newline="", encoding="utf-8") as file:
            self.tables.append(list(csv.DictReader(file)))
        self.pictures.append(matplotlib.image.imread(f"{root}/front.png"))


def script(means=MEANS, names=("good", "short"), unwatched=()):
    return Scripted([evaluation(around(*point), names, unwatched) for point in means])


def rows_of(folder):
    with (folder / "front.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def flags(table):
    return [int(row["non_dominated"]) for row in table]


def test_the_files_after_each_evaluation(tmp_path):
    """(2, 2) dominates (1, 1) and, weakly, (1, 2); with (3, 0.5) it covers 2 * 2 + 1 * 0.5."""
    front, seen = ParetoFront(dict(ORIGIN)), Snapshots()
    trainer(tmp_path, front, seen).fit(script())
    assert [flags(table) for table in seen.tables] == [[1], [1, 1], [0, 1, 1], [0, 1, 1, 0]]
    last = seen.tables[-1]
    assert [int(row["step"]) for row in last] == [0, 1, 2, 3]  # the sanity check is the point before training
    assert [(float(row["good"]), float(row["short"])) for row in last] == MEANS
    for row in last:  # four responses of standard deviation 1 / sqrt(3)
        assert float(row["good_std_error"]) == pytest.approx(1 / math.sqrt(3) / 2)
    assert [front.hypervolume(n) for n in (1, 2, 3, 4)] == [1.0, 2.0, 4.5, 4.5]
    assert front.hypervolume() == 4.5
    pictures = seen.pictures
    assert len({picture.tobytes() for picture in pictures}) == 4
    assert all(picture.shape == pictures[0].shape for picture in pictures)
    assert not list(tmp_path.glob(".front*"))


@pytest.mark.parametrize(("names", "panels"), [(["a"], 1), (["a", "b"], 1), (["a", "b", "c"], 3), ([*"abcd"], 6)])
def test_a_panel_for_each_pair(tmp_path, names, panels):
    front, seen = ParetoFront(), Snapshots()
    trainer(tmp_path, front, seen, max_steps=1).fit(script([[0.0] * len(names), [1.0] * len(names)], names))
    height, width = seen.pictures[-1].shape[:2]
    columns, rows = min(panels, 3), math.ceil(panels / 3)
    assert (width, height) == pytest.approx((768 * columns, 576 * rows), abs=2)
    # One standard deviation below the start, in each objective: the end covers more than the start by 1 a side.
    spread = 1 / math.sqrt(3)
    assert list(front.reference.values()) == pytest.approx([-spread] * len(names))
    assert front.hypervolume(1) == pytest.approx(spread ** len(names))
    assert front.hypervolume() == pytest.approx((1 + spread) ** len(names))


def test_the_metrics_that_are_logged(tmp_path):
    running = trainer(tmp_path, ParetoFront(dict(ORIGIN)))
    running.fit(script())
    assert float(running.callback_metrics["pareto/hypervolume"]) == pytest.approx(4.5)
    assert float(running.callback_metrics["pareto/size"]) == 2


def test_the_archive_goes_on_in_a_resumed_run(tmp_path):
    first = trainer(tmp_path, ParetoFront(), max_steps=1)
    first.fit(script(MEANS[:2]))
    first.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["ParetoFront"]
    assert [point["step"] for point in saved["points"]] == [0, 1]

    front, seen = ParetoFront(), Snapshots()
    trainer(tmp_path, front, seen, max_steps=3).fit(
        script(MEANS[2:]), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert flags(seen.tables[-1]) == [0, 1, 1, 0]
    assert [(float(row["good"]), float(row["short"])) for row in seen.tables[-1]] == MEANS
    assert front.reference == saved["reference"]
    spread = 1 / math.sqrt(3)
    assert front.hypervolume(1) == pytest.approx(spread**2)  # still measured from below the very first evaluation


def test_a_reference_given_at_resume_replaces_the_saved_one(tmp_path):
    front = ParetoFront(dict(ORIGIN))
    front.load_state_dict({"points": [], "reference": {"good": -5.0, "short": -5.0}})
    assert front.reference == ORIGIN


def test_evaluating_the_last_step_again_is_one_point(tmp_path):
    front = ParetoFront(dict(ORIGIN))
    running = trainer(tmp_path, front, max_steps=1)
    moa = script([(1.0, 1.0), (2.0, 2.0), (2.0, 2.5)])
    running.fit(moa)
    running.validate(moa, verbose=False)
    assert [point["step"] for point in front.points] == [0, 1]
    assert front.points[-1]["mean"] == {"good": 2.0, "short": 2.5}


def test_missing_scores_and_watched_objectives(tmp_path):
    """A row without a score is left out of its mean; an evaluation without any is no point; watchers have no axis."""
    first, second = around(1.0, 1.0, 9.0), around(2.0, 2.0, 9.0)
    first[0, 0] = torch.nan  # 0.5, 1.5 and 0.5 are left
    second[:, 1] = torch.nan
    names = ("good", "short", "watched")
    front = ParetoFront(dict(ORIGIN))
    with pytest.warns(UserWarning, match="no response was scored by short: this evaluation is not on the Pareto front"):
        trainer(tmp_path, front, max_steps=1).fit(
            Scripted([evaluation(raw_BN, names, ["watched"]) for raw_BN in (first, second)])
        )
    assert [point["mean"] for point in front.points] == [{"good": pytest.approx(2.5 / 3), "short": 1.0}]
    assert front.points[0]["std_error"]["good"] == pytest.approx(1 / 3)


def test_a_reference_of_other_objectives_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must name each trained objective once: good, short; got good, lenght"):
        trainer(tmp_path, ParetoFront({"good": 0.0, "lenght": 0.0})).fit(script())


# Costs: what is compared is the value, and the raw score stands beside it.

COSTS = [around(1.0, 1.0), around(2.0, 3.0), around(3.0, 0.5)]  # the second costs most, the third dominates all
SCALES = [1.0, -1.0]


def as_cost(points=COSTS):
    return Scripted([evaluation(raw_BN, scales=SCALES) for raw_BN in points])


def test_a_cost_gives_the_same_front_as_its_negative(tmp_path):
    as_reward = Scripted([evaluation(raw_BN * torch.tensor(SCALES)) for raw_BN in COSTS])
    fronts, tables = [], []
    for name, moa in (("cost", as_cost()), ("reward", as_reward)):
        fronts.append(ParetoFront())
        trainer(tmp_path / name, fronts[-1], max_steps=2).fit(moa)
        tables.append(rows_of(tmp_path / name))
    assert fronts[0].reference == fronts[1].reference
    assert fronts[0].hypervolume() == fronts[1].hypervolume() > fronts[0].hypervolume(2) > 0
    assert flags(tables[0]) == [0, 0, 1]
    assert [{key: row[key] for key in tables[1][0]} for row in tables[0]] == tables[1]
    assert [(row["short"], row["short_raw"], row["short_raw_std_error"]) for row in tables[0]] == [
        (row["short"], row["short"].removeprefix("-"), row["short_std_error"]) for row in tables[1]
    ]
    assert not [key for key in tables[1][0] if "raw" in key]  # nothing is doubled where value and raw score are one


def test_the_axes_say_that_a_value_is_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure",
        lambda **options: drawn.append(Figure(**options)) or drawn[-1],
    )
    trainer(tmp_path, ParetoFront(), max_steps=1).fit(as_cost())
    axes = drawn[-1].axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("good (mean reward)", "short (value, -1 x raw)")
    assert axes.lines[0].get_xydata().tolist() == [[1.0, -1.0], [2.0, -3.0]]


@pytest.mark.parametrize("given", [None, dict(ORIGIN)])
def test_points_of_raw_scores_in_an_old_checkpoint_are_not_mixed_with_values(tmp_path, given):
    """Old checkpoints hold raw means; with a scale these are no points of this run's front."""
    front = ParetoFront(given)
    old = [{"step": 7, "mean": {"good": 9.0, "short": 9.0}, "std_error": {"good": 0.1, "short": 0.1}}]
    front.load_state_dict({"points": old, "reference": {"good": -5.0, "short": -5.0}})
    with pytest.warns(UserWarning, match=r"in other units \(short = raw\) than this run \(short = -1 x raw\)"):
        trainer(tmp_path, front, max_steps=1).fit(as_cost())
    assert [point["step"] for point in front.points] == [0, 1]
    assert front.reference == given or front.reference["short"] == pytest.approx(-1 - 1 / math.sqrt(3))
    front = ParetoFront(given)
    front.load_state_dict({"points": old, "reference": {"good": -5.0, "short": -5.0}})
    trainer(tmp_path, front, max_steps=1).fit(script())  # without a scale they are values
    assert [point["step"] for point in front.points] == [7, 0, 1]
