"""Several references at once.

Legend: B sequences, T response tokens, L prompt and response tokens, K references.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from moa_lightning.distributed.shards import reshard
from moa_lightning.errors import UserError
from moa_lightning.functional.pairwise import clip_around_first, confidence_weights, virtual_reference
from moa_lightning.models.loading import disable_dropout
from moa_lightning.models.policy import Policy, PolicyOutput
from moa_lightning.models.reference import AdapterOff, FrozenCopy, Reference
from moa_lightning.utils.pretrained import open_pretrained, open_tokenizer


@dataclass
class MultiReference(Reference):
    """The policy as it was loaded and other models, as one virtual reference: ``log p~ = -log sum_k a_k / p_k``.

    With loss ``PairwiseLogistic`` this is MRPO. The virtual reference is defined for complete responses. The tokens
    carry the first reference's log-probabilities; the difference to the virtual one is added at the last token.

    Source: Le et al. 2024, "Multi-Reference Preference Optimization", arXiv 2405.16388.

    Args:
        paths: folders or hub ids of the other references. They must share the policy's vocabulary.
        weights: a, of the policy as loaded and then of each path; divided by their sum. ``None`` computes them for each
            prompt, by how far apart each reference puts its responses.
        cliprange: clips the other log-probabilities to 1 +- this times the first one's; ``None`` does not clip.
        dtype: of the other references' weights; ``auto`` is the checkpoint's.
        trust_remote_code: run code that comes with the checkpoints. Off unless asked for.
    """

    paths: list[str]
    weights: list[float] | None = None
    cliprange: float | None = 0.1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False
    _first: Reference = field(default_factory=FrozenCopy, init=False, repr=False, compare=False)
    _others: list[Policy] = field(default_factory=list, init=False, repr=False, compare=False)
    _is_sharded: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Validate hyperparameters."""
        if not self.paths:
            raise UserError("MultiReference needs at least one path beside the policy itself")
        if self.cliprange is not None and not 0 <= self.cliprange < 1:
            raise UserError(f"MultiReference.cliprange must lie in [0, 1) (or be null), got {self.cliprange}")
        if self.weights is None:
            return
        if len(self.weights) != len(self.paths) + 1:
            raise UserError(
                f"MultiReference.weights must hold {len(self.paths) + 1} numbers, for the policy as loaded and then "
                f"for each path; got {len(self.weights)}"
            )
        if min(self.weights) < 0 or sum(self.weights) == 0:
            raise UserError(f"MultiReference.weights must be >= 0 and not all 0, got {self.weights}")

    def check(self, has_adapter: bool) -> None:
        """Open each reference's config."""
        from transformers import AutoConfig

        self._first = AdapterOff() if has_adapter else FrozenCopy()
        for path in self.paths:
            self._open(AutoConfig, path, "model config")

    def setup(self, policy: Policy) -> None:
        """Load the other references and compare their vocabularies with the policy's.

        Raises:
            UserError: the vocabularies differ.
        """
        from transformers import AutoModelForCausalLM

        self._first.setup(policy)
        self._others = []
        for path in self.paths:
            tokenizer = open_tokenizer(path, trust_remote_code=self.trust_remote_code)
            if tokenizer.get_vocab() != policy.tokenizer.get_vocab():
                raise UserError(
                    f"reference '{path}' has another vocabulary than the policy: its log-probabilities of the same "
                    "tokens mean something else. Choose references of the policy's family"
                )
            model = self._open(AutoModelForCausalLM, path, "causal language model", dtype=self.dtype)
            disable_dropout(model)
            self._others.append(Policy(model.requires_grad_(False), policy.tokenizer).eval())

    def shard(self, policy: Policy, shard_policy: Callable[[Policy], None]) -> None:
        """Shard each of the references."""
        self._first.shard(policy, shard_policy)
        for other in self._others:
            shard_policy(other)
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
        """Log-probabilities whose sum over a response is the virtual reference's log-probability."""
        inputs = (input_ids_BL, attention_mask_BL, mask_BT, temperature)
        first_BT = self._first.logprobs(policy, *inputs)
        sums = [first_BT.sum(1)]
        for other in self._others:
            if not self._is_sharded:
                other.to(input_ids_BL.device)
            output: PolicyOutput = other(*inputs)
            reshard(other)  # the root reshards in a backward pass only, and there is none
            sums.append(output.logprobs_BT.sum(1))
        logprobs_BK = torch.stack(sums, 1)
        if self.weights is not None:
            weights = logprobs_BK.new_tensor(self.weights)
            weights_BK = (weights / weights.sum()).expand_as(logprobs_BK)
        else:
            alone_B = torch.arange(len(mask_BT), device=mask_BT.device)
            weights_BK = confidence_weights(logprobs_BK, alone_B if group_B is None else group_B)
        if self.cliprange is not None:
            logprobs_BK = clip_around_first(logprobs_BK, self.cliprange)
        last_B = (mask_BT.sum(1) - 1).clamp(min=0)
        change_B = virtual_reference(logprobs_BK, weights_BK) - logprobs_BK[:, 0]
        result_BT = first_BT.clone()
        result_BT[torch.arange(len(last_B), device=last_B.device), last_B] += change_B
        return result_BT.where(mask_BT, 0.0)

    def behaviour_logprobs(
        self, policy: Policy, input_ids_BL: Tensor, attention_mask_BL: Tensor, mask_BT: Tensor, temperature: float
    ) -> Tensor:
        """Log-probabilities under the policy as it was loaded."""
        return self._first.logprobs(policy, input_ids_BL, attention_mask_BL, mask_BT, temperature)

    def _open(self, auto_class: Any, path: str, what: str, **arguments: Any) -> Any:
        try:
            return open_pretrained(auto_class, path, what, trust_remote_code=self.trust_remote_code, **arguments)
        except UserError as error:
            raise UserError(f"reference: {error}") from error
