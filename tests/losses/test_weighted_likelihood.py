"""Weighted likelihood: value, gradient and logged figures against plain loops."""

from types import SimpleNamespace

import pytest
import torch

from moa_lightning.combiners import Combined
from moa_lightning.losses import LossKL, RewardKL, WeightedLikelihood

LENGTHS = [4, 1, 3, 0, 2, 4]  # the fourth row is trained on nowhere
WEIGHTS = [0.1, 2.5, 0.0, 1.7, 0.8, 0.9]


class Rows(SimpleNamespace):
    """What the loss reads of an experience."""

    def __len__(self):
        return len(self.mask_BT)

    @property
    def counted_rows(self):
        return len(self)

    def select(self, rows):
        return Rows(**{k: v[rows] if torch.is_tensor(v) else v for k, v in vars(self).items()})


def case(per_token=False):
    generator = torch.Generator().manual_seed(0)

    def numbers():
        return -torch.rand(6, 4, generator=generator, dtype=torch.float64)

    mask_BT = torch.arange(4) < torch.tensor(LENGTHS).unsqueeze(1)
    experience = Rows(
        mask_BT=mask_BT, reference_logprobs_BT=numbers(), tokens_per_row=float(mask_BT.sum()) / len(mask_BT)
    )
    output = SimpleNamespace(logprobs_BT=numbers().requires_grad_(), entropy_BT=-numbers())
    score = torch.tensor(WEIGHTS, dtype=torch.float64)
    if per_token:
        score = score.unsqueeze(1) * (1 - numbers()) * mask_BT
    return experience, output, score


def by_loop(experience, output, score, max_weight=None, beta=0.0):
    total = 0.0
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            weight = float((score[row] if score.ndim == 1 else score[row, t]).detach())
            weight = weight if max_weight is None else min(weight, max_weight)
            logprob = output.logprobs_BT[row, t]
            total = total - weight * logprob + beta / 2 * (logprob - experience.reference_logprobs_BT[row, t]) ** 2
    return total / len(LENGTHS)


def loss(score, experience, output, kl=None, **settings):
    weights_N = torch.ones(2)
    return WeightedLikelihood(**settings)(Combined(score, weights_N), experience, output, kl or RewardKL())


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("max_weight", [None, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_value_and_gradient(per_token, max_weight, beta):
    experience, output, score = case(per_token)
    score.requires_grad_()
    result = loss(score, experience, output, LossKL(beta), max_weight=max_weight)
    expected = by_loop(experience, output, score, max_weight, beta)
    torch.testing.assert_close(result.loss, expected)
    (wanted,) = torch.autograd.grad(expected, output.logprobs_BT)
    torch.testing.assert_close(torch.autograd.grad(result.loss, output.logprobs_BT, retain_graph=True)[0], wanted)
    assert wanted.any()
    with pytest.raises(RuntimeError, match="not have been used in the graph"):  # the weights carry no gradient
        torch.autograd.grad(result.loss, score)
    torch.testing.assert_close(result.terms["policy_loss"] + result.terms["kl_loss"], result.loss.detach())


def test_long_responses_are_learnt_like_short_ones():
    """In batches of different lengths the stationary policy is the weights' own distribution."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    lengths, gradient = [1, 1, 20], 0.0
    for drawn in ([0, 1], [1, 2], [2, 0]):  # every response equally often, in batches of different lengths
        mask_BT = torch.arange(20) < torch.tensor([lengths[i] for i in drawn]).unsqueeze(1)
        experience = Rows(mask_BT=mask_BT, tokens_per_row=float(mask_BT.sum()) / 2)
        experience.reference_logprobs_BT = torch.zeros(2, 20, dtype=torch.float64)
        shared_B = logits.log_softmax(0)[drawn] / mask_BT.sum(1)
        output = SimpleNamespace(logprobs_BT=shared_B.unsqueeze(1) * mask_BT, entropy_BT=torch.zeros(2, 20))
        gradient = gradient + torch.autograd.grad(loss(torch.ones(2), experience, output).loss, logits)[0]
    assert gradient.abs().max() < 1e-12


def test_the_weighted_sample_is_the_minimiser():
    """With weights of a finite distribution the loss pulls the policy to exactly that distribution."""
    target = torch.tensor([0.6, 0.3, 0.1, 0.0], dtype=torch.float64)
    experience = Rows(mask_BT=torch.ones(4, 1, dtype=torch.bool), tokens_per_row=1.0)
    experience.reference_logprobs_BT = torch.full((4, 1), 0.25, dtype=torch.float64).log()
    logits = target.clamp(min=1e-12).log().requires_grad_()
    output = SimpleNamespace(logprobs_BT=logits.log_softmax(0).unsqueeze(1), entropy_BT=torch.zeros(4, 1))
    (gradient,) = torch.autograd.grad(loss(4 * target, experience, output).loss, logits)
    assert gradient.abs().max() < 1e-11


@pytest.mark.parametrize(
    ("max_weight", "capped", "weights"),
    [(None, 0.0, WEIGHTS), (1.0, 2 / 6, [0.1, 1.0, 0.0, 1.0, 0.8, 0.9]), (2.0, 1 / 6, [0.1, 2.0, 0.0, 1.7, 0.8, 0.9])],
)
def test_effective_sample_size_and_the_share_that_was_cut(max_weight, capped, weights):
    experience, output, score = case()
    terms = loss(score, experience, output, max_weight=max_weight).terms
    assert float(terms["ess"]) == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights) / 6)
    assert float(terms["capped_ratio"]) == pytest.approx(capped)
    entropy = float(output.entropy_BT[experience.mask_BT].mean())
    assert float(terms["entropy"]) == pytest.approx(entropy)
    assert not any(value.requires_grad for value in terms.values())


@pytest.mark.parametrize(("weights", "ess"), [([1.0] * 6, 1.0), ([6.0] + [0.0] * 5, 1 / 6), ([0.0] * 6, 0.0)])
def test_effective_sample_size_at_its_limits(weights, ess):
    experience, output, _ = case()
    assert float(loss(torch.tensor(weights), experience, output).terms["ess"]) == pytest.approx(ess)


@pytest.mark.parametrize("per_token", [False, True])
def test_accumulated_minibatches_add_up(per_token):
    """Whatever their lengths: Lightning takes the mean over them."""
    experience, output, score = case(per_token)
    whole = loss(score, experience, output, LossKL(0.3), max_weight=2.0).loss
    parts = 0.0
    for rows in (torch.tensor([3, 0]), torch.tensor([5, 1]), torch.tensor([2, 4])):
        part = SimpleNamespace(logprobs_BT=output.logprobs_BT[rows], entropy_BT=output.entropy_BT[rows])
        parts = parts + loss(score[rows], experience.select(rows), part, LossKL(0.3), max_weight=2.0).loss / 3
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(*(torch.autograd.grad(one, output.logprobs_BT)[0] for one in (parts, whole)))


def test_masked_tokens_may_hold_anything():
    experience, output, score = case()
    broken = output.logprobs_BT.detach().masked_fill(~experience.mask_BT, -torch.inf).requires_grad_()
    result = loss(score, experience, SimpleNamespace(logprobs_BT=broken, entropy_BT=output.entropy_BT))
    torch.testing.assert_close(result.loss, by_loop(experience, output, score))
    (gradient,) = torch.autograd.grad(result.loss, broken)
    assert gradient.isfinite().all()


def test_scores_below_zero_are_refused():
    experience, output, score = case()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole line is compared
        loss(score - 0.2, experience, output)
    assert str(caught.value) == (
        "loss WeightedLikelihood needs weights of at least 0, and this combiner's score is an advantage of either "
        "sign; use loss ClippedSurrogate with it"
    )


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_a_cap_without_meaning(limit):
    with pytest.raises(ValueError, match=r"WeightedLikelihood needs max_weight > 0 \(or null\), got"):
        WeightedLikelihood(limit)
