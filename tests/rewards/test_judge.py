"""Preference models: which pairs they are asked for, and what becomes of the answers."""

import pytest
import torch

from moa_lightning.rewards import Objective, PairwisePreference, RewardPanel

PROMPTS = ["p", "p", "p", "q", "r", "r"]
COMPLETIONS = ["aaa", "a", "aa", "a", "aaaa", "aaaa"]


class Judge:
    """Longer wins with probability .9; equal lengths tie; nobody compares with 'aa'. Remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, completions, **columns):
        self.asked += list(zip(prompts, completions, strict=True))
        return [
            None if "aa" in pair else 0.5 + 0.4 * ((len(pair[0]) > len(pair[1])) - (len(pair[0]) < len(pair[1])))
            for pair in completions
        ]


def test_each_pair_of_responses_to_a_prompt_is_compared_once():
    judge = Judge()
    scores = PairwisePreference(judge).score(PROMPTS, COMPLETIONS)
    assert judge.asked == [
        ("p", ["aaa", "a"]), ("p", ["aaa", "aa"]), ("p", ["a", "aa"]), ("r", ["aaaa", "aaaa"])
    ]  # fmt: skip
    assert scores == [pytest.approx(0.9), pytest.approx(0.1), None, None, 0.5, 0.5]


def test_against_a_baseline_each_response_is_compared_alone():
    judge = Judge()
    reward = PairwisePreference(judge, baseline="human")
    reward.check({"human"})
    scores = reward.score(PROMPTS[3:5], COMPLETIONS[3:5], human=["aaa", "a"])
    assert judge.asked == [("q", ["a", "aaa"]), ("r", ["aaaa", "a"])]
    assert scores == pytest.approx([0.1, 0.9])


def test_nothing_to_compare_is_no_score():
    judge = Judge()
    assert PairwisePreference(judge).score(["p", "q"], ["a", "b"]) == [None, None]
    assert judge.asked == []


def test_columns_follow_the_first_of_a_pair():
    seen = []

    def judge(prompts, completions, topic):
        seen.extend(zip(completions, topic, strict=True))
        return [1.0] * len(completions)

    PairwisePreference(judge).score(["p", "p"], ["a", "b"], topic=["x", "x"], other=[1, 2])
    assert seen == [(["a", "b"], "x")]


@pytest.mark.parametrize(
    ("answers", "says"), [([1.5], r"returned 1.5; return the probability"), ([], "0 probabilities for 1 pairs")]
)
def test_bad_answers_are_named(answers, says):
    with pytest.raises(ValueError, match=says):
        PairwisePreference(lambda prompts, completions: answers).score(["p", "p"], ["a", "b"])


def test_mistakes_before_the_run():
    with pytest.raises(ValueError, match="the data have no column 'human'; they have gold"):
        PairwisePreference(Judge(), baseline="human").check({"gold"})
    with pytest.raises(ValueError, match="needs column 'topic'"):
        PairwisePreference(lambda prompts, completions, topic: []).check({"gold"})


def test_its_score_is_a_win_probability_already():
    table = RewardPanel({"judged": Objective(PairwisePreference(Judge()))}).score(["p"] * 2, ["aaa", "a"], {})
    torch.testing.assert_close(table.value_BN[:, 0], torch.tensor([0.9, 0.1]))
    with pytest.raises(ValueError, match="gives win probabilities, which scale 2"):
        Objective(PairwisePreference(Judge()), scale=2.0)
