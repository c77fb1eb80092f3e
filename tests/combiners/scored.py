"""Scored responses for the tests of the combiners that read scores."""

import torch

from moa_lightning.types import Experience, Responses, RewardTable


def draw(seed=0, prompts=3, responses=4, objectives=3):
    generator = torch.Generator().manual_seed(seed)
    scores_BN = torch.randn(prompts * responses, objectives, generator=generator)
    return scores_BN, torch.arange(prompts).repeat_interleave(responses)


def experience(scores_BN, group_B, mask_B=None, penalty_B=None, kl_penalty_B=None):
    """A collected batch in which NaN is what an objective could not score."""
    count, objectives = scores_BN.shape
    mask_BT = torch.ones(count, 2, dtype=torch.bool)
    mask_BT = mask_BT if mask_B is None else mask_BT & mask_B.unsqueeze(1)
    names, texts, tokens_BL = tuple("abcdefghijklmnop"[:objectives]), [""] * count, torch.ones(count, 3)
    return Experience(
        responses=Responses(tokens_BL, tokens_BL, mask_BT, ~mask_BT[:, 0], texts, texts, {}),
        rewards=RewardTable(names, (True,) * objectives, scores_BN, scores_BN),
        valid_BN=scores_BN.isfinite(),
        mask_BT=mask_BT,
        behaviour_logprobs_BT=torch.zeros(count, 2),
        reference_logprobs_BT=torch.zeros(count, 2),
        advantages_BTN=torch.zeros(count, 2, objectives),
        returns_BTN=None,
        values_BTN=None,
        tokens_per_row=2.0,
        group_B=group_B,
        penalty_B=penalty_B,
        kl_penalty_B=kl_penalty_B,
    )


def run(combiner, rows, steps=1):
    """State after the batch was collected ``steps`` times, and the combination of all its rows."""
    names = rows.rewards.names
    state = combiner.init(names, torch.ones(len(names)))
    for _ in range(steps):
        state = combiner.observe(rows, state)
    return state, combiner.combine(rows, state)
