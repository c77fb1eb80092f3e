"""Reference policies: what the policy must not drift away from.

Legend: B sequences, T response tokens, L prompt and response tokens.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moa_lightning.distributed.shards import full_tensor_on_first, reshard, shard_like
from moa_lightning.errors import UserError
from moa_lightning.models.policy import Policy, PolicyOutput
from moa_lightning.models.sharding import copy_shards


class Reference(ABC):
    """Computes log-probabilities of responses under the reference policy."""

    def check(self, has_adapter: bool) -> None:
        """Refuse a policy that this reference cannot work with, before any model is loaded."""

    @abstractmethod
    def setup(self, policy: Policy) -> None:
        """Copy what is needed from the freshly loaded policy, before a checkpoint is restored into it."""

    def shard(self, policy: Policy, shard_policy: Callable[[Policy], None]) -> None:
        """Shard what :meth:`setup` copied. The policy has been sharded and has its weights by now.

        During :meth:`setup` the policy may have been on the meta device, without weights.

        Args:
            policy: sharded, with its weights.
            shard_policy: shards a policy in place.
        """

    def advance(self, policy: Policy, step: int) -> None:
        """Called before each collected batch, with the number of optimiser steps so far."""

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint: plain containers and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint, after :meth:`setup`."""

    def behaviour_logprobs(
        self, policy: Policy, input_ids_BL: Tensor, attention_mask_BL: Tensor, mask_BT: Tensor, temperature: float
    ) -> Tensor | None:
        """Log-probabilities under the policy as it was loaded, where those differ from :meth:`logprobs`."""
        return None

    @abstractmethod
    def logprobs(
        self,
        policy: Policy,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor,
        mask_BT: Tensor,
        temperature: float,
        group_B: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities (B, T), float32, nats, 0 on masked tokens; without gradient.

        ``group_B`` is the index of each response's prompt. ``None``: no two responses share a prompt.
        """


class AdapterOff(Reference):
    """The policy with its adapter disabled, so that no second copy of the model is in memory. For LoRA."""

    def check(self, has_adapter: bool) -> None:
        """Refuse a policy without an adapter."""
        if not has_adapter:
            raise UserError(
                "reference AdapterOff needs an adapter: set policy.lora, or use reference FrozenCopy for full "
                "fine-tuning"
            )

    def setup(self, policy: Policy) -> None:
        """Copy nothing: the base model is part of the policy."""

    @torch.no_grad()
    def logprobs(
        self,
        policy: Policy,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor,
        mask_BT: Tensor,
        temperature: float,
        group_B: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities under the base model."""
        with policy.adapter_off():
            output: PolicyOutput = policy(input_ids_BL, attention_mask_BL, mask_BT, temperature, with_values=False)
        return output.logprobs_BT


class FrozenCopy(Reference):
    """A copy of the policy as it was loaded. It stays outside the module tree: not saved, not cast, not optimised."""

    def __init__(self) -> None:
        self._copy: Policy | None = None
        self._is_sharded = False

    def setup(self, policy: Policy) -> None:
        """Copy the backbone and freeze the copy."""
        backbone: nn.Module = copy.deepcopy(policy.backbone)
        backbone.requires_grad_(False)
        self._copy = Policy(backbone, policy.tokenizer).eval()

    def shard(self, policy: Policy, shard_policy: Callable[[Policy], None]) -> None:
        """Shard the copy too, and copy the policy's shards into it."""
        assert self._copy is not None, "setup was not called"
        shard_policy(self._copy)
        copy_shards(policy.backbone, self._copy.backbone)
        self._is_sharded = True

    @torch.no_grad()
    def logprobs(
        self,
        policy: Policy,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor,
        mask_BT: Tensor,
        temperature: float,
        group_B: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities under the copy, which follows the policy to its device."""
        assert self._copy is not None, "setup was not called"
        if not self._is_sharded:  # the strategy has placed shards already
            self._copy.to(input_ids_BL.device)
        output: PolicyOutput = self._copy(input_ids_BL, attention_mask_BL, mask_BT, temperature)
        reshard(self._copy)  # the root reshards in a backward pass only, and there is none
        return output.logprobs_BT


class LaggedCopy(Reference):
    """The policy as it was a while ago: every ``interval`` steps the policy of ``interval`` steps before.

    It keeps the trained weights only (with LoRA, the adapter's) and swaps them in for each forward pass, so there is no
    second model. The checkpoint holds them.

    Source: the lagged reference of Agnihotri et al., arXiv 2505.10892, Algorithm 1, where ``interval`` is t0.

    Args:
        interval: optimiser steps between two refreshes.
    """

    def __init__(self, interval: int = 500) -> None:
        if interval < 1:
            raise UserError(f"LaggedCopy.interval must be at least 1, got {interval}")
        self.interval = interval
        self._step = 0  # of the last refresh
        self._first: list[Tensor] = []  # as loaded: the policy that the data are assumed to come from
        self._lagged: list[Tensor] = []
        self._next: list[Tensor] = []  # becomes the lagged one at the next refresh

    def setup(self, policy: Policy) -> None:
        """Copy the trained weights."""
        self._first = self._lagged = self._next = _copy_of(policy)

    def shard(self, policy: Policy, shard_policy: Callable[[Policy], None]) -> None:
        """Copy the shards instead."""
        self.setup(policy)

    def advance(self, policy: Policy, step: int) -> None:
        """Refresh the lagged weights when the interval is over."""
        if step >= self._step + self.interval:
            self._lagged, self._next = self._next, _copy_of(policy)
            self._step = step

    @torch.no_grad()
    def logprobs(
        self,
        policy: Policy,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor,
        mask_BT: Tensor,
        temperature: float,
        group_B: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities under the lagged policy."""
        with _weights(policy, self._lagged):
            output: PolicyOutput = policy(input_ids_BL, attention_mask_BL, mask_BT, temperature, with_values=False)
        return output.logprobs_BT

    @torch.no_grad()
    def behaviour_logprobs(
        self, policy: Policy, input_ids_BL: Tensor, attention_mask_BL: Tensor, mask_BT: Tensor, temperature: float
    ) -> Tensor | None:
        """Log-probabilities under the policy as it was loaded; ``None`` while that is the reference."""
        if self._lagged is self._first:
            return None
        with _weights(policy, self._first):
            output: PolicyOutput = policy(input_ids_BL, attention_mask_BL, mask_BT, temperature, with_values=False)
        return output.logprobs_BT

    def state_dict(self) -> dict[str, Any]:
        """The two copies that change and the step of the last refresh. Sharded weights are gathered on rank 0 only."""
        moved = self._lagged is not self._first
        return {
            "step": self._step,
            "lagged": [full_tensor_on_first(weight) for weight in self._lagged] if moved else None,
            "next": [full_tensor_on_first(weight) for weight in self._next] if self._next is not self._first else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the copies and the step. Copies that never changed come from the policy's folder."""
        self._step = state["step"]

        def restored(saved: list[Tensor] | None) -> list[Tensor]:
            if saved is None:
                return self._first
            return [shard_like(new, old) for new, old in zip(saved, self._first, strict=True)]

        self._lagged, self._next = restored(state["lagged"]), restored(state["next"])


def _copy_of(policy: Policy) -> list[Tensor]:
    reshard(policy)
    return [parameter.detach().clone() for parameter in policy.trainable()[0]]


@contextmanager
def _weights(policy: Policy, weights: list[Tensor]) -> Iterator[None]:
    """Context manager: replaces the policy's trained weights.

    Unsharded tensors are swapped without a copy. Shards are copied over, because FSDP holds on to their memory.
    """
    is_sharded = reshard(policy)  # replaces the parameters by their shards
    parameters = policy.trainable()[0]
    present = _copy_of(policy) if is_sharded else [parameter.data for parameter in parameters]

    def set_weights(values: list[Tensor]) -> None:
        reshard(policy)
        for parameter, weight in zip(parameters, values, strict=True):
            if is_sharded:
                parameter.data.copy_(weight)
            else:
                parameter.data = weight.to(parameter.device)
        torch.clear_autocast_cache()  # its keys are parameter objects, which stay the same

    try:
        set_weights(weights)
        yield
    finally:
        set_weights(present)
