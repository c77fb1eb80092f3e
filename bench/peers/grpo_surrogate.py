"""Surrogate losses and their gradients by TRL's ``GRPOTrainer`` on given log-probabilities.

In the environment of :mod:`bench.peers.chat_dpo`, from the top of the repository::

    python -m bench.peers.grpo_surrogate

It prints the numbers that ``tests/losses/test_clipped_surrogate.py`` holds ``ClippedSurrogate`` to, for each row of
:data:`SETTINGS`.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "epsilon_high": {"epsilon_high": 0.5},
    "delta": {"delta": 1.6},
    "both": {"epsilon_high": 0.3, "delta": 1.4},
    "sequence": {"importance_sampling_level": "sequence"},
    "sequence, epsilon_high": {"importance_sampling_level": "sequence", "epsilon_high": 0.32},
    "sequence, both": {"importance_sampling_level": "sequence", "epsilon_high": 0.05, "delta": 1.08},
}
"""Options by the names that both trainers have for them. TRL's ``loss_type`` is ``dapo``, for sequences ``grpo``."""

EPSILON = 0.2


def surrogate_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities and those of the policy that sampled, (6, 5), the mask, and an advantage for each response."""
    steps_BT = torch.arange(30, dtype=torch.float64).view(6, 5)
    behaviour_BT = -1.5 - torch.cos(1.3 * steps_BT)
    logprobs_BT = behaviour_BT + 0.9 * torch.sin(2.1 * steps_BT) + 0.1
    mask_BT = torch.arange(5) < torch.tensor([5, 3, 1, 4, 5, 2]).unsqueeze(1)
    return logprobs_BT, behaviour_BT, mask_BT, torch.tensor([1.0, -0.5, 0.7, -1.2, 0.4, -2.0], dtype=torch.float64)


def main() -> None:
    """Print loss, and the norm of its gradient by the log-probabilities."""
    from trl import GRPOTrainer

    logprobs_BT, behaviour_BT, mask_BT, advantages_B = surrogate_case()
    for name, options in SETTINGS.items():
        given_BT = logprobs_BT.clone().requires_grad_()
        level = options.get("importance_sampling_level", "token")
        trainer: Any = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *_, given_BT=given_BT, **__: (given_BT, given_BT * 0, None),
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level=level,
            beta=0.0,
            loss_type="grpo" if level == "sequence" else "dapo",
            epsilon_low=EPSILON,
            epsilon_high=options.get("epsilon_high", EPSILON),
            args=SimpleNamespace(delta=options.get("delta"), steps_per_generation=1),
            use_vllm=False,
            model=SimpleNamespace(training=True),
            current_gradient_accumulation_steps=1,
            accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
            _entropy_bonus_enabled=False,
            _metrics={"train": _Forgetful()},
        )
        nothing = torch.zeros(6, 0, dtype=torch.long)
        inputs = {
            "prompt_ids": nothing,
            "prompt_mask": nothing,
            "completion_ids": torch.zeros(6, 5, dtype=torch.long),
            "completion_mask": mask_BT.double(),
            "advantages": advantages_B,
            "old_per_token_logps": behaviour_BT,
            "num_items_in_batch": mask_BT.sum(),
        }
        loss = GRPOTrainer._compute_loss(trainer, None, inputs)
        loss.backward()
        assert given_BT.grad is not None
        print(f"{name:22} {float(loss.detach()):.12f} {float(given_BT.grad.norm()):.12f}")


class _Forgetful(dict[str, list[float]]):
    """Lists that are there when they are asked for."""

    def __missing__(self, key: str) -> list[float]:
        return []


if __name__ == "__main__":
    main()
