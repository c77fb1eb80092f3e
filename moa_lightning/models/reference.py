"""References: what the policy must not drift away from.

Legend: B sequences, T response tokens, L prompt and response tokens.
"""

import copy
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from moa_lightning.models.policy import Policy, PolicyOutput


class Reference(ABC):
    """Gives log-probabilities of responses under the reference policy."""

    def check(self, has_adapter: bool) -> None:
        """Refuse a combination that cannot work, before any model is loaded."""

    @abstractmethod
    def setup(self, policy: Policy) -> None:
        """Take what is needed from the freshly loaded policy, before a checkpoint is restored into it."""

    @abstractmethod
    def logprobs(
        self, policy: Policy, input_ids_BL: Tensor, attention_mask_BL: Tensor, mask_BT: Tensor, temperature: float
    ) -> Tensor:
        """Log-probabilities (B, T), float32, nats, 0 on masked tokens; without gradient."""


class AdapterOff(Reference):
    """The policy with its adapter switched off: no second copy of the model in memory. For LoRA."""

    def check(self, has_adapter: bool) -> None:
        """Refuse a policy without an adapter."""
        if not has_adapter:
            raise ValueError(
                "reference AdapterOff needs an adapter: set policy.lora, or use reference FrozenCopy for full "
                "fine-tuning"
            )

    def setup(self, policy: Policy) -> None:
        """Take nothing."""

    @torch.no_grad()
    def logprobs(
        self, policy: Policy, input_ids_BL: Tensor, attention_mask_BL: Tensor, mask_BT: Tensor, temperature: float
    ) -> Tensor:
        """Log-probabilities under the base model."""
        with policy.adapter_off():
            output: PolicyOutput = policy(input_ids_BL, attention_mask_BL, mask_BT, temperature, with_values=False)
        return output.logprobs_BT


class FrozenCopy(Reference):
    """A copy of the policy as it was loaded. It stays outside the module tree: not saved, not cast, not optimised."""

    def __init__(self) -> None:
        self._copy: Policy | None = None

    def setup(self, policy: Policy) -> None:
        """Copy the backbone."""
        backbone: nn.Module = copy.deepcopy(policy.backbone)
        backbone.requires_grad_(False)
        self._copy = Policy(backbone, policy.tokenizer).eval()

    @torch.no_grad()
    def logprobs(
        self, policy: Policy, input_ids_BL: Tensor, attention_mask_BL: Tensor, mask_BT: Tensor, temperature: float
    ) -> Tensor:
        """Log-probabilities under the copy, which follows the policy to its device."""
        assert self._copy is not None, "setup was not called"
        self._copy.to(input_ids_BL.device)
        output: PolicyOutput = self._copy(input_ids_BL, attention_mask_BL, mask_BT, temperature)
        return output.logprobs_BT
