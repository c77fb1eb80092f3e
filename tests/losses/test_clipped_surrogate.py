import math
from types import SimpleNamespace

import pytest
import torch

from bench.peers.grpo_surrogate import EPSILON, SETTINGS, surrogate_case
from moa_lightning.combiners import Combined
from moa_lightning.functional import clipped_surrogate, probability_ratio, squared_log_ratio, value_loss
from moa_lightning.losses import ClippedSurrogate, LossKL, RewardKL
from moa_lightning.signals import Signals


@pytest.mark.parametrize(
    ("ratio", "score", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.4, 0.0),  # clipped at 1.2
        (0.5, 2.0, -1.0, -2.0),  # a bad ratio for a good action still counts
        (0.5, -2.0, 1.6, 0.0),  # clipped at 0.8
        (1.5, -2.0, 3.0, 2.0),
    ],
)
def test_clipped_surrogate_by_hand(ratio, score, loss, slope):
    ratio_T = torch.tensor([ratio], requires_grad=True)
    value = clipped_surrogate(ratio_T, torch.tensor([score]), 0.2)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert ratio_T.grad.item() == pytest.approx(slope)


def test_ratios_cannot_overflow():
    ratio = probability_ratio(torch.tensor([500.0, -500.0, 0.1]), torch.zeros(3))
    assert torch.isfinite(ratio).all()
    assert ratio[2].item() == pytest.approx(1.1051709)


def test_value_loss_takes_the_larger_error():
    values, old, returns = torch.tensor([2.0, 0.1]), torch.tensor([0.0, 0.0]), torch.tensor([3.0, 1.0])
    assert value_loss(values, old, returns, None).tolist() == pytest.approx([0.5, 0.405])
    assert value_loss(values, old, returns, 0.2).tolist() == pytest.approx([0.5 * 2.8**2, 0.405])


def test_kl_in_the_loss_has_the_gradient_of_the_divergence():
    """On samples of the policy, in expectation: exact here, by summing over all actions."""
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    expected = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)[0]
    estimate = torch.autograd.grad(
        (logprobs.exp().detach() * squared_log_ratio(logprobs, reference)).sum(), logits, retain_graph=True
    )[0]
    torch.testing.assert_close(estimate, expected)
    assert torch.isfinite(squared_log_ratio(torch.tensor([-1e4]), torch.tensor([0.0]))).all()
    assert LossKL(2.0).loss(torch.tensor([1.0]), torch.tensor([0.0])).item() == 1.0
    with pytest.raises(ValueError, match="beta >= 0"):
        LossKL(-1.0)


# Printed by `python -m bench.peers.grpo_surrogate` under TRL 1.16.0 and torch 2.13.0: loss, norm of its gradient. verl
# 0.9.1's `compute_policy_loss` gives the first four too, with `clip_ratio_c` for `delta`.
TRL = {
    "plain": (0.352824501346, 0.302164834777),
    "epsilon_high": (0.304818089281, 0.304185960952),
    "delta": (0.226698971251, 0.134981537834),
    "both": (0.172692559187, 0.139447219480),
    "sequence": (0.259501678672, 0.275875207788),
    "sequence, epsilon_high": (0.230349806219, 0.292173229294),
    "sequence, both": (0.290215658660, 0.246060007830),
}


class Rows(SimpleNamespace):
    """What the loss reads of an experience."""

    counted_rows = 6.0
    returns_BTN = None


def given():
    logprobs_BT, behaviour_BT, mask_BT, advantages_B = surrogate_case()
    rows = Rows(
        mask_BT=mask_BT,
        behaviour_logprobs_BT=behaviour_BT,
        reference_logprobs_BT=behaviour_BT,
        tokens_per_row=int(mask_BT.sum()) / 6,
    )
    logprobs_BT.requires_grad_()
    return rows, SimpleNamespace(logprobs_BT=logprobs_BT, entropy_BT=logprobs_BT * 0, values_BTN=None), advantages_B


def loss_and_gradient(loss, score):
    rows, output, _ = given()
    result = loss(Combined(score, torch.ones(1)), rows, output, RewardKL())
    (gradient_BT,) = torch.autograd.grad(result.loss, output.logprobs_BT)
    return result, gradient_BT


def by_loop(options, advantages_BT):
    """The definitions, token by token."""
    rows, output, _ = given()
    low, high, delta = 0.2, options.get("epsilon_high", 0.2), options.get("delta", math.inf)
    log_ratio_BT = output.logprobs_BT - rows.behaviour_logprobs_BT
    total, divisor = 0.0, 0
    for b in range(6):
        tokens = [t for t in range(5) if rows.mask_BT[b, t]]
        whole = sum(log_ratio_BT[b, t] for t in tokens) / len(tokens)
        per_response = "importance_sampling_level" in options
        for t in tokens:
            ratio, advantage = (whole if per_response else log_ratio_BT[b, t]).exp(), advantages_BT[b, t]
            if advantage >= 0:
                value = min(ratio, 1 + high) * advantage
            else:
                value = max(min(ratio, delta), 1 - low) * advantage
            total = total - value / (len(tokens) if per_response else 1)
        divisor += 1 if per_response else len(tokens)
    loss = total / divisor
    (gradient_BT,) = torch.autograd.grad(loss, output.logprobs_BT)
    return loss, gradient_BT


@pytest.mark.parametrize("name", list(TRL))
def test_loss_and_gradient_are_trls(name):
    result, gradient_BT = loss_and_gradient(ClippedSurrogate(EPSILON, **SETTINGS[name]), surrogate_case()[3])
    assert result.terms["policy_loss"].item() == pytest.approx(TRL[name][0], abs=1e-11)
    assert gradient_BT.norm().item() == pytest.approx(TRL[name][1], abs=1e-11)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("options", list(SETTINGS.values()), ids=list(SETTINGS))
def test_loss_and_gradient_by_a_plain_loop(options, per_token):
    advantages = surrogate_case()[3]
    score = advantages.unsqueeze(1) + torch.linspace(-1, 1, 5, dtype=torch.float64) if per_token else advantages
    advantages_BT = score if per_token else score.unsqueeze(1).expand(6, 5)
    result, gradient_BT = loss_and_gradient(ClippedSurrogate(EPSILON, **options), score)
    expected, wanted_BT = by_loop(options, advantages_BT)
    assert result.loss.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(gradient_BT, wanted_BT)


@pytest.mark.parametrize("options", list(SETTINGS.values()), ids=list(SETTINGS))
def test_combiners_see_what_the_surrogate_clips(options):
    """``I(A)`` is 0 exactly where the loss is flat; the slopes are its gradient by the log-probabilities."""
    rows, output, advantages_B = given()
    loss = ClippedSurrogate(EPSILON, **options)
    clip, mask_BT = loss.clip_range, rows.mask_BT
    advantages_BTN = (advantages_B.unsqueeze(1) + torch.linspace(-1, 1, 5, dtype=torch.float64)).unsqueeze(-1)
    ratio_BT = clip.ratio(output.logprobs_BT, rows.behaviour_logprobs_BT, mask_BT)
    ratio_BT.retain_grad()
    values_BT = clipped_surrogate(ratio_BT, advantages_BTN[..., 0], clip.low, clip.high, clip.delta)
    values_BT.sum().backward(inputs=[ratio_BT])
    signals = Signals(
        mask_BT, torch.ones(6, 1, dtype=torch.bool), advantages_BTN, ratio_BT=ratio_BT.detach(), clip_range=clip
    )
    seen_BT = signals.unclipped(advantages_BTN)[..., 0]
    assert torch.equal(seen_BT, -ratio_BT.grad)
    assert 0 < (seen_BT == 0).sum() < seen_BT.numel(), "some are clipped, some are not"
    slopes_BT = signals.slopes(advantages_BTN)[..., 0].where(mask_BT, 0.0)
    _, gradient_BT = loss_and_gradient(loss, advantages_BTN[..., 0])
    divisor = 6.0 if clip.of_responses else float(mask_BT.sum())
    torch.testing.assert_close(-gradient_BT * divisor, slopes_BT)


def test_what_is_not_asked_for_changes_no_bit():
    """The surrogate and its gradient as they were before there were further options."""
    generator = torch.Generator().manual_seed(0)
    ratio_T = torch.empty(4000).log_normal_(0, 1, generator=generator).requires_grad_()
    score_T = torch.randn(4000, generator=generator)
    plain_T = -torch.minimum(ratio_T * score_T, ratio_T.clamp(1 - 0.2, 1 + 0.2) * score_T)
    clip = ClippedSurrogate().clip_range
    found_T = clipped_surrogate(ratio_T, score_T, clip.low, clip.high, clip.delta)
    assert torch.equal(found_T, plain_T)
    gradients = [torch.autograd.grad(x.sum(), ratio_T)[0] for x in (found_T, plain_T)]
    assert torch.equal(*gradients)


def test_clip_ratio_counts_both_epsilons():
    score = surrogate_case()[3]
    rows, output, _ = given()
    ratio_BT = (output.logprobs_BT - rows.behaviour_logprobs_BT).exp().detach()
    outside = ((ratio_BT < 0.8) | (ratio_BT > 1.5)) & rows.mask_BT
    terms = loss_and_gradient(ClippedSurrogate(epsilon_high=0.5), score)[0].terms
    assert terms["clip_ratio"].item() == pytest.approx(float(outside.sum() / rows.mask_BT.sum()))
    terms = loss_and_gradient(ClippedSurrogate(importance_sampling_level="sequence"), score)[0].terms
    assert terms["clip_ratio"].item() == pytest.approx(2 / 6), "of responses"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"cliprange": 0.0}, r"ClippedSurrogate\.cliprange must be a finite number above 0, got 0\.0"),
        ({"cliprange": math.nan}, r"cliprange must be a finite number above 0, got nan"),
        ({"cliprange_value": -1.0}, r"cliprange_value must be a finite number above 0, got -1\.0"),
        ({"epsilon_high": 0.0}, r"epsilon_high must be a finite number above 0, got 0\.0"),
        ({"vf_coef": math.nan}, r"vf_coef must be a finite number of at least 0, got nan"),
        ({"entropy_coef": math.inf}, r"entropy_coef must be a finite number, got inf"),
        ({"delta": 1.2}, r"delta must be above 1 \+ epsilon_high \(1\.2\) or null, got 1\.2"),
        ({"delta": 1.4, "epsilon_high": 0.5}, r"delta must be above 1 \+ epsilon_high \(1\.5\) or null, got 1\.4"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be token or sequence, got 'word'"),
    ],
)
def test_values_without_meaning(fields, says):
    with pytest.raises(ValueError, match=says):
        ClippedSurrogate(**fields)
