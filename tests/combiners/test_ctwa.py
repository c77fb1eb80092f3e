import math

import pytest
import torch

from moa_lightning.combiners import CTWA
from moa_lightning.functional import group_covariance
from tests.combiners import scored


def test_the_covariance_against_a_plain_loop():
    scores_BN, group_B = scored.draw()
    signal_B = torch.randn(12, generator=torch.Generator().manual_seed(1))
    valid_BN = torch.ones(12, 3, dtype=torch.bool)
    valid_BN[1, 0] = valid_BN[4, 2] = valid_BN[5, 2] = valid_BN[6, 2] = False
    covariance_GN, known_GN = group_covariance(scores_BN.where(valid_BN, torch.nan), signal_B, valid_BN, group_B)
    for prompt in range(3):
        for i in range(3):
            rows = (group_B == prompt) & valid_BN[:, i]
            assert known_GN[prompt, i] == (rows.sum() > 1)
            if known_GN[prompt, i]:
                expected = torch.cov(torch.stack([scores_BN[rows, i], signal_B[rows]]), correction=0)[0, 1]
                torch.testing.assert_close(covariance_GN[prompt, i], expected)
            else:
                assert covariance_GN[prompt, i] == 0


def test_the_step_of_the_weights():
    # Two responses: the advantages are -1 and 1 whatever the weights, so the covariances are half the differences.
    first, second = (torch.tensor([[0.0, 0.0], difference]) for difference in ([1.0, -0.5], [3.0, 0.5]))
    combiner, group_B = CTWA({"a": 0.1, "b": 0.2}, lr=2.0, tau=0.1, weights={"a": 3.0, "b": 1.0}), torch.tensor([0, 0])
    state = combiner.init(("a", "b"), torch.ones(2))
    state = combiner.observe(scored.experience(first, group_B), state)
    torch.testing.assert_close(state["covariances"], torch.tensor([0.5, -0.25]))  # the first batch is the average
    odds = math.exp(2.0 * (0.2 + 0.25)) / 3
    torch.testing.assert_close(state["weights"], torch.tensor([1.0, odds]) / (1 + odds))
    state = combiner.observe(scored.experience(second, group_B), state)
    torch.testing.assert_close(state["covariances"], torch.tensor([0.9 * 0.5 + 0.1 * 1.5, 0.9 * -0.25 + 0.1 * 0.25]))
    odds *= math.exp(2.0 * (0.2 + 0.2))
    torch.testing.assert_close(state["weights"], torch.tensor([1.0, odds]) / (1 + odds))
    torch.testing.assert_close(state["log_weights"].exp(), state["weights"])
    assert combiner.report(state)["covariances"] is state["covariances"]


def test_an_objective_that_is_outvoted_is_heard_in_the_end():
    generator = torch.Generator().manual_seed(0)
    wanted_B = torch.randn(64, generator=generator)
    against_B = -0.5 * wanted_B + 0.3 * torch.randn(64, generator=generator)
    rows = scored.experience(torch.stack([wanted_B, against_B], 1), torch.arange(8).repeat_interleave(8))
    combiner = CTWA({"b": 0.05}, lr=1.0, tau=0.5)
    state, _ = scored.run(combiner, rows)
    assert state["covariances"][1] < 0
    state, combined = scored.run(combiner, rows, steps=200)
    assert state["covariances"][1] > 0.04
    assert combined.mean_weights()[1] > 0.55
    # At its target, it gains nothing more.
    later, _ = scored.run(combiner, rows, steps=400)
    torch.testing.assert_close(later["weights"], state["weights"], rtol=0.02, atol=0)


def test_targets_that_are_met_or_not_named_leave_the_weights():
    rows = scored.experience(*scored.draw())
    for targets in (-10.0, {}):
        state, _ = scored.run(CTWA(targets, weights={"a": 2.0, "b": 1.0, "c": 1.0}), rows, steps=5)
        torch.testing.assert_close(state["weights"], torch.tensor([0.5, 0.25, 0.25]))


def test_batches_without_an_objective_do_not_count():
    scores_BN, group_B = scored.draw()
    missing_BN = scores_BN.clone()
    missing_BN[:, 1] = torch.nan
    combiner = CTWA(5.0)
    state, _ = scored.run(combiner, scored.experience(missing_BN, group_B))
    assert state["covariances"].isnan().tolist() == [False, True, False]
    state = combiner.observe(scored.experience(scores_BN, group_B), state)
    known = float(state["covariances"][1])
    state = combiner.observe(scored.experience(missing_BN, group_B), state)
    assert float(state["covariances"][1]) == known


def test_resumed_weights_are_the_learnt_ones():
    rows = scored.experience(*scored.draw())
    state, combined = scored.run(CTWA(2.0), rows, steps=3)
    other = CTWA(1.0)
    resumed = other.resume(state, other.init(("a", "b", "c"), torch.ones(3)))
    assert resumed["targets"].tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(other.combine(rows, resumed).score, combined.score)


def test_bad_input_is_refused():
    for made, says in ((CTWA({"x": 1.0}), "names 'x', .* they are a, b"), (CTWA(math.nan), "finite number, got nan")):
        with pytest.raises(ValueError, match=says) as caught:
            made.init(["a", "b"], torch.ones(2))
        assert "\n" not in str(caught.value)
    for settings in ({"lr": 0.0}, {"lr": math.inf}, {"tau": 0.0}, {"tau": 1.1}):
        with pytest.raises(ValueError, match="CTWA needs a finite lr > 0 and tau in"):
            CTWA(**settings)
