"""Win probabilities against fixed responses: exact numbers, missing ones, and what is scored how often."""

import math

import pytest
import torch

from moa_lightning.rewards import FromScores, FunctionReward, Objective, PairwisePreference, RewardPanel, WinProbability


class Words:
    """Number of words; no opinion on '?'. Remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, completions, topic):
        self.asked.append(list(zip(prompts, completions, topic, strict=True)))
        return [None if text == "?" else float(len(text.split())) for text in completions]


def wins(difference, scale=2.0):
    return 1 / (1 + math.exp(-difference / scale))


def test_each_response_is_compared_with_the_fixed_ones_of_its_prompt():
    function = Words()
    reward = WinProbability(FunctionReward(function), baseline="fixed", scale=2.0)
    reward.check({"fixed", "topic"})
    reward.setup(torch.device("cpu"))
    scores = reward.score(
        ["p", "p", "q"], ["a b c", "a", "a b"], fixed=[["b", "b b b"], ["b", "b b b"], "c c"], topic=["x", "x", "y"]
    )
    assert scores == pytest.approx([(wins(2) + wins(0)) / 2, (wins(0) + wins(-2)) / 2, 0.5])
    # One call; a prompt's fixed responses are scored once, with the columns of their own row.
    responses, fixed = [("p", "a b c", "x"), ("p", "a", "x"), ("q", "a b", "y")], [("p", "b", "x"), ("p", "b b b", "x")]
    assert function.asked == [[*responses, *fixed, ("q", "c c", "y")]]


def test_what_cannot_be_compared_has_no_score():
    reward = WinProbability(FunctionReward(Words()), baseline="fixed", scale=2.0)
    fixed = [["b", "?"], None, [], ["?"], ["b"]]
    scores = reward.score(list("pqrst"), ["a b", "a", "a", "a", "?"], fixed=fixed, topic=[0] * 5)
    assert scores == [pytest.approx(wins(1)), None, None, None, None]


def test_far_apart_is_certain():
    reward = WinProbability(FunctionReward(Words()), baseline="fixed", scale=1e-300)
    assert reward.score(["p"] * 2, ["a b", ""], fixed=["b"] * 2, topic=[0] * 2) == [1.0, 0.0]


def test_a_panel_takes_it_for_a_win_probability():
    reward = WinProbability(FunctionReward(Words()), baseline="fixed")
    table = RewardPanel({"long": Objective(reward, scale=-1.0, shift=1.0)}).score(
        ["p"], ["a b"], {"fixed": ["a"], "topic": [0]}
    )
    assert float(table.value_BN) == pytest.approx(1 - wins(1, 1.0))
    with pytest.raises(ValueError, match="gives win probabilities, which scale 2"):
        Objective(reward, scale=2.0)


def test_mistakes_before_the_run():
    function = FunctionReward(Words())
    with pytest.raises(ValueError, match="the data have no column 'fixed'; they have topic"):
        WinProbability(function, "fixed").check({"topic"})
    with pytest.raises(ValueError, match="needs column 'topic'"):
        WinProbability(function, "fixed").check({"fixed"})
    for scale in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"scale must be a finite number above 0, got {scale}"):
            WinProbability(function, "fixed", scale)
    for inner in (PairwisePreference(Words()), FromScores("a")):
        with pytest.raises(ValueError, match="must score any response by itself, got"):
            WinProbability(inner, "fixed")


def test_a_baseline_that_is_no_text_is_named():
    reward = WinProbability(FunctionReward(Words()), "fixed")
    with pytest.raises(ValueError, match=r"column 'fixed' must hold a text, or a list of texts, .* got 3"):
        reward.score(["p"], ["a"], fixed=[3], topic=[0])
    with pytest.raises(ValueError, match="returned 1 scores for 2 completions"):
        WinProbability(FunctionReward(lambda prompts, completions: [1.0]), "fixed").score(["p"], ["a"], fixed=["b"])
