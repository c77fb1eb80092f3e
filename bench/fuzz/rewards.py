"""Reward functions of ``bench.fuzz.run``: some are right, most are not."""

import math
import sys
from collections.abc import Iterator
from typing import Any

import torch

not_a_function = 3


def goodness(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(text.count("good")) for text in completions]


def shortness(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [-float(len(text.split())) for text in completions]


def wishes(prompts: list[str], completions: list[str], wish: list[Any], **columns: Any) -> list[float]:
    return [float(wanted) for wanted in wish]


def raises_value_error(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float("x") for _ in completions]


def raises_key_error(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [columns["nothing"] for _ in completions]


def raises_type_error(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [len(3) for _ in completions]  # type: ignore[arg-type]


def exits_0(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    sys.exit(0)


def exits_1(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    sys.exit("a message")


def asserts(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    raise AssertionError


def one_too_few(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [0.0 for _ in completions[1:]]


def one_too_many(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [0.0 for _ in [*completions, ""]]


def none_at_all(prompts: list[str], completions: list[str], **columns: Any) -> None:
    return None


def a_number(prompts: list[str], completions: list[str], **columns: Any) -> float:
    return 1.0


def a_text(prompts: list[str], completions: list[str], **columns: Any) -> str:
    return "1" * len(completions)


def texts(prompts: list[str], completions: list[str], **columns: Any) -> list[str]:
    return ["1.0" for _ in completions]


def lists(prompts: list[str], completions: list[str], **columns: Any) -> list[list[float]]:
    return [[1.0] for _ in completions]


def complexes(prompts: list[str], completions: list[str], **columns: Any) -> list[complex]:
    return [1j for _ in completions]


def a_generator_too_short(prompts: list[str], completions: list[str], **columns: Any) -> Iterator[float]:
    yield 1.0


def silent(prompts: list[str], completions: list[str], **columns: Any) -> list[None]:
    return [None for _ in completions]


def always_nan(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [math.nan for _ in completions]


def always_infinite(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [math.inf for _ in completions]


def no_arguments() -> list[float]:
    return []


def no_completions(prompts: list[str]) -> list[float]:
    return [0.0 for _ in prompts]


def needs_another_column(prompts: list[str], completions: list[str], nothing: list[str]) -> list[float]:
    return [0.0 for _ in prompts]


def generator(prompts: list[str], completions: list[str], **columns: Any) -> Iterator[float]:
    yield from goodness(prompts, completions)


def integers(prompts: list[str], completions: list[str], **columns: Any) -> list[int]:
    return [len(text) for text in completions]


def booleans(prompts: list[str], completions: list[str], **columns: Any) -> list[bool]:
    return ["good" in text for text in completions]


def tensors(prompts: list[str], completions: list[str], **columns: Any) -> torch.Tensor:
    return torch.tensor(goodness(prompts, completions))


def huge(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [1e300 if i % 2 else 1.0 for i, _ in enumerate(completions)]


def mostly_none(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [None if i % 4 else 1.0 for i, _ in enumerate(completions)]


def array(prompts: list[str], completions: list[str], **columns: Any) -> Any:
    return torch.tensor(goodness(prompts, completions)).numpy()


def sorts_in_place(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    completions.sort()
    return [0.5 for _ in completions]
