import pytest
import torch

from moa_lightning.combiners import Linear
from moa_lightning.signals import Signals


def combine(combiner, advantages_N, weights_N=(1.0, 1.0)):
    given = Signals(
        mask_BT=torch.ones(1, 1, dtype=torch.bool),
        valid_BN=torch.ones(1, 2, dtype=torch.bool),
        advantages_BTN=torch.tensor(advantages_N).view(1, 1, 2),
    )
    return combiner.combine(given, combiner.init(["a", "b"], torch.tensor(weights_N)))


def test_weights_come_from_the_objectives_or_from_the_combiner():
    assert combine(Linear(), [2.0, 4.0]).score.item() == 3.0
    assert combine(Linear(), [2.0, 4.0], (3.0, 1.0)).score.item() == 2.5
    combined = combine(Linear({"b": 3.0, "a": 1.0}), [2.0, 4.0], (3.0, 1.0))
    assert combined.score.item() == 3.5
    assert combined.mean_weights().tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0}, "missing: b"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "unknown: c"),
        ({"a": -1.0, "b": 1.0}, "objective 'a' must be a finite number >= 0"),
        ({"a": float("nan"), "b": 1.0}, "objective 'a' must be a finite number >= 0"),
        ({"a": 0.0, "b": 0.0}, "at least one objective needs a weight above 0"),
        ({"a": 1e308, "b": 1e308}, "the weights' sum is not finite; give smaller ones"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        Linear(weights).init(["a", "b"], torch.ones(2))
