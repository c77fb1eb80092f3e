"""What each claim of a combiner means on a batch: a check that fails where it does not hold.

Legend: B sequences, T tokens, N objectives.
"""

import dataclasses

import torch

from moa_lightning.combiners.claims import Claim
from moa_lightning.functional import representation_gramian
from moa_lightning.signals import ClipRange, Signal
from tests.combiners.inputs import CLIPPED, changed, norms, picked, run, signals

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def update(combiner, rows, clip_range=CLIPPED):
    """The score without unit, and the margin less its prompt's mean: equal ones move the policy in one direction."""
    combined = run(combiner, rows, clip_range)
    size = 1.0
    if Signal.ADVANTAGES in combiner.needs:
        size = (rows.advantages_BTN.nan_to_num(0.0).abs() * combined.mean_weights().abs()).sum(-1).max()
    margin_B = torch.zeros(len(rows)) if combined.margin_B is None else combined.margin_B / combined.weight
    margin_B = margin_B.view(-1, 4) - margin_B.view(-1, 4).mean(1, keepdim=True)
    return combined.score / (size if size > 0 else 1.0), margin_B.flatten()


def same_update(combiner, rows, others):
    for one, other in zip(update(combiner, rows), update(combiner, others), strict=True):
        torch.testing.assert_close(other, one, **CLOSE)


def precise(combiner):
    """With the solver that it has run to its end, for what holds at the solution alone."""
    if hasattr(combiner, "max_iters"):
        return dataclasses.replace(combiner, max_iters=5_000, epsilon=1e-7)
    return combiner


def simplex(combiner, rows):
    weights_N = run(combiner, rows).mean_weights()
    assert (weights_N >= 0).all()
    torch.testing.assert_close(weights_N.sum(), torch.tensor(1.0), rtol=1e-5, atol=0)


def permutation(combiner, rows):
    count = len(rows.rewards.names)
    order = [(i * 3 + 1) % count for i in range(count)] if count % 3 else list(reversed(range(count)))
    moved = picked(rows, order)
    same_update(combiner, rows, moved)
    # Objectives of parallel gradients may share their weight in any way.
    values_KN = rows.advantages_BTN.nan_to_num(0.0).flatten(0, 1).double()
    values_KN = values_KN / values_KN.abs().amax(0).clamp(min=1e-300)
    alone_N = ((values_KN.unsqueeze(-1) - values_KN.unsqueeze(1)).abs().amax(0) < 1e-6).sum(1) == 1
    weights_N = torch.zeros(count).index_copy(0, torch.tensor(order), run(combiner, moved).mean_weights())
    torch.testing.assert_close(weights_N[alone_N], run(combiner, rows).mean_weights()[alone_N], rtol=1e-3, atol=1e-4)


def common_scale(combiner, rows):
    for factor in (2.0**-33, 2.0**50):  # 1e-10 and 1e15; powers of 2 leave all digits
        same_update(combiner, rows, changed(rows, lambda values, f=factor: values * f))


def own_scale(combiner, rows):
    scales_N = 2.0 ** torch.tensor([-20.0, 0.0, 15.0, 7.0] * 4)[: len(rows.rewards.names)]
    same_update(combiner, rows, changed(rows, lambda values: values * scales_N))


def shift(combiner, rows):
    size_N = rows.rewards.value_BN.nan_to_num(0.0).abs().amax(0)
    offset_N = size_N * torch.tensor([1.0, -2.0, 0.0, 0.5] * 4)[: len(size_N)]
    value_BN = rows.rewards.value_BN + offset_N
    same_update(combiner, rows, dataclasses.replace(rows, rewards=dataclasses.replace(rows.rewards, value_BN=value_BN)))


def monotone(combiner, rows):
    def raised(values):  # row 1 is row 0 and something more
        values = values.clone()
        values[1] = values[0] + values[2].nan_to_num(0.0).abs()
        return values

    like_first = torch.arange(len(rows)).index_fill(0, torch.tensor([1]), 0)
    better = changed(rows, raised)
    better = dataclasses.replace(better, mask_BT=rows.mask_BT[like_first], valid_BN=rows.valid_BN[like_first])
    score = update(combiner, better, clip_range=ClipRange())[0]
    assert (score[1] >= score[0] - 1e-5).all()


def one_objective(combiner, rows):
    alone = picked(rows, [0])
    score = run(combiner, alone).score
    counted_B = alone.mask_BT.any(1) & alone.valid_BN[:, 0]
    if Signal.ADVANTAGES in combiner.needs:
        plain_BT = alone.advantages_BTN[..., 0].where(alone.mask_BT & alone.valid_BN, 0.0)
        assert torch.equal(score, plain_BT)
        return
    for prompt in range(int(alone.group_B.max()) + 1):
        kept_B = (alone.group_B == prompt) & counted_B
        plain = alone.scores_BN[kept_B, 0].double()
        plain, found = plain - plain.mean(), score[kept_B].double()
        if plain.norm() > 1e-6 * alone.scores_BN[kept_B, 0].double().norm():
            torch.testing.assert_close(found / found.norm(), plain / plain.norm(), **CLOSE)
        else:
            assert (found.abs() < 1e-5).all()


def _gram(rows, slopes_BTK):
    """Inner products at the representation, before clipping, of gradients with these slopes; their lengths."""
    ratio_BT1 = signals(rows).ratio_BT.unsqueeze(-1).double()
    kept_BTK = slopes_BTK.where(rows.mask_BT.unsqueeze(-1), 0.0).double() * ratio_BT1
    size_K = kept_BTK.abs().amax((0, 1))  # nothing overflows in units of the steepest
    gram_KK = representation_gramian(kept_BTK / size_K.where(size_K > 0, 1.0), norms(rows).double())
    lengths_K = gram_KK.diagonal().sqrt()
    angles_KK = gram_KK / lengths_K.outer(lengths_K).clamp(min=1e-300)
    return angles_KK, lengths_K * size_K


def _advantages(rows):
    return rows.advantages_BTN.where(rows.valid_BN.unsqueeze(1), 0.0)


def no_conflict(combiner, rows):
    combined = run(combiner, rows, ClipRange())
    angles_KK, lengths_K = _gram(rows, torch.cat([_advantages(rows), combined.score.unsqueeze(-1)], -1))
    # In units of what is summed: where all of it cancels, the rest is rounding and points anywhere.
    summed = (lengths_K[:-1] * combined.mean_weights()).sum()
    assert (angles_KK[-1, :-1] * lengths_K[-1] >= -1e-3 * summed).all()


def min_norm(combiner, rows):
    combined = run(precise(combiner), rows, ClipRange())
    angles_NN, lengths_N = _gram(rows, _advantages(rows))
    kept_N = lengths_N > 0
    if not kept_N.any():
        return
    # The scaled gradients have lengths |g|^(1 - power), and c_i |g_i|^-power are the weights: KKT of their problem.
    lengths_N = lengths_N[kept_N] / lengths_N.max()
    scaled_N = lengths_N ** (1 - combiner.norm_power)
    c_N = combined.mean_weights().double()[kept_N] * lengths_N**combiner.norm_power
    products_N = (angles_NN[kept_N][:, kept_N] * scaled_N.outer(scaled_N)) @ (c_N / c_N.sum()) / scaled_N.max() ** 2
    assert (products_N >= (c_N / c_N.sum()) @ products_N - 1e-3).all()


CHECKS = {
    Claim.SIMPLEX: simplex,
    Claim.PERMUTATION: permutation,
    Claim.COMMON_SCALE: common_scale,
    Claim.OWN_SCALE: own_scale,
    Claim.SHIFT: shift,
    Claim.MONOTONE: monotone,
    Claim.ONE_OBJECTIVE: one_objective,
    Claim.NON_CONFLICT: no_conflict,
    Claim.MIN_NORM: min_norm,
}
