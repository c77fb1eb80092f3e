"""What every combiner of whole responses' scores does: it gives advantages, whatever the rows it is handed."""

import dataclasses
import inspect

import pytest
import torch

import moa_lightning.combiners as package
from moa_lightning.combiners import ScoreCombiner
from tests.combiners import scored

CLASSES = [c for _, c in inspect.getmembers(package, inspect.isclass) if issubclass(c, ScoreCombiner)]
COMBINERS = [c for c in CLASSES if not inspect.isabstract(c)]
every_combiner = pytest.mark.parametrize("combiner", [pytest.param(c(), id=c.__name__) for c in COMBINERS])


@every_combiner
def test_scores_are_advantages(combiner):
    rows = scored.experience(*scored.draw())
    score_B = scored.run(combiner, rows)[1].score
    assert score_B.shape == (12,)  # one number for each response: none of its tokens has a score of its own
    torch.testing.assert_close(score_B.view(3, 4).mean(1), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(score_B.square().mean(), torch.tensor(1.0))


@every_combiner
def test_the_unit_does_not_matter_where_all_objectives_share_it(combiner):
    scores_BN, group_B = scored.draw()
    score_B = scored.run(combiner, scored.experience(scores_BN, group_B))[1].score
    for scale in (1e-10, 1e15):
        in_units = {"mu": scale, "targets": scale, "lr": 1 / scale}  # what a combiner has in the scores' units
        scaled = dataclasses.replace(
            combiner, **{name: getattr(combiner, name) * s for name, s in in_units.items() if name in vars(combiner)}
        )
        other_B = scored.run(scaled, scored.experience(scores_BN * scale, group_B))[1].score
        torch.testing.assert_close(other_B, score_B, rtol=1e-4, atol=1e-5)


@every_combiner
def test_a_constant_for_a_prompt_changes_nothing(combiner):
    scores_BN, group_B = scored.draw(objectives=1)
    offset_B = torch.tensor([0.0, -3.0, 40.0])[group_B]
    score_B = scored.run(combiner, scored.experience(scores_BN, group_B))[1].score
    other_B = scored.run(combiner, scored.experience(scores_BN + offset_B.unsqueeze(1), group_B))[1].score
    torch.testing.assert_close(other_B, score_B, rtol=1e-4, atol=1e-5)


@every_combiner
def test_one_objective_alone_keeps_the_order_of_the_responses(combiner):
    scores_BN, group_B = scored.draw(objectives=1)
    score_B = scored.run(combiner, scored.experience(scores_BN, group_B))[1].score
    assert torch.equal(score_B.view(3, 4).argsort(1), scores_BN.view(3, 4).argsort(1))


@every_combiner
def test_an_objective_of_weight_0_does_not_exist(combiner):
    scores_BN, group_B = scored.draw()
    ignoring = dataclasses.replace(combiner, weights={"a": 1.0, "b": 3.0, "c": 0.0})
    without = dataclasses.replace(combiner, weights={"a": 1.0, "b": 3.0})
    ignored = scored.run(ignoring, scored.experience(scores_BN, group_B))[1]
    alone = scored.run(without, scored.experience(scores_BN[:, :2], group_B))[1]
    torch.testing.assert_close(ignored.score, alone.score)
    torch.testing.assert_close(ignored.mean_weights(), torch.cat([alone.mean_weights(), torch.zeros(1)]))


@every_combiner
def test_rows_that_do_not_count_change_no_other(combiner):
    scores_BN, group_B = scored.draw()
    nobody_BN = torch.full((2, 3), torch.nan)
    more_BN, groups_B = torch.cat([scores_BN, nobody_BN, nobody_BN.new_full((1, 3), 1e6)]), torch.tensor([0, 3, 1])
    mask_B = torch.arange(15) < 14  # the last one was cut off and is left out
    rows = scored.experience(more_BN, torch.cat([group_B, groups_B]), mask_B)
    combined, plain = scored.run(combiner, rows)[1], scored.run(combiner, scored.experience(scores_BN, group_B))[1]
    torch.testing.assert_close(combined.score, torch.cat([plain.score, torch.zeros(3)]))
    torch.testing.assert_close(combined.mean_weights(), plain.mean_weights())


@every_combiner
def test_a_missing_score_changes_no_other_prompt(combiner):
    scores_BN, group_B = scored.draw()
    missing_BN = scores_BN.clone()
    missing_BN[1, 0] = missing_BN[2, 1] = torch.nan
    score_B = scored.run(combiner, scored.experience(missing_BN, group_B))[1].score
    assert torch.isfinite(score_B).all()
    # All but the scale of the batch, which is one number.
    whole_B = scored.run(combiner, scored.experience(scores_BN, group_B))[1].score[4:]
    torch.testing.assert_close(score_B[4:] / score_B[4:].norm(), whole_B / whole_B.norm())


@every_combiner
def test_minibatches_get_the_scores_of_the_whole(combiner):
    rows = scored.experience(*scored.draw(prompts=4))
    state, combined = scored.run(combiner, rows)
    for part in (torch.arange(8), torch.arange(8, 16).flip(0)):
        score_B = combiner.combine(rows.select(part), state).score
        torch.testing.assert_close(score_B, combined.score[part])


@every_combiner
def test_nothing_to_tell_apart_is_no_error(combiner):
    scores_BN, group_B = scored.draw()
    for same_BN in (torch.full_like(scores_BN, 0.1), torch.full_like(scores_BN, torch.nan), scores_BN[::4][group_B]):
        combined = scored.run(combiner, scored.experience(same_BN, group_B))[1]
        assert torch.equal(combined.score, torch.zeros(12))
        torch.testing.assert_close(combined.mean_weights().sum(), torch.tensor(1.0))


@every_combiner
def test_penalties_and_the_kl_charge_count(combiner):
    scores_BN, group_B = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    cut_B, far_B = torch.tensor([0.0, 0.5, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 0.3])
    for more in ({"penalty_B": cut_B}, {"kl_penalty_B": far_B}):
        score_B = scored.run(combiner, scored.experience(scores_BN, group_B, **more))[1].score
        expected_B = -next(iter(more.values()))
        expected_B = expected_B - expected_B.mean()
        torch.testing.assert_close(score_B, expected_B / expected_B.square().mean().sqrt())


@every_combiner
def test_a_saved_state_goes_on_with_the_weights_of_the_configuration(combiner):
    rows = scored.experience(*scored.draw())
    state, combined = scored.run(combiner, rows)
    fresh = combiner.init(("a", "b", "c"), torch.tensor([1.0, 1.0, 2.0]))
    resumed = combiner.resume(state, fresh)
    if "log_weights" not in state:  # weights that are learnt go on
        assert torch.equal(resumed["weights"], torch.tensor([0.25, 0.25, 0.5]))
    assert all(torch.equal(resumed[name], state[name]) for name in state if name != "weights")
    again = combiner.resume(state, combiner.init(("a", "b", "c"), torch.ones(3)))
    assert torch.equal(combiner.combine(rows, again).score, combined.score)
