"""The policy: a causal language model with N value heads.

Legend: B sequences, P prompt tokens (left-padded), T response tokens (right-padded), L = P + T, N objectives,
D hidden size, V vocabulary, K selected tokens.
"""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moa_lightning.chat import end_tokens
from moa_lightning.distributed import any_rank, rank
from moa_lightning.distributed.shards import full_state_dict
from moa_lightning.errors import UserError
from moa_lightning.functional.logprobs import token_logprobs
from moa_lightning.models.value_heads import ValueHeads
from moa_lightning.signals import GradientPlace
from moa_lightning.utils.atomic_folder import atomic_folder
from moa_lightning.utils.non_finite import NonFiniteError, names_of_non_finite, some

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

RECORD = "moa.json"
"""Machine-readable facts about the policy in a folder."""


@dataclass(frozen=True)
class PolicyOutput:
    """One forward pass over prompts and responses."""

    logprobs_BT: Tensor  # float32, nats, 0 on masked tokens
    entropy_BT: Tensor  # float32, nats, 0 on masked tokens
    values_BTN: Tensor | None  # value of the state before token t
    hidden_BTD: Tensor  # the shared representation: last hidden state before token t


class FiniteLogits:
    """A logits processor that records whether a row of logits cannot be sampled from, and samples any token there.

    Without it, sampling fails in a GPU kernel, which ends the process. A logit of minus infinity is fine: that token is
    never sampled. The processor does not synchronise with the device.
    """

    def __init__(self) -> None:
        self.failed: Tensor = torch.tensor(False)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits (B, V), with 0 in the rows that cannot be sampled from."""
        bad_B = ~torch.isfinite(scores.amax(-1, keepdim=True))
        self.failed = self.failed.to(scores.device) | bad_B.any()
        return scores.masked_fill(bad_B, 0.0)


class Policy(nn.Module):
    """A causal language model whose forward pass gives log-probabilities, and N values from the same hidden states.

    Args:
        backbone: a ``PreTrainedModel`` for causal language modelling, or a ``PeftModel`` around one.
        tokenizer: saved with the policy; has the padding and end tokens.
        value_heads: N heads on the last hidden state; ``None`` without critics.
    """

    def __init__(
        self, backbone: Any, tokenizer: "PreTrainedTokenizerBase", value_heads: ValueHeads | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.value_heads = value_heads
        self.tokenizer = tokenizer
        self.end_ids = _end_ids(self.causal_lm, tokenizer)
        # For sampling from a sharded policy. It yields whether all processes must run equally many forward passes.
        self.generation_context: Callable[[nn.Module], AbstractContextManager[bool]] = lambda policy: nullcontext(False)
        self._watch = FiniteLogits()
        self._takes_positions = "position_ids" in inspect.signature(self.causal_lm.get_decoder().forward).parameters

    @property
    def causal_lm(self) -> "PreTrainedModel":
        """The model inside an adapter, or the backbone itself."""
        model: PreTrainedModel = self.backbone.get_base_model() if self.has_adapter else self.backbone
        return model

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder's blocks, in order; empty if the decoder has no ``ModuleList``."""
        rows = [m for m in self.causal_lm.get_decoder().children() if isinstance(m, nn.ModuleList)]
        return [block for row in rows for block in row]

    @property
    def has_adapter(self) -> bool:
        """Whether the backbone is a PEFT model."""
        return hasattr(self.backbone, "peft_config") and hasattr(self.backbone, "get_base_model")

    def forward(
        self,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor,
        mask_BT: Tensor,
        temperature: float = 1.0,
        with_values: bool = True,
    ) -> PolicyOutput:
        """Log-probabilities, entropies and values of the response tokens (the last T of L).

        Args:
            input_ids_BL: prompts, left-padded, followed by responses, right-padded.
            attention_mask_BL: 1 on real tokens.
            mask_BT: bool, the response tokens to compute.
            temperature: divides the logits.
            with_values: whether to run the value heads, if there are any.
        """
        length = mask_BT.shape[1]
        arguments: dict[str, Any] = {"attention_mask": attention_mask_BL, "use_cache": False}
        if self._takes_positions:  # absolute positions must not count the padding
            arguments["position_ids"] = (attention_mask_BL.long().cumsum(-1) - 1).clamp(min=0)
        hidden_BLD = self.causal_lm.get_decoder()(input_ids_BL, **arguments).last_hidden_state
        hidden_BTD = hidden_BLD[:, -length - 1 : -1]
        logprobs_BT, entropy_BT = token_logprobs(
            hidden_BTD, self.logits, input_ids_BL[:, -length:], mask_BT, temperature
        )
        values_BTN = self.value_heads(hidden_BTD) if with_values and self.value_heads is not None else None
        return PolicyOutput(logprobs_BT, entropy_BT, values_BTN, hidden_BTD)

    def logits(self, hidden_KD: Tensor) -> Tensor:
        """Logits (K, V) from hidden states, with the scalings that some architectures apply after the head."""
        logits_KV: Tensor = self.causal_lm.get_output_embeddings()(hidden_KD)
        config = self.causal_lm.config.get_text_config()
        if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits_KV = logits_KV * factor
        if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits_KV = logits_KV / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2
            logits_KV = (logits_KV / cap).tanh() * cap
        return logits_KV

    @torch.no_grad()
    def check_logits(self) -> None:
        """Compare :meth:`logits` with the model's own logits on two tokens, to detect an unknown scaling.

        Raises:
            NonFiniteError: the model's logits are not finite.
            UserError: they differ.
        """
        device = next(self.backbone.parameters()).device
        ids = torch.tensor([[self.end_ids[0], self.end_ids[0]]], device=device)
        training = self.training
        self.eval()
        own = self.logits(self.causal_lm.get_decoder()(ids, use_cache=False).last_hidden_state)
        theirs = self.causal_lm(ids, use_cache=False).logits
        self.train(training)
        if not bool(torch.isfinite(theirs.amax())):
            raise NonFiniteError("the policy's logits are not finite: its weights are damaged; start from another one")
        if not torch.allclose(own.float(), theirs.float(), rtol=1e-2, atol=1e-2):
            raise UserError(
                f"{type(self.causal_lm).__name__} changes its logits after the output embedding in a way that is not "
                "known here; its log-probabilities would be wrong. Please report the model type"
            )

    @torch.no_grad()
    def generate(self, input_ids_BP: Tensor, attention_mask_BP: Tensor, config: "GenerationConfig") -> Tensor:
        """Sample responses; returns prompts and responses, (B, P + T), padded after the end token.

        It stops when all responses have ended. Afterwards, ``sampled_from_finite`` is whether all logits were finite.
        """
        from transformers import LogitsProcessorList

        watch = FiniteLogits()
        self._watch = watch
        with self._only_generation_config(config), self.generation_context(self) as in_step:
            return self.backbone.generate(  # type: ignore[no-any-return]  # a PreTrainedModel's or a PeftModel's
                input_ids=input_ids_BP,
                attention_mask=attention_mask_BP,
                generation_config=config,
                logits_processor=LogitsProcessorList([watch]),
                synced_gpus=in_step,
            )

    @property
    def sampled_from_finite(self) -> bool:
        """Whether all logits of the last :meth:`generate` were finite. Synchronises with the device."""
        return not bool(self._watch.failed)

    @contextmanager
    def _only_generation_config(self, config: "GenerationConfig") -> Iterator[None]:
        """Context manager: the model has no generation config of its own.

        transformers fills what ``config`` leaves unset (repetition penalty, minimum length, suppressed tokens, …) from
        the model's generation config. Responses would be sampled from another distribution than the one whose
        log-probabilities are trained. The model's own config is restored afterwards, and saved with the policy.
        """
        from transformers import GenerationConfig

        holders = [model for model in (self.causal_lm, self.backbone) if hasattr(model, "generation_config")]
        own = [model.generation_config for model in holders]
        for model in holders:
            model.generation_config = GenerationConfig(
                eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
            )
        try:
            yield
        finally:
            for model, settings in zip(holders, own, strict=True):
                model.generation_config = settings

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Context manager: disables the adapter, if there is one."""
        with self.backbone.disable_adapter() if self.has_adapter else nullcontext():
            yield

    def trainable(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Trained parameters of the model and of the value heads, as two lists."""
        heads = list(self.value_heads.parameters()) if self.value_heads is not None else []
        return [p for p in self.backbone.parameters() if p.requires_grad], heads

    def parameters_at(self, place: GradientPlace) -> list[nn.Parameter] | None:
        """Trained parameters at a place of the model; ``None`` for the representation, which has none.

        Raises:
            UserError: the decoder has no list of blocks, or none of them is trained.
        """
        if place is GradientPlace.REPRESENTATION:
            return None
        if place is GradientPlace.PARAMETERS:
            return self.trainable()[0]
        for block in reversed(self.blocks):
            if trained := [p for p in block.parameters() if p.requires_grad]:
                return trained
        raise UserError(
            f"{type(self.causal_lm).__name__} has no last layer with trained parameters that is known here; take the "
            "combiner's gradients at the representation, or at all parameters"
        )

    def save_pretrained(self, folder: str | Path, record: Mapping[str, Any] | None = None) -> None:
        """Write the policy, its tokenizer and its value heads in Hugging Face format.

        With an adapter, the base model is not written. Every process calls this method, and rank 0 writes. It replaces
        an existing folder once the new one is complete.

        Args:
            folder: the folder to write.
            record: plain values about this policy, written as ``moa.json``.

        Raises:
            NonFiniteError: a trained weight is NaN or infinite.
            UserError: the folder cannot be written.
        """
        bad = names_of_non_finite({name: p for name, p in self.named_parameters() if p.requires_grad})
        if any_rank(bool(bad), next(self.parameters()).device):
            raise NonFiniteError(
                f"the policy is not written to '{folder}': its weights are not finite "
                f"({some(bad) if bad else 'on another process'}); moa export takes an earlier one from a checkpoint"
            )
        model, heads = full_state_dict(self.backbone), full_state_dict(self.value_heads) if self.value_heads else {}
        if rank() != 0:
            return
        for copied, origin in self.causal_lm.all_tied_weights_keys.items():
            if model.get(origin) is not None:  # a state dict that was gathered from shards holds tied weights twice
                model.pop(copied, None)
        with atomic_folder(folder, overwrite=True, only_writer=True) as target:
            self.backbone.save_pretrained(target, state_dict=model)
            self.tokenizer.save_pretrained(target)
            if self.value_heads is not None:
                self.value_heads.save(target, heads)
            if record is not None:
                (target / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _end_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokens that end a response: the tokenizer's, its chat template's, and those of the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    several: Sequence[int | None] = configured if isinstance(configured, list) else [configured]
    vocabulary = model.config.get_text_config().vocab_size
    ids = [*end_tokens(tokenizer), *several]
    return list(dict.fromkeys(int(i) for i in ids if i is not None and 0 <= int(i) < vocabulary))
