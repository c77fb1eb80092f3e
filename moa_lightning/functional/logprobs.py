"""Log-probabilities of chosen tokens without the full log-softmax in memory.

Legend: B sequences, T tokens, K selected tokens, C tokens of one chunk, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden_BTD: Tensor,
    head: Callable[[Tensor], Tensor],
    tokens_BT: Tensor,
    mask_BT: Tensor,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and entropy of each distribution, a chunk of tokens at a time.

    Only ``chunk_size`` rows of logits exist at once, also in the backward pass, which recomputes each chunk's logits.
    Masked tokens are not computed at all.

    Args:
        hidden_BTD: last hidden state that predicts the token at the same position.
        head: maps hidden states ``(K, D)`` to logits ``(K, V)``.
        tokens_BT: int64, the tokens that were chosen.
        mask_BT: bool, the tokens that count.
        temperature: the logits are divided by it, in the same way as in sampling.
        chunk_size: tokens per chunk.

    Returns:
        ``(logprobs_BT, entropy_BT)``, float32, in nats, 0 where masked.
    """
    mask_BT = mask_BT.bool()
    hidden_KD, tokens_K = hidden_BTD[mask_BT], tokens_BT[mask_BT]
    remember = torch.is_grad_enabled() and len(tokens_K) > chunk_size

    def chunk(hidden_CD: Tensor, tokens_C: Tensor) -> tuple[Tensor, Tensor]:
        logits_CV = head(hidden_CD).float()
        if temperature != 1:
            logits_CV = logits_CV / temperature
        logprobs_C, entropy_C = _LogprobAndEntropy.apply(  # type: ignore[no-untyped-call]  # torch types it so
            logits_CV, tokens_C
        )
        return logprobs_C, entropy_C

    parts = [
        checkpoint(chunk, h, t, use_reentrant=False) if remember else chunk(h, t)
        for h, t in zip(hidden_KD.split(chunk_size), tokens_K.split(chunk_size), strict=True)
    ]
    empty_BT = torch.zeros(mask_BT.shape, dtype=torch.float32, device=hidden_BTD.device)
    logprobs_BT = empty_BT.masked_scatter(mask_BT, torch.cat([p[0] for p in parts]))
    entropy_BT = empty_BT.masked_scatter(mask_BT, torch.cat([p[1] for p in parts]))
    return logprobs_BT, entropy_BT


class _LogprobAndEntropy(torch.autograd.Function):
    """Log-probability and entropy from one chunk's logits, as a single node of the graph.

    Checkpointing frees recomputed tensors only after the backward pass has read them. If the entropy had its own nodes,
    a loss without an entropy bonus would never read them, and those of all chunks would stay: (B, T, V) in total.
    """

    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, tokens_C: Tensor) -> tuple[Tensor, Tensor]:
        # In place: most of the time goes to the memory of another (C, V), not to arithmetic.
        all_CV = logits_CV.log_softmax(-1)
        logprobs_C = all_CV.gather(-1, tokens_C.unsqueeze(-1)).squeeze(-1)
        entropy_C = -all_CV.exp().mul_(_finite_(all_CV)).sum(-1)
        ctx.save_for_backward(logits_CV, tokens_C)
        ctx.set_materialize_grads(False)
        return logprobs_C, entropy_C

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:
        by_logprob_C, by_entropy_C = gradients
        logits_CV, tokens_C = ctx.saved_tensors
        all_CV = logits_CV.log_softmax(-1)
        of_entropy_CV = None
        if by_entropy_C is not None:  # dH / d logits = -p (log p + H)
            probabilities_CV = all_CV.exp()
            finite_CV = _finite_(all_CV.clone())
            entropy_C1 = -(probabilities_CV * finite_CV).sum(-1, keepdim=True)
            of_entropy_CV = (by_entropy_C.unsqueeze(-1) * probabilities_CV).mul_(finite_CV.add_(entropy_C1)).neg_()
        if by_logprob_C is None:
            return (torch.zeros_like(logits_CV) if of_entropy_CV is None else of_entropy_CV), None
        # d log p(token) / d logits = onehot - p
        gradient_CV = all_CV.exp_().mul_(-by_logprob_C.unsqueeze(-1))
        gradient_CV.scatter_add_(-1, tokens_C.unsqueeze(-1), by_logprob_C.unsqueeze(-1))
        return (gradient_CV if of_entropy_CV is None else gradient_CV.add_(of_entropy_CV)), None


def _finite_(all_CV: Tensor) -> Tensor:
    # p log p with probability 0 on a log-probability of -inf must be 0, not NaN.
    return all_CV.clamp_(min=torch.finfo(all_CV.dtype).min)
