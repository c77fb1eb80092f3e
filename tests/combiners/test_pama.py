"""The combiner; Theorem 1 itself is tested with `functional.pama`."""

import pytest
import torch

from moa_lightning.combiners import PAMA
from moa_lightning.functional import clipped_surrogate, pama
from moa_lightning.signals import ClipRange, Signals

ADVANTAGES = torch.tensor([[[2.0, 1.0], [-1.0, 3.0], [-2.0, -1.0]]])


def combine(combiner, advantages_BTN=ADVANTAGES, ratio=1.0, valid_BN=None):
    shape = advantages_BTN.shape
    given = Signals(
        mask_BT=torch.ones(shape[:2], dtype=torch.bool),
        valid_BN=torch.ones(shape[0], shape[2], dtype=torch.bool) if valid_BN is None else valid_BN,
        advantages_BTN=advantages_BTN,
        ratio_BT=torch.full(shape[:2], ratio),
        clip_range=ClipRange(0.2, 0.2),
    )
    return combiner.combine(given, combiner.init(["a", "b"], torch.ones(2)))


def test_token_by_token_by_hand():
    assert combine(PAMA(noon=False)).score.tolist() == [[1.0, 0.0, -1.0]]
    assert combine(PAMA(noon=True)).score.tolist() == [[1.0, 0.0, 0.0]]


def test_per_sequence_and_per_batch_by_hand():
    # Positive parts (2, 1), (0, 3), (0, 0): means 2/3 and 4/3: all weight goes to the first.
    for granularity in ("sequence", "batch"):
        combined = combine(PAMA(granularity))
        assert combined.score.tolist() == [[2.0, 0.0, 0.0]]
        assert combined.mean_weights().tolist() == [1.0, 0.0]
    # Signed means -1/3 and 1: they straddle 0, weights 3/4 and 1/4.
    combined = combine(PAMA("batch", noon=False))
    torch.testing.assert_close(combined.mean_weights(), torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(combined.score, torch.tensor([[1.75, 0.0, -1.75]]))


def test_sequences_have_weights_of_their_own_and_the_batch_shares_them():
    advantages_BTN = torch.tensor([[[1.0, 2.0]], [[4.0, 3.0]]])
    assert combine(PAMA("sequence"), advantages_BTN).score.tolist() == [[1.0], [3.0]]
    assert combine(PAMA("batch"), advantages_BTN).score.tolist() in ([[1.0], [4.0]], [[1.5], [3.5]])


def slope(combiner, advantages_BTN, ratio):
    """Derivative of the surrogate by the ratio, token by token."""
    ratio_BT = torch.full(advantages_BTN.shape[:2], ratio, requires_grad=True)
    score_BT = combine(combiner, advantages_BTN, ratio).score
    return torch.autograd.grad(-clipped_surrogate(ratio_BT, score_BT, 0.2).sum(), ratio_BT)[0].tolist()


def test_clipped_advantages_do_not_count():
    """``I(A)``: beyond 1 + eps a positive advantage has no gradient, below 1 - eps a negative one has none."""
    assert slope(PAMA(noon=True), ADVANTAGES, 1.3) == [[0.0, 0.0, 0.0]]
    assert slope(PAMA(noon=True), ADVANTAGES, 0.7) == [[1.0, 0.0, 0.0]]
    # I(A) is (0, 0), (-1, 0), (-2, -1), then (2, 1), (0, 3), (0, 0).
    assert slope(PAMA(noon=False), ADVANTAGES, 1.3) == [[0.0, 0.0, -1.0]]
    assert slope(PAMA(noon=False), ADVANTAGES, 0.7) == [[1.0, 0.0, 0.0]]
    # With shared weights the clipped tokens leave the mean: then it is the second objective's that is the smaller.
    advantages_BTN = torch.tensor([[[1.0, 4.0], [1.0, 0.5]]])
    given = Signals(
        mask_BT=torch.ones(1, 2, dtype=torch.bool),
        valid_BN=torch.ones(1, 2, dtype=torch.bool),
        advantages_BTN=advantages_BTN,
        ratio_BT=torch.tensor([[1.3, 1.0]]),
        clip_range=ClipRange(0.2, 0.2),
    )
    assert PAMA("batch").combine(given, {}).mean_weights().tolist() == [0.0, 1.0]
    assert combine(PAMA("batch"), advantages_BTN).mean_weights().tolist() == [1.0, 0.0]


def test_a_missing_objective_leaves_the_problem():
    valid_BN = torch.tensor([[False, True]])
    combined = combine(PAMA(noon=False), valid_BN=valid_BN)
    assert combined.score.tolist() == [[1.0, 3.0, -1.0]]
    assert combined.mean_weights().tolist() == [0.0, 1.0]


def test_an_unknown_granularity_is_refused():
    with pytest.raises(ValueError, match=r"granularity must be one of token, sequence, batch; got 'word'"):
        PAMA(granularity="word")


@pytest.mark.parametrize("noon", [True, False])
@pytest.mark.parametrize("granularity", ["token", "sequence", "batch"])
def test_gradient_of_one_step_on_a_tabular_policy(noon, granularity):
    """PAMA's step against autograd: the gradient of the surrogate equals that of the min-norm combination of the N
    objectives' own surrogate gradients with the weights that Theorem 1 gives."""
    generator = torch.Generator().manual_seed(3)
    states, actions, objectives = 24, 4, 3
    logits_SA = torch.randn(states, actions, generator=generator, dtype=torch.float64, requires_grad=True)
    chosen_S = torch.randint(actions, (states,), generator=generator)
    old_S = logits_SA.log_softmax(-1).gather(-1, chosen_S.unsqueeze(-1)).squeeze(-1).detach()
    old_S = old_S + 0.15 * torch.randn(states, generator=generator, dtype=torch.float64)
    advantages_SN = torch.randn(states, objectives, generator=generator, dtype=torch.float64)

    ratio_S = (logits_SA.log_softmax(-1).gather(-1, chosen_S.unsqueeze(-1)).squeeze(-1) - old_S).exp()
    given = Signals(
        mask_BT=torch.ones(1, states, dtype=torch.bool),
        valid_BN=torch.ones(1, objectives, dtype=torch.bool),
        advantages_BTN=advantages_SN.unsqueeze(0),
        ratio_BT=ratio_S.detach().unsqueeze(0),
        clip_range=ClipRange(0.2, 0.2),
    )
    score_S = PAMA(granularity, noon).combine(given, {}).score[0]
    (step,) = torch.autograd.grad(clipped_surrogate(ratio_S, score_S, 0.2).sum(), logits_SA, retain_graph=True)

    used_SN = advantages_SN.clamp(min=0) if noon else advantages_SN
    effective_SN = torch.where((used_SN > 0) & (ratio_S.detach() > 1.2).unsqueeze(-1), 0.0, used_SN)
    effective_SN = torch.where((used_SN < 0) & (ratio_S.detach() < 0.8).unsqueeze(-1), 0.0, effective_SN)
    signal_SN = effective_SN if granularity == "token" else effective_SN.mean(0, keepdim=True)
    weights_SN = pama(signal_SN)[1].expand(states, objectives)
    # d/dtheta of sum_i c_i min(u A_i, clip(u) A_i), objective by objective, where the clipped surrogate of the *sum*
    # is flat exactly where the sum's own sign says so.
    combined_S = (weights_SN * used_SN).sum(-1)
    flat_S = ((combined_S > 0) & (ratio_S.detach() > 1.2)) | ((combined_S < 0) & (ratio_S.detach() < 0.8))
    expected = torch.zeros_like(logits_SA)
    for i in range(objectives):
        slope_S = (weights_SN[:, i] * used_SN[:, i]).masked_fill(flat_S, 0.0)
        (part,) = torch.autograd.grad(-(ratio_S * slope_S).sum(), logits_SA, retain_graph=True)
        expected = expected + part
    torch.testing.assert_close(step, expected)
    assert step.abs().sum() > 0
