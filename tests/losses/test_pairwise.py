"""The loss on pairs: value and gradient against plain loops, DPO's optimum."""

import math
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch

from moa_lightning.combiners import Combined
from moa_lightning.losses import LossKL, PairwiseLogistic, RewardKL

GROUPS = [0, 1, 0, 2, 1, 1, 3, 3]  # interleaved; prompt 2 has one response, prompt 3 two of the same score
SCORES = [0.9, 0.2, 0.1, 0.5, 0.7, 0.4, 0.3, 0.3]


class Rows(SimpleNamespace):
    """What the loss reads of an experience."""

    def __len__(self):
        return len(self.mask_BT)

    @property
    def counted_rows(self):
        return len(self)


def case(seed=0, masked=()):
    """An experience and an output on it, of 8 responses with up to 4 tokens."""
    generator = torch.Generator().manual_seed(seed)
    mask_BT = torch.arange(4) < torch.tensor([4, 2, 3, 1, 4, 3, 2, 4]).unsqueeze(1)
    mask_BT[list(masked)] = False
    reference_BT = -torch.rand(8, 4, generator=generator, dtype=torch.float64)
    logprobs_BT = (-torch.rand(8, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    experience = Rows(
        mask_BT=mask_BT,
        group_B=torch.tensor(GROUPS),
        reference_logprobs_BT=reference_BT,
        tokens_per_row=float(mask_BT.sum() / 8),
    )
    return experience, SimpleNamespace(logprobs_BT=logprobs_BT, entropy_BT=torch.zeros_like(reference_BT))


def by_loop(experience, output, scores, beta, of_pair, margins=None, weight=1.0, average=False):
    """The definition: each prompt's pairs share its weight, and prompts count equally."""
    total, prompts = 0.0, sorted(set(GROUPS))
    ratio_B = ((output.logprobs_BT - experience.reference_logprobs_BT) * experience.mask_BT).sum(1)
    ratio_B = [r / max(int(m.sum()), 1) if average else r for r, m in zip(ratio_B, experience.mask_BT, strict=True)]
    for prompt in prompts:
        rows = [i for i, g in enumerate(GROUPS) if g == prompt and experience.mask_BT[i].any()]
        pairs = [(i, j) for i, j in permutations(rows, 2) if scores[i] > scores[j]]
        for i, j in pairs:
            margin = 0.0 if margins is None else margins[i] - margins[j]
            z = (beta * (ratio_B[i] - ratio_B[j]) - margin) / weight
            total = total + of_pair(z) / len(pairs) / len(prompts)
    return total


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("masked", [(), (0, 4)])
@pytest.mark.parametrize(
    ("loss_type", "of_pair"),
    [("sigmoid", lambda z: torch.log1p(torch.exp(-z))), ("ipo", lambda z: ((z - 0.5) / 0.3) ** 2)],
)
def test_value_and_gradient(loss_type, of_pair, masked, average):
    experience, output = case(masked=masked)
    result = PairwiseLogistic(0.3, loss_type, average_log_prob=average)(
        Combined(torch.tensor(SCORES), torch.ones(2)), experience, output, RewardKL()
    )
    expected = by_loop(experience, output, SCORES, 0.3, of_pair, average=average)
    assert result.loss.item() == pytest.approx(expected.item(), abs=1e-12)
    (found,) = torch.autograd.grad(result.loss, output.logprobs_BT)
    (wanted,) = torch.autograd.grad(expected, output.logprobs_BT)
    torch.testing.assert_close(found, wanted)
    assert (found[~experience.mask_BT] == 0).all()


def test_margin_and_weight_enter_the_logit():
    experience, output = case()
    margins = torch.linspace(-1, 1, 8, dtype=torch.float64)
    combined = Combined(torch.tensor(SCORES), torch.ones(2), margins, 0.4)
    found = PairwiseLogistic(0.3)(combined, experience, output, RewardKL()).loss
    expected = by_loop(experience, output, SCORES, 0.3, lambda z: torch.log1p(torch.exp(-z)), margins, 0.4)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)


def test_token_scores_count_by_their_mean():
    experience, output = case()
    scores_BT = torch.tensor(SCORES).unsqueeze(1).repeat(1, 4).masked_fill(~experience.mask_BT, 99.0)
    by_row = PairwiseLogistic()(Combined(torch.tensor(SCORES), torch.ones(2)), experience, output, RewardKL())
    by_token = PairwiseLogistic()(Combined(scores_BT, torch.ones(2)), experience, output, RewardKL())
    assert by_token.loss.item() == by_row.loss.item()


def test_no_pair_is_a_loss_of_zero_that_can_be_differentiated():
    experience, output = case()
    result = PairwiseLogistic()(Combined(torch.ones(8), torch.ones(2)), experience, output, RewardKL())
    result.loss.backward()
    assert result.loss.item() == 0 and (output.logprobs_BT.grad == 0).all()
    assert all(math.isfinite(value) for value in result.terms.values())


def test_terms():
    experience, output = case()
    result = PairwiseLogistic(0.3)(Combined(torch.tensor(SCORES), torch.ones(2)), experience, output, LossKL(0.5))
    ratio_B = ((output.logprobs_BT - experience.reference_logprobs_BT) * experience.mask_BT).sum(1)
    shares = {(0, 2): 1.0, (4, 1): 1 / 3, (4, 5): 1 / 3, (5, 1): 1 / 3}
    accuracy = sum(share * float(ratio_B[i] > ratio_B[j]) for (i, j), share in shares.items()) / 2
    margin = sum(share * 0.3 * (ratio_B[i] - ratio_B[j]).item() for (i, j), share in shares.items()) / 2
    assert result.terms["pair_accuracy"].item() == pytest.approx(accuracy)
    assert result.terms["pair_margin"].item() == pytest.approx(margin)
    assert result.terms["pairs"].item() == pytest.approx(4 / 4)
    assert result.loss.item() == pytest.approx((result.terms["policy_loss"] + result.terms["kl_loss"]).item())
    assert result.terms["kl_loss"] > 0


def test_dpo_on_noisy_labels_reaches_the_closed_form():
    # Two responses, the first wins with probability p: beta (D_1 - D_2) = logit p at the optimum of the mean loss.
    p, beta = 0.8, 0.5
    ratio = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    experience, output = case()
    experience.mask_BT = torch.ones(2, 1, dtype=torch.bool)
    experience.group_B, experience.reference_logprobs_BT = torch.zeros(2, dtype=torch.long), torch.zeros(2, 1)
    optimizer = torch.optim.LBFGS([ratio], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)
    combined = Combined(torch.tensor([1.0, 0.0]), torch.ones(1))

    def closure():
        optimizer.zero_grad()
        output.logprobs_BT, output.entropy_BT = ratio.unsqueeze(1), torch.zeros(2, 1)
        loss = PairwiseLogistic(beta, label_smoothing=1 - p)(combined, experience, output, RewardKL()).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    assert beta * (ratio[0] - ratio[1]).item() == pytest.approx(math.log(p / (1 - p)), abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"beta": 0.0}, r"PairwiseLogistic\.beta must be a finite number above 0, got 0\.0"),
        ({"beta": math.nan}, r"beta must be a finite number above 0, got nan"),
        ({"label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0\.5\), got 0\.5"),
        ({"label_smoothing": -0.1}, r"label_smoothing must lie in \[0, 0\.5\), got -0\.1"),
        ({"label_smoothing": math.nan}, r"label_smoothing must lie in \[0, 0\.5\), got nan"),
        ({"loss_type": "hinge"}, "loss_type must be sigmoid or ipo, got 'hinge'"),
    ],
)
def test_values_without_meaning(fields, says):
    with pytest.raises(ValueError, match=says):
        PairwiseLogistic(**fields)
