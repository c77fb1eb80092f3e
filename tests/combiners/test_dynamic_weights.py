import math
from dataclasses import replace

import pytest
import torch

from moa_lightning.combiners import DynamicWeights
from moa_lightning.signals import Signals

NAMES = ("a", "b")
CONFLICT = [[1.0, 0.0], [-0.5, 0.0]]


def given(jacobian):
    jacobian = torch.tensor(jacobian)
    count = len(jacobian)
    return Signals(
        mask_BT=torch.ones(1, 1, dtype=torch.bool),
        valid_BN=torch.ones(1, count, dtype=torch.bool),
        advantages_BTN=torch.tensor([[[1.0, 3.0]]]),
        ratio_BT=torch.ones(1, 1),
        # The steepest slope is taken out before, and multiplied in again behind: here it is the advantages.
        gramian=lambda slopes_BTN: jacobian @ jacobian.T / torch.tensor([1.0, 3.0]).outer(torch.tensor([1.0, 3.0])),
    )


def start(combiner, weights=(1.0, 1.0)):
    return combiner.init(NAMES, torch.tensor(weights))


def test_the_weights_follow_the_gradients():
    """Influences .8 and -.4: see the functional."""
    combiner = DynamicWeights(lr=0.1, interval=1)
    combined = combiner.combine(given(CONFLICT), start(combiner))
    expected_N = torch.tensor([0.08, -0.04]).softmax(0)
    torch.testing.assert_close(combined.mean_weights(), expected_N)
    torch.testing.assert_close(combined.state["log_weights"], expected_N.log())
    torch.testing.assert_close(combined.score, (expected_N @ torch.tensor([1.0, 3.0])).reshape(1, 1))
    again = combiner.combine(given(CONFLICT), combined.state)
    torch.testing.assert_close(again.mean_weights(), torch.tensor([0.16, -0.08]).softmax(0))


def test_a_weight_next_to_nothing_comes_back_and_one_of_0_does_not():
    combiner = DynamicWeights(lr=10.0, interval=1)
    state = start(combiner)
    for _ in range(60):
        state = combiner.combine(given(CONFLICT), state).state
    assert state["log_weights"].exp()[1] == 0
    assert state["log_weights"].isfinite().all()
    for _ in range(61):
        state = combiner.combine(given([[-0.5, 0.0], [1.0, 0.0]]), state).state
    assert state["log_weights"].exp()[1] > 0.5
    none = combiner.combine(given(CONFLICT[::-1]), start(combiner, (1.0, 0.0)))
    assert none.mean_weights().tolist() == [1.0, 0.0]


def test_between_two_looks_the_weights_stay_and_no_gradients_are_asked_for():
    combiner = DynamicWeights(lr=0.1, interval=3)
    combined = combiner.combine(given(CONFLICT), start(combiner))
    weights_N, bare = combined.mean_weights(), replace(given(CONFLICT), gramian=None)
    for _ in range(2):
        combined = combiner.combine(bare, combined.state)
        torch.testing.assert_close(combined.mean_weights(), weights_N)
    combined = combiner.combine(given(CONFLICT), combined.state)
    torch.testing.assert_close(combined.mean_weights(), torch.tensor([0.16, -0.08]).softmax(0))


def test_without_a_step_it_is_the_weighted_sum_and_asks_for_no_gradients():
    combiner = DynamicWeights(lr=0.0, weights={"a": 3.0, "b": 1.0})
    bare = replace(given(CONFLICT), gramian=None)
    combined = combiner.combine(bare, start(combiner))
    assert combined.score.item() == 1.5
    assert combined.mean_weights().tolist() == [0.75, 0.25]


def test_the_front_strengthens_and_weakens_updates():
    combiner = DynamicWeights(lr=0.0, growth_scale=0.5, reference={"a": 0.0, "b": 0.0})
    factors, state = [], start(combiner)
    for values in ([1.0, 1.0], [2.0, 1.0], [1.5, 0.5], [1.0, 2.0], [torch.nan, 5.0]):
        state = combiner.observe_evaluation(torch.tensor(values), state)
        factors.append(float(state["factor"]))
        assert combiner.combine(given(CONFLICT), state).score.item() == pytest.approx(2.0 * factors[-1])
    # Nothing to compare with; hypervolume 1 -> 2; dominated; 2 -> 3; unknown: the factor stays.
    grown = 0.5 + 1.5 * math.tanh(2.0)
    assert factors == pytest.approx([1.0, grown, 0.5, grown, grown])
    assert state["front"].tolist() == [[1.0, 2.0], [2.0, 1.0]]
    assert combiner.report(state)["front_factor"].tolist() == pytest.approx([grown, grown])


def test_left_to_itself_the_first_evaluation_is_the_reference_and_without_a_scale_nothing_happens():
    combiner = DynamicWeights(growth_scale=1.0)
    state = combiner.observe_evaluation(torch.tensor([1.0, 1.0]), start(combiner))
    assert state["reference"].tolist() == [1.0, 1.0]
    state = combiner.observe_evaluation(torch.tensor([1.5, 3.0]), state)
    assert float(state["factor"]) == pytest.approx(0.5 + 1.5 * math.tanh(1.0))
    plain = DynamicWeights()
    assert plain.observe_evaluation(torch.tensor([1.0, 1.0]), before := start(plain)) is before
    assert plain.report(before) == {}


def test_resume_keeps_what_was_learnt_under_the_configured_reference():
    before, now = DynamicWeights(growth_scale=1.0), DynamicWeights(growth_scale=1.0, reference={"b": 0.5})
    saved = before.combine(given(CONFLICT), before.observe_evaluation(torch.tensor([1.0, 1.0]), start(before))).state
    state = now.resume(saved, start(now))
    assert state["reference"].tolist() == [1.0, 0.5]
    assert all(torch.equal(state[name], saved[name]) for name in saved if name != "reference")
    fell = before.observe_evaluation(torch.tensor([0.5, 0.5]), saved)
    assert float(before.resume(fell, start(before))["factor"]) == 0.5
    plain = DynamicWeights()  # does not look at the front: a factor would stay for good
    assert float(plain.resume(fell, start(plain))["factor"]) == 1.0


def test_bad_input_is_refused():
    for settings in ({"lr": -0.1}, {"lr": torch.nan}, {"growth_scale": 0.0}, {"interval": 0}):
        with pytest.raises(ValueError, match="needs finite lr >= 0 and growth_scale > 0"):
            DynamicWeights(**settings)
    with pytest.raises(ValueError, match="reference names 'c', which is no trained objective; they are a, b"):
        start(DynamicWeights(reference={"c": 0.0}))
    with pytest.raises(ValueError, match="at most 12 objectives, got 13; set growth_scale to null"):
        DynamicWeights(growth_scale=1.0).init([str(i) for i in range(13)], torch.ones(13))
    assert DynamicWeights().init([str(i) for i in range(13)], torch.ones(13))["log_weights"].shape == (13,)
