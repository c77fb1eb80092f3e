"""How thresholds held, how far multipliers moved, and which checkpoint is the best."""

import json
import math

import pytest
import torch

from moa_lightning.callbacks import Constraints, RunFiles
from moa_lightning.signals import Signal
from tests.callbacks.scripted import Equal, Scripted, around, evaluation, experience, trainer

# Standard errors are .289, so a mean is within its interval of the threshold 1 from .434 on.
BEFORE = (9.0, 9.0)
MEANS = [(3.0, 0.3), (4.0, 0.6), (1.0, 1.2), (2.0, 1.1), (5.0, 0.2), (9.0, 0.9)]


class Constrained(Equal):
    primary = "good"
    needs = frozenset({Signal.ADVANTAGES})


class Moving(Scripted):
    """The multiplier is the number of updates, so 0, 1, ..., while there is a threshold."""

    evaluated_in_wins = frozenset()

    def __init__(self, means=MEANS, thresholds=(torch.nan, 1.0)):
        super().__init__(
            [evaluation(around(*point)) for point in (BEFORE, *means)], [experience(around(0.0, 0.0)) for _ in means]
        )
        self.combiner = Constrained()
        self.thresholds = thresholds
        self.remember(0.0)

    def remember(self, dual):
        self.combiner_state = {
            "duals": torch.tensor([torch.nan, dual]),
            "thresholds": torch.tensor(self.thresholds),
        }

    def training_step(self, batch, batch_idx):
        self.remember(float(self.global_step))
        return super().training_step(batch, batch_idx)


def run(folder, module, *callbacks, **options):
    constraints = Constraints()
    trainer(folder, constraints, *callbacks, max_steps=len(module.evaluations) - 1, **options).fit(module)
    return constraints


def saved_step(folder):
    return torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["global_step"]


def test_shares_ranges_and_the_best_of_a_run(tmp_path):
    found = run(tmp_path, Moving(), enable_checkpointing=True).report()
    assert found["thresholds_held"] == {"short": 2 / 3}  # of the last three the second is short of its interval
    assert found["thresholds_held_of"] == 3
    assert found["duals_range"] == {"short": [4.0, 5.0]}  # of six batches the last two
    # The evaluation before training does not count, and a higher primary mean without the threshold neither.
    assert found["best"]["step"] == 4
    assert found["best"]["feasible"]
    assert found["best"]["means"] == pytest.approx({"good": 2.0, "short": 1.1})
    assert saved_step(tmp_path) == 4


def test_where_no_evaluation_is_feasible_the_nearest_is_the_best(tmp_path):
    found = run(tmp_path, Moving(thresholds=(torch.nan, 2.0)), enable_checkpointing=True).report()
    assert (found["best"]["step"], found["best"]["feasible"]) == (3, False)
    assert found["best"]["violation"] == pytest.approx(0.8 * math.sqrt(3))  # in standard deviations of the responses
    assert saved_step(tmp_path) == 3


def test_an_evaluation_in_which_a_threshold_has_no_score_is_not_ranked(tmp_path):
    module = Moving(means=[(2.0, 1.1), (9.0, 0.0), (1.0, 1.2)], thresholds=(-5.0, 1.0))
    module.evaluations[2].rewards.value_BN[:, 1] = torch.nan
    assert run(tmp_path, module).report()["best"]["step"] == 1
    # Where the last evaluation lacks a score, the other threshold alone is feasible there: it is not ranked either.
    module = Moving(means=[(2.0, 0.0), (9.0, 0.0)], thresholds=(-5.0, 1.0))
    module.evaluations[2].rewards.value_BN[:, 1] = torch.nan
    found = run(tmp_path, module).report()
    assert (found["best"]["step"], found["best"]["feasible"]) == (1, False)
    assert found["thresholds_held"] == {"good": 1.0}


def test_without_thresholds_nothing_is_kept(tmp_path):
    module = Moving(thresholds=(torch.nan, torch.nan))
    assert run(tmp_path, module, enable_checkpointing=True).report() == {}
    assert not (tmp_path / "checkpoints" / "best.ckpt").exists()


def test_a_threshold_in_another_unit_than_its_evaluations_is_left_out(tmp_path):
    module = Moving()
    module.combiner.needs = frozenset({Signal.WINS})
    assert run(tmp_path / "none", module).report() == {}
    # The primary objective needs no fixed rivals: only thresholds are compared with evaluations.
    module = Moving()
    module.combiner.needs, module.evaluated_in_wins = frozenset({Signal.WINS}), frozenset({"short"})
    found = run(tmp_path / "short", module, RunFiles(save_policy=False)).report()
    assert (found["best"]["step"], found["thresholds_held"]) == (4, {"short": 2 / 3})
    summary = json.loads((tmp_path / "short" / "summary.json").read_text())
    assert (summary["thresholds"], "training_thresholds" in summary) == ({"short": 1.0}, False)
    # Of two thresholds, one whose evaluations are in another unit.
    module = Moving(thresholds=(20.0, 1.0))
    module.combiner.needs, module.evaluated_in_wins = frozenset({Signal.WINS}), frozenset({"short"})
    found = run(tmp_path / "both", module, RunFiles(save_policy=False)).report()
    assert (found["best"]["thresholds"], found["best"]["feasible"]) == ({"short": 1.0}, True)
    summary = json.loads((tmp_path / "both" / "summary.json").read_text())
    assert (summary["thresholds"], summary["training_thresholds"]) == ({"short": 1.0}, {"good": 20.0})


def test_save_best_can_be_left_out(tmp_path):
    module, constraints = Moving(), Constraints(save_best=False)
    trainer(tmp_path, constraints, max_steps=6, enable_checkpointing=True).fit(module)
    assert constraints.report()["best"]["step"] == 4
    assert not (tmp_path / "checkpoints" / "best.ckpt").exists()


def test_a_resumed_run_remembers(tmp_path):
    whole = run(tmp_path, Moving())
    resumed = Constraints()
    resumed.load_state_dict(whole.state_dict())
    assert resumed.report() == whole.report()
    module = Moving(means=[(2.5, 0.99), (1.5, 1.5)])  # neither is better
    trainer(tmp_path, resumed, max_steps=2, enable_checkpointing=True).fit(module)
    assert resumed.report()["best"] == whole.report()["best"]
    assert not (tmp_path / "checkpoints" / "best.ckpt").exists()


def resumed_with(folder, state, module):
    constraints = Constraints()
    constraints.load_state_dict(state)
    trainer(folder, constraints, max_steps=len(module.evaluations) - 1, enable_checkpointing=True).fit(module)
    return constraints.report()["best"]


def test_a_resumed_run_judges_the_best_by_its_own_thresholds(tmp_path):
    state = run(tmp_path, Moving()).state_dict()
    # Step 4, (2, 1.1), misses 1.15: a feasible evaluation is better, whatever its primary mean.
    best = resumed_with(tmp_path / "higher", state, Moving([(0.5, 1.2)], (torch.nan, 1.15)))
    assert (best["step"], best["feasible"], best["thresholds"]["short"]) == (1, True, pytest.approx(1.15))
    assert saved_step(tmp_path / "higher") == 1
    best = resumed_with(tmp_path / "nothing_better", state, Moving([(9.0, 0.0)], (torch.nan, 1.15)))
    assert (best["step"], best["feasible"]) == (4, False)
    assert best["violation"] == pytest.approx(0.05 * math.sqrt(3))
    assert best["std_errors"] == pytest.approx({"good": math.sqrt(1 / 12), "short": math.sqrt(1 / 12)})
    # A threshold on what had none is judged by its mean then.
    best = resumed_with(tmp_path / "other", state, Moving([(2.5, 9.0)], (2.4, torch.nan)))
    assert (best["step"], best["feasible"]) == (1, True)


def test_adaptive_thresholds_judge_the_best_anew(tmp_path):
    class Rising(Moving):
        def remember(self, dual):
            self.thresholds = (torch.nan, 1.0 if dual < 1 else 1.5)
            super().remember(dual)

    best = run(tmp_path, Rising([(9.0, 1.1), (1.0, 1.6)])).report()["best"]
    assert (best["step"], best["feasible"]) == (2, True)


def test_a_best_of_an_old_checkpoint_or_without_its_means_is_dropped(tmp_path):
    state = run(tmp_path, Moving()).state_dict()
    old = state | {"best": {n: v for n, v in state["best"].items() if n != "thresholds"}}
    without = state | {"best": state["best"] | {"means": {"good": 9.0}}}
    for name, lacking in (("old", old), ("without", without)):
        assert resumed_with(tmp_path / name, lacking, Moving([(0.0, 1.0)]))["step"] == 1
        assert saved_step(tmp_path / name) == 1


def test_a_run_resumed_without_thresholds_forgets_them(tmp_path):
    resumed = Constraints()
    resumed.load_state_dict(run(tmp_path, Moving()).state_dict())
    module = Moving(means=[(1.0, 1.0)], thresholds=(torch.nan, torch.nan))
    trainer(tmp_path, resumed, max_steps=1).fit(module)
    assert resumed.report() == {}


def saved(folder, module, **options):
    """A checkpoint after all of a module's evaluations."""
    running = trainer(folder, Constraints(**options), max_steps=len(module.evaluations) - 1)
    running.fit(module)
    running.save_checkpoint(folder / "half.ckpt")
    return folder / "half.ckpt"


def continued(folder, checkpoint, module):
    constraints, done = Constraints(), torch.load(checkpoint, weights_only=True)["global_step"]
    del module.evaluations[0]  # a resumed run has none before its first step
    running = trainer(folder, constraints, max_steps=done + len(module.evaluations), enable_checkpointing=True)
    running.fit(module, ckpt_path=checkpoint, weights_only=True)
    return constraints.report()


def test_shares_count_afresh_under_other_thresholds(tmp_path):
    checkpoint = saved(tmp_path, Moving())
    more = [(1.0, 1.1), (1.0, 1.1)]
    same = continued(tmp_path / "same", checkpoint, Moving(more))
    assert (same["thresholds_held_of"], same["thresholds_held"]) == (4, {"short": 3 / 4})  # of eight evaluations
    other = continued(tmp_path / "other", checkpoint, Moving(more, (torch.nan, 2.0)))
    assert (other["thresholds_held_of"], other["thresholds_held"]) == (1, {"short": 0.0})
    added = continued(tmp_path / "added", checkpoint, Moving(more, (0.5, 1.0)))
    assert (added["thresholds_held_of"], added["thresholds_held"]) == (1, {"good": 1.0, "short": 1.0})


def test_thresholds_that_adapt_do_not_start_the_shares_afresh(tmp_path):
    """They are those of the checkpoint when a run resumes, and move before its first evaluation."""

    class Adapting(Moving):
        def remember(self, dual):
            self.thresholds = (torch.nan, 1.0 + self.begins_at + dual / 100)
            super().remember(dual)

        begins_at = 0.0

    class Resumed(Adapting):
        begins_at = 0.05  # of the last update before

    checkpoint = saved(tmp_path, Adapting())
    report = continued(tmp_path / "resumed", checkpoint, Resumed([(1.0, 1.5), (1.0, 1.5)]))
    assert report["thresholds_held_of"] == 4


def scaled(scale, means=MEANS):
    """The same raw scores with another unit of the second objective."""
    module = Moving(means)
    raw = [around(*point) for point in (BEFORE, *means)]
    module.evaluations = [evaluation(raw_BN, scales=[1.0, scale]) for raw_BN in raw]
    return module


def test_what_was_measured_in_another_unit_is_forgotten(tmp_path):
    checkpoint = saved(tmp_path, scaled(1.0))
    assert torch.load(checkpoint, weights_only=True)["callbacks"]["Constraints"]["best"]["step"] == 4
    more = [(1.5, 1.1), (1.0, 1.2)]  # feasible, and less good than what the checkpoint has
    assert continued(tmp_path / "same", checkpoint, scaled(1.0, more))["best"]["step"] == 4
    with pytest.warns(
        UserWarning, match="values follow from raw scores in another way .* best evaluation is no longer"
    ):
        report = continued(tmp_path / "scaled", checkpoint, scaled(2.0, more))
    assert (report["best"]["step"], report["thresholds_held_of"]) == (7, 1)
    assert saved_step(tmp_path / "scaled") == 7


def test_it_is_in_the_summary(tmp_path):
    found = run(tmp_path, Moving(), RunFiles(save_policy=False)).report()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: summary[name] for name in found} == found
