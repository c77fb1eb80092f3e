"""MODPO: margin and weight against a worked number, and what nobody judged."""

import math

import pytest
import torch

from moa_lightning.combiners import MODPO
from moa_lightning.losses import PairwiseLogistic, RewardKL
from moa_lightning.signals import Signals
from tests.losses.test_pairwise import case


def signals(wins_BN, scores_BN):
    return Signals(
        mask_BT=torch.ones(len(wins_BN), 1, dtype=torch.bool),
        valid_BN=scores_BN.isfinite(),
        scores_BN=scores_BN.nan_to_num(),
        wins_BN=wins_BN,
        group_B=torch.arange(len(wins_BN)) // 2,
    )


def test_combines_to_the_worked_number():
    # Weights (.5, .5), margin .4 * .5; a log-ratio difference of 2 at beta .1 gives logit 0, so log 2.
    wins_BN = torch.tensor([[1.0, 0.5], [0.0, 0.5]])
    combiner = MODPO(weights={"helpful": 0.5, "short": 0.5})
    combined = combiner.combine(
        signals(wins_BN, torch.tensor([[1.0, 0.4], [0.0, 0.0]])), combiner.init(["helpful", "short"], torch.ones(2))
    )
    experience, output = case()
    experience.mask_BT, experience.group_B = torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    experience.reference_logprobs_BT = torch.zeros(2, 1)
    output.logprobs_BT, output.entropy_BT = torch.tensor([[1.5], [-0.5]]), torch.zeros(2, 1)
    result = PairwiseLogistic(0.1)(combined, experience, output, RewardKL())
    assert result.loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_leaves_out_what_nobody_judged():
    nan = math.nan
    wins_BN = torch.tensor([[1.0, 0.5], [nan, 0.5], [0.0, 0.5], [1.0, 0.5]])
    scores_BN = torch.tensor([[1.0, 3.0], [1.0, 2.0], [0.0, nan], [1.0, 7.0]])
    combiner = MODPO(primary="b", weights={"a": 1.0, "b": 3.0})
    state = combiner.init(["a", "b"], torch.ones(2))
    combined = combiner.combine(signals(wins_BN.flip(1), scores_BN), state)
    assert combined.score.tolist() == [0.0, 0.0, 0.0, 1.0]  # the first prompt: one response without a label
    assert combined.margin_B.tolist() == pytest.approx([0.25, 0.25, 0.0, 0.25])
    assert combined.weight == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("combiner", "says"),
    [
        (MODPO(primary="c"), "'c' is no trained objective; they are a, b"),
        (MODPO(weights={"a": 0.0, "b": 1.0}), "weight of the primary objective 'a'"),
        (MODPO(weights={"a": 1.0}), "missing: b"),
    ],
)
def test_refuses(combiner, says):
    with pytest.raises(ValueError, match=says):
        combiner.init(["a", "b"], torch.ones(2))
