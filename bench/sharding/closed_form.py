"""The memory of a policy in training, counted from its shape alone: the closed form that measurements are held against.

Everything is per process, in bytes. Parameters are cut along their first dimension into as many pieces as there are
processes in a row of the mesh; each piece has the size of the largest one, so a dimension that does not come out even
costs padding. Weights, gradients and optimiser state are float32 whatever the computation is in: 4 bytes for a weight,
4 for a gradient, 8 for AdamW's two moments, and 4 for each tensor's step (Rajbhandari et al. 2020, arXiv 1910.02054,
section 3.1, where mixed precision holds a second copy of the weights in 16 bits: here that copy exists for one block at
a time, while it is gathered).

What one block keeps from its forward to its backward pass is counted tensor by tensor, as Korthikanti et al. 2022
(arXiv 2205.05198, section 4.1) do, with these differences: dropout is off (their 1 + 1 + 2 as/h terms), attention
keeps q, k, v, its output and one number for each row instead of the scores (their 5 as/h term), and what the models of
transformers keep beyond that is added, since it is there: the steps of GPT-2's tanh-GELU, float32 copies in Llama's
norms, and one attention mask in the precision of the computation for each block.

Legend: h hidden size, f size of the inner layer, a heads, V vocabulary, B sequences, L tokens of each, T trained ones.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

Weights = list[tuple[int, int]]  # rows and columns of each; a vector has one column
EXACT = 4  # bytes of a float32
RANK = 16  # of the adapter
CHUNK = 1024  # rows of logits at once: the default of functional.token_logprobs


@dataclass(frozen=True)
class Work:
    """What is trained, and on what.

    Args:
        lora: train an adapter; the policy without it is the reference. Else a frozen copy of the policy is.
        element: bytes of a number in the computation: 4 for float32, 2 for bfloat16.
        checkpointed: each block keeps its input alone, and computes the rest again.
        sequences: B, on each process.
        length: L.
        trained: T, the last tokens of each sequence.
        objectives: value heads.
    """

    lora: bool = False
    element: int = 2
    checkpointed: bool = False
    sequences: int = 4
    length: int = 512
    trained: int = 384
    objectives: int = 2


@dataclass(frozen=True)
class Decoder(ABC):
    """The shape of a decoder."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int

    @abstractmethod
    def block(self) -> Weights:
        """Weights of one block."""

    @abstractmethod
    def outside(self) -> Weights:
        """Weights that are in no block, the language-model head among them unless it is the embedding."""

    @abstractmethod
    def head(self) -> Weights:
        """Weights of the language-model head that are not the embedding's: a classifier has none."""

    @abstractmethod
    def adapter(self) -> Weights:
        """Weights of a LoRA adapter in one block, where peft puts it by default."""

    @abstractmethod
    def kept(self, work: Work) -> float:
        """Bytes that one block keeps for each token."""

    @abstractmethod
    def norm(self, work: Work) -> int:
        """Bytes that a norm keeps for each token."""

    @property
    @abstractmethod
    def cached(self) -> int:
        """Numbers that one block caches for each token while sampling."""


@dataclass(frozen=True)
class GPT2(Decoder):
    """Absolute positions, norms with bias, tanh-GELU; the head is the embedding."""

    positions: int = 1024

    def block(self) -> Weights:
        """12 h^2 + 13 h."""
        h = self.hidden
        matrices = [(h, 3 * h), (h, h), (h, 4 * h), (4 * h, h)]
        return [*matrices, (3 * h, 1), (h, 1), (4 * h, 1), (h, 1), *[(h, 1)] * 4]

    def outside(self) -> Weights:
        """Embeddings of tokens and positions, the last norm."""
        return [(self.vocabulary, self.hidden), (self.positions, self.hidden), *[(self.hidden, 1)] * 2]

    def head(self) -> Weights:
        """None of its own."""
        return []

    def adapter(self) -> Weights:
        """At the projection to q, k, v."""
        return [(RANK, self.hidden), (3 * self.hidden, RANK)]

    def kept(self, work: Work) -> float:
        """Full: 28 h = norms 2, input of q, k, v 1, these 3, output 1, input of the inner layer 1, GELU 16, result 4.

        GELU keeps x, x / 2, tanh and 1 + tanh, since it is spelt out; as one kernel it would keep x: 16 h, which
        is Korthikanti's count. An adapter at q, k, v needs neither the inputs of the inner layers.
        """
        h = self.hidden
        own = 2 * self.norm(work) + work.element * h * (1 + 3 + 1 + 16 + (0 if work.lora else 1 + 4))
        return own + work.element * RANK * work.lora + _attention(self, work)

    def norm(self, work: Work) -> int:
        """Its input; mean and inverse deviation."""
        return work.element * (self.hidden + 2)

    @property
    def cached(self) -> int:
        """Keys and values."""
        return 2 * self.hidden


@dataclass(frozen=True)
class Llama(Decoder):
    """Rotary positions, norms without bias, a gated inner layer; the head has its own weights."""

    inner: int = 11008
    groups: int = 32  # heads of keys and values

    @property
    def _narrow(self) -> int:
        return self.hidden * self.groups // self.heads

    def block(self) -> Weights:
        """q, k, v, output; gate, up, down; two norms."""
        h, f = self.hidden, self.inner
        return [(h, h), (self._narrow, h), (self._narrow, h), (h, h), (f, h), (f, h), (h, f), (h, 1), (h, 1)]

    def outside(self) -> Weights:
        """Embedding, head, last norm."""
        return [(self.vocabulary, self.hidden), *self.head(), (self.hidden, 1)]

    def head(self) -> Weights:
        """As large as the embedding."""
        return [(self.vocabulary, self.hidden)]

    def adapter(self) -> Weights:
        """At the projections to q and v."""
        h, narrow = self.hidden, self._narrow
        return [(RANK, h), (h, RANK), (RANK, h), (narrow, RANK)]

    def kept(self, work: Work) -> float:
        """Norms; q, k, v, their input, the output; gate, its SiLU, up; full: the inputs of the inner layers too."""
        h, f = self.hidden, self.inner
        attention = 5 * h  # keys and values are repeated for each head, and then kept
        inner = 3 * f + (0 if work.lora else h + f)
        own = 2 * self.norm(work) + work.element * (attention + inner)
        return own + work.element * 2 * RANK * work.lora + _attention(self, work)

    def norm(self, work: Work) -> int:
        """Its input in float32, one number, and what is multiplied by the weights if those are trained."""
        return EXACT * (self.hidden + 1) + (0 if work.lora else work.element * self.hidden)

    @property
    def cached(self) -> int:
        """Keys and values, of the groups."""
        return 2 * self._narrow


def _attention(shape: Decoder, work: Work) -> float:
    # For each token: a number for each head in float32, and a row of the mask in the precision of the computation.
    return EXACT * shape.heads + work.element * work.length


def pieces(weights: Iterable[tuple[int, int]], shards: int) -> int:
    """Numbers in the pieces of these weights that one process holds, padding included."""
    return sum(ceil(rows / shards) * columns for rows, columns in weights)


def closed_form(shape: Decoder, work: Work, shards: int) -> dict[str, int]:
    """Bytes on each process, by the name of the part; ``shards`` processes share one copy of the model."""
    blocks, adapters = shape.block() * shape.layers, shape.adapter() * shape.layers * work.lora
    backbone = blocks + shape.outside()
    heads: Weights = [(work.objectives, shape.hidden), (work.objectives, 1)]
    trained = (adapters if work.lora else backbone) + heads
    outer = work.element * shards * pieces(shape.outside(), shards)
    block = work.element * shards * pieces(shape.block() + shape.adapter() * work.lora, shards)
    tokens, rows = work.sequences * work.length, min(CHUNK, work.sequences * work.trained)
    of_blocks = tokens * shape.kept(work) if not work.checkpointed else tokens * work.element * shape.hidden
    hidden = work.element * shape.hidden
    around = tokens * (hidden + shape.norm(work)) + work.sequences * work.trained * hidden
    return {
        "parameters": EXACT * pieces(backbone + adapters + heads, shards),
        "gradients": EXACT * pieces(trained, shards),
        "optimizer": 2 * EXACT * pieces(trained, shards) + EXACT * len(trained),
        "reference": 0 if work.lora else EXACT * pieces(backbone, shards),
        "reward": EXACT
        * (pieces(backbone, shards) - pieces(shape.head(), shards) + pieces([(1, shape.hidden)], shards)),
        "gathered to train": outer + block + (max(outer, block) if shards > 1 else 0),
        "gathered to sample": work.element * shards * pieces(backbone + adapters, shards)
        + EXACT * shards * pieces(heads, shards),
        "activations": round(shape.layers * of_blocks + around),
        "logits": rows * shape.vocabulary * 3 * EXACT,  # logits, log-probabilities, and what is made of them
        "cache": work.element * shape.layers * shape.cached * tokens,
    }
