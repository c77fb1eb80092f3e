"""The archive of a run's evaluations: who is on the front, how much it covers, and what is written about it."""

import csv
import math

import matplotlib.image
import pytest
import torch
from lightning.pytorch import Callback

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
