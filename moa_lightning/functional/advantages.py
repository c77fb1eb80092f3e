"""Advantages: from rewards (and values) to one number per token and objective.

Legend: B sequences, T tokens, N objectives, G responses to one prompt.
"""

import torch
from torch import Tensor


def gae(
    rewards_BTN: Tensor, values_BTN: Tensor, mask_BT: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, one independent stream per objective.

    Args:
        rewards_BTN: reward received after token t, in the objective's own units.
        values_BTN: value of the state *before* token t.
        mask_BT: bool or 0/1; 1 on the tokens of the response. The state after the last 1 is terminal: its value
            is 0. Rewards and values where it is 0 are ignored, whatever they are.
        gamma: discount per token, in [0, 1].
        lam: the lambda of GAE, in [0, 1].

    Returns:
        ``(advantages_BTN, returns_BTN)``, both 0 where the mask is 0; ``returns = advantages + values``.

    Raises:
        ValueError: the shapes do not agree.

    Source: Schulman et al. 2016, arXiv 1506.02438, Eq. 16, per objective as in PAMA (arXiv 2508.07768).
    """
    if values_BTN.ndim != 3 or rewards_BTN.shape != values_BTN.shape or rewards_BTN.shape[:2] != mask_BT.shape:
        raise ValueError(
            f"gae needs rewards and values of one shape (B, T, N) and a mask (B, T); got {tuple(rewards_BTN.shape)}, "
            f"{tuple(values_BTN.shape)} and {tuple(mask_BT.shape)}"
        )
    mask_BT1 = mask_BT.bool().unsqueeze(-1)
    advantages_BTN = torch.zeros_like(values_BTN)
    running_BN = values_BTN.new_zeros(values_BTN.shape[0], values_BTN.shape[2])
    next_value_BN = torch.zeros_like(running_BN)
    for t in reversed(range(values_BTN.shape[1])):
        delta_BN = rewards_BTN[:, t] + gamma * next_value_BN - values_BTN[:, t]
        running_BN = (delta_BN + gamma * lam * running_BN).where(mask_BT1[:, t], 0.0)
        next_value_BN = values_BTN[:, t].where(mask_BT1[:, t], 0.0)
        advantages_BTN[:, t] = running_BN
    return advantages_BTN, (advantages_BTN + values_BTN).where(mask_BT1, 0.0)


def group_relative(rewards_BN: Tensor, valid_BN: Tensor, group_size: int, scale: bool = False) -> Tensor:
    """Reward minus the mean of its prompt group, per objective: advantages without critics.

    Args:
        rewards_BN: sequence rewards; the G rows of a prompt are consecutive. Values where ``valid_BN`` is False
            are ignored, whatever they are.
        valid_BN: bool, which rows have this objective.
        group_size: G, at least 2; B is a multiple of it.
        scale: divide by the group's sample standard deviation plus 1e-4 (GRPO) as well.

    Returns:
        advantages_BN, 0 where invalid and in groups with fewer than two valid rows.

    Source: Shao et al. 2024, arXiv 2402.03300 (GRPO); without scaling, Liu et al. 2025, arXiv 2503.20783.
    """
    if group_size < 2 or rewards_BN.shape[0] % group_size:
        raise ValueError(
            f"group-relative advantages need groups of at least 2 responses that divide the batch; got groups of "
            f"{group_size} in a batch of {rewards_BN.shape[0]}"
        )
    rewards_PGN = rewards_BN.where(valid_BN, 0.0).unflatten(0, (-1, group_size))
    valid_PGN = valid_BN.unflatten(0, (-1, group_size))
    count_P1N = valid_PGN.sum(1, keepdim=True)
    mean_P1N = rewards_PGN.sum(1, keepdim=True) / count_P1N.clamp(min=1)
    centred_PGN = (rewards_PGN - mean_P1N) * (valid_PGN & (count_P1N >= 2))
    if scale:
        variance_P1N = centred_PGN.square().sum(1, keepdim=True) / (count_P1N - 1).clamp(min=1)
        centred_PGN = centred_PGN / (variance_P1N.sqrt() + 1e-4)
    advantages_BN: Tensor = centred_PGN.flatten(0, 1)
    return advantages_BN


def masked_sum(values: Tensor, mask: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Sum and count of ``values`` where ``mask``, over ``dims``: the parts that add up over ranks.

    ``mask`` is broadcastable to ``values``. Where it is False the value is ignored, NaN included.
    """
    mask = mask.expand_as(values)
    return values.where(mask, 0.0).sum(dims), mask.sum(dims).to(values.dtype)
