"""Log-probabilities of chosen tokens without the whole log-softmax in memory.

Legend: B sequences, T tokens, K selected tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable

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

    Only ``chunk_size`` rows of logits exist at once, in the backward pass too: each chunk's logits are computed
    again there. Masked tokens are not computed at all.

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
        logits_CV = head(hidden_CD).float() / temperature
        normaliser_C = logits_CV.logsumexp(-1)
        logprobs_C = logits_CV.gather(-1, tokens_C.unsqueeze(-1)).squeeze(-1) - normaliser_C
        # E[logit] with probability 0 on a logit of -inf must be 0, not NaN.
        expected_C = (logits_CV.softmax(-1) * logits_CV.clamp(min=torch.finfo(logits_CV.dtype).min)).sum(-1)
        return logprobs_C, normaliser_C - expected_C

    parts = [
        checkpoint(chunk, h, t, use_reentrant=False) if remember else chunk(h, t)
        for h, t in zip(hidden_KD.split(chunk_size), tokens_K.split(chunk_size), strict=True)
    ]
    empty_BT = torch.zeros(mask_BT.shape, dtype=torch.float32, device=hidden_BTD.device)
    logprobs_BT = empty_BT.masked_scatter(mask_BT, torch.cat([p[0] for p in parts]))
    entropy_BT = empty_BT.masked_scatter(mask_BT, torch.cat([p[1] for p in parts]))
    return logprobs_BT, entropy_BT
