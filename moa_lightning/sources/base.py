"""Sources: where N signals come from.

Legend: B sequences, T tokens, N objectives.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from moa_lightning.losses.kl import KLPenalty
from moa_lightning.models.encoding import Encoder
from moa_lightning.models.policy import Policy, PolicyOutput
from moa_lightning.models.reference import Reference
from moa_lightning.rewards.panel import RewardPanel
from moa_lightning.signals import Signal, Signals
from moa_lightning.types import Evaluation, Experience, PromptBatch, State


@dataclass(frozen=True)
class Actors:
    """Who takes part in collecting a batch."""

    policy: Policy
    reference: Reference
    panel: RewardPanel
    encoder: Encoder
    kl: KLPenalty
    kl_state: State


class Source(ABC):
    """Turns batches of prompts into experience, and experience into signals. Subclasses are dataclasses."""

    provides: ClassVar[frozenset[Signal]]

    @property
    @abstractmethod
    def needs_values(self) -> bool:
        """Whether the policy must have value heads."""

    @property
    @abstractmethod
    def updates_per_batch(self) -> int:
        """Minibatches that one collected batch is handed out in, all passes over it together."""

    @property
    @abstractmethod
    def minibatches(self) -> int:
        """Minibatches in one pass over a collected batch."""

    @property
    @abstractmethod
    def responses_per_prompt(self) -> int:
        """Rows of experience that one prompt becomes."""

    @property
    @abstractmethod
    def temperature(self) -> float:
        """Of the distribution whose log-probabilities are trained."""

    @abstractmethod
    def encoder(self, policy_tokenizer: object, end_ids: tuple[int, ...], context_length: int | None) -> Encoder:
        """The encoder for this source's lengths."""

    @abstractmethod
    def collect(self, batch: PromptBatch, actors: Actors, seed: int) -> Experience:
        """Experience from a batch of prompts. Draws random numbers from ``seed`` alone."""

    @abstractmethod
    def evaluate(self, batch: PromptBatch, actors: Actors, seed: int) -> Evaluation:
        """Responses to a batch of prompts with their scores. Draws random numbers from ``seed`` alone."""

    @abstractmethod
    def signals(self, experience: Experience, output: PolicyOutput, clip_range: float) -> Signals:
        """Signals of some rows of experience, given the policy's present output on them."""
