"""Rewards, one file per kind, and the panel that scores responses under all objectives."""

from moa_lightning.rewards.base import Objective, Reward
from moa_lightning.rewards.classifier import ClassifierOutput, Logit, Probability, TextClassifier
from moa_lightning.rewards.function import FunctionReward
from moa_lightning.rewards.implicit import ImplicitReward
from moa_lightning.rewards.judge import PairwisePreference
from moa_lightning.rewards.labels import FromLabels, FromScores
from moa_lightning.rewards.panel import RewardPanel
from moa_lightning.rewards.scored_text import Chat, CompletionOnly, PromptAndCompletion, ScoredText, TextPair
from moa_lightning.rewards.text import Characters, Length, LengthUnit, Tokens, Words
from moa_lightning.rewards.win_probability import WinProbability

__all__ = [
    "Characters",
    "Chat",
    "ClassifierOutput",
    "CompletionOnly",
    "FromLabels",
    "FromScores",
    "FunctionReward",
    "ImplicitReward",
    "Length",
    "LengthUnit",
    "Logit",
    "Objective",
    "PairwisePreference",
    "Probability",
    "PromptAndCompletion",
    "Reward",
    "RewardPanel",
    "ScoredText",
    "TextClassifier",
    "TextPair",
    "Tokens",
    "WinProbability",
    "Words",
]
