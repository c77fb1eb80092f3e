"""The length reward and its units."""

import math
from pathlib import Path

import pytest
import torch

from moa_lightning.rewards import Characters, Length, Tokens, Words


def words(count: int) -> str:
    return " ".join(["word"] * count)


@pytest.mark.parametrize(
    ("count", "score"), [(0, 0.5), (69, 0.5), (70, 0.5), (105, 0.75), (140, 1.0), (210, 1.5), (211, 1.5), (900, 1.5)]
)
def test_default_is_the_papers_form(count: int, score: float) -> None:
    """clip(l/140, 70/140, 210/140), PAMA's IMDb experiment."""
    assert Length().score(["prompt"], [words(count)]) == [score]


def test_bounds_are_optional_and_apply_after_the_division() -> None:
    texts = [words(n) for n in (0, 5, 100)]
    assert Length(divisor=10, low=None, high=None).score(["p"] * 3, texts) == [0.0, 0.5, 10.0]
    assert Length(divisor=10, low=0.2, high=None).score(["p"] * 3, texts) == [0.2, 0.5, 10.0]
    assert Length(divisor=10, low=None, high=0.4).score(["p"] * 3, texts) == [0.0, 0.4, 0.4]


def test_only_the_completion_counts() -> None:
    assert Length(divisor=1, low=None, high=None).score([words(50)], ["two words"], answer=["x"]) == [2.0]


def test_units() -> None:
    text = "  a good\n\tfilm  "
    assert Words().count([text, ""]) == [3, 0]
    assert Characters().count([text, ""]) == [16, 0]
    assert Length(divisor=1, low=None, high=None, unit=Characters()).score(["p"], [text]) == [16.0]


def test_tokens_are_those_of_the_folder_without_special_ones(bert_folder) -> None:
    unit = Tokens(str(bert_folder()))
    reward = Length(divisor=1, low=None, high=None, unit=unit)
    reward.check(set())
    assert reward.score(["p"] * 3, ["good film", "", "good unknownword"]) == [2.0, 0.0, 2.0]
    assert reward.score([], []) == []


def test_tokens_work_without_a_check_before(bert_folder) -> None:
    assert Tokens(str(bert_folder())).count(["good"]) == [1]


def test_tokens_refuse_a_folder_that_does_not_exist_when_checked(tmp_path: Path) -> None:
    reward = Length(unit=Tokens(str(tmp_path / "nowhere")))
    for look in (lambda: reward.check(set()), lambda: reward.setup(torch.device("cpu"))):
        with pytest.raises(ValueError, match="nowhere' does not exist"):
            look()


@pytest.mark.parametrize("divisor", [0.0, -1.0, math.nan, math.inf])
def test_divisor_must_be_positive(divisor: float) -> None:
    with pytest.raises(ValueError, match="divisor"):
        Length(divisor=divisor)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (math.inf, None)])
def test_low_must_be_below_high(low: float, high: float | None) -> None:
    with pytest.raises(ValueError, match=r"low must be below Length\.high"):
        Length(low=low, high=high)
