"""What a response without a score does in each combiner: the words of its docstring, checked against what it computes.

The documentation's table of missing scores is made of these sections. Legend: B sequences, N objectives.
"""

import dataclasses

import pytest
import torch

from moa_lightning.combiners import PAMA
from moa_lightning.combiners.shared.responses import scored_responses
from moa_lightning.commands.combiners.facts import every_combiner
from tests.combiners.inputs import DEFAULTS, begin, changed, collected, picked, signals, without

ROW, OBJECTIVE = 1, 1
SAYS = {one.name: one.sections["Missing score"] for one in every_combiner()}


def named(beginning, *other):
    """The combiners whose section begins like this, but for those that another test looks at."""
    found = [name for name, text in SAYS.items() if text.startswith(beginning) and name not in other]
    assert found
    return pytest.mark.parametrize("combiner", [pytest.param(DEFAULTS[name], id=name) for name in found])


def full_rows():
    """Every objective has an effect on every response, the one that will lack scores most of all."""
    return changed(collected(seed=7), lambda values: values * torch.tensor([1.0, 4.0, 1.0]))


def missing(rows, whole_prompt=False):
    """Without one score, or without any of that objective in the row's prompt."""
    gone_BN = torch.zeros_like(rows.valid_BN)
    gone_BN[slice(0, 4) if whole_prompt else ROW, OBJECTIVE] = True
    return without(rows, gone_BN)


def learnt(combiner, rows):
    """A state in which every objective has an effect."""
    state = combiner.observe(rows, begin(combiner, rows))
    return state | ({"duals": torch.tensor([0.0, 0.5, 0.7])} if "duals" in state else {})


def scored(combiner, rows, state, weights_N=None):
    """The score of each whole response, before its baseline."""
    weights_N = state["weights"] if weights_N is None else weights_N
    return combiner.scalarize(scored_responses(signals(rows)), weights_N.double(), state)[0]


def replaced(rows, value, wins):
    """With these in place of the one that is missing."""
    table, wins_BN = rows.rewards, rows.wins_BN.clone()
    value_BN, raw_BN = table.value_BN.clone(), table.raw_BN.clone()
    value_BN[ROW, OBJECTIVE] = raw_BN[ROW, OBJECTIVE] = value
    wins_BN[ROW, OBJECTIVE] = wins
    return dataclasses.replace(
        rows, rewards=dataclasses.replace(table, value_BN=value_BN, raw_BN=raw_BN), wins_BN=wins_BN
    )


def test_every_combiner_says_one_of_these():
    beginnings = ("adds 0", "takes the mean", "has `Z_i = 0`", "is left out of the problem", "gives no margin")
    assert [name for name, text in SAYS.items() if not text.startswith(beginnings)] == []
    assert SAYS.keys() == DEFAULTS.keys()


@named("adds 0", "GDPO")
def test_adds_nothing_to_an_advantage(combiner):
    rows = full_rows()
    state, lacking = learnt(combiner, rows), missing(rows)
    advantages_BTN = rows.advantages_BTN.clone()
    advantages_BTN[ROW, :, OBJECTIVE] = 0.0
    expected = combiner.combine(signals(dataclasses.replace(rows, advantages_BTN=advantages_BTN)), state).score
    found = combiner.combine(signals(lacking), state).score
    assert torch.equal(found, expected)
    assert not torch.equal(found, combiner.combine(signals(rows), state).score)


@pytest.mark.parametrize("name", ["GDPO", "RVPO"])
def test_is_average_where_objectives_are_standardised(name):
    assert "`Z_i = 0`" in SAYS[name]
    combiner, rows = DEFAULTS[name], full_rows()
    alone_N = torch.eye(3)[OBJECTIVE]
    score_B = scored(combiner, missing(rows), learnt(combiner, rows), alone_N)[:4]
    others_B = rows.scores_BN[[0, 2, 3], OBJECTIVE].double()
    assert score_B[ROW] == 0
    torch.testing.assert_close(score_B[[0, 2, 3]], (others_B - others_B.mean()) / others_B.std())


@named("takes the mean of the prompt's other responses")
def test_takes_the_mean_of_the_prompts_others(combiner):
    rows = full_rows()
    state, lacking = learnt(combiner, rows), missing(rows)
    means = [values[[0, 2, 3], OBJECTIVE].mean() for values in (rows.scores_BN, rows.wins_BN)]
    filled = dataclasses.replace(replaced(rows, *means), valid_BN=rows.valid_BN)
    found, expected, full = (combiner.combine(signals(r), state).score for r in (lacking, filled, rows))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, full)


@pytest.mark.parametrize("name", [name for name, text in SAYS.items() if "prompts without any" in text])
def test_does_not_count_in_prompts_without_any_score(name):
    combiner, rows = DEFAULTS[name], full_rows()
    state = learnt(combiner, rows)
    others_N = state["weights"] * (torch.arange(3) != OBJECTIVE)
    without_it = state | ({"duals": state["duals"] * (torch.arange(3) != OBJECTIVE)} if "duals" in state else {})
    found_B = scored(combiner, missing(rows, whole_prompt=True), state)[:4]
    torch.testing.assert_close(found_B, scored(combiner, rows, without_it, others_N)[:4])
    assert not torch.allclose(found_B, scored(combiner, rows, state)[:4])


@pytest.mark.parametrize("noon", [True, False])
def test_is_left_out_of_the_min_norm_problem(noon):
    assert SAYS["PAMA"].startswith("is left out of the problem")
    combiner, rows = PAMA(noon=noon), full_rows()
    rows = dataclasses.replace(rows, advantages_BTN=rows.advantages_BTN + 0.5)
    state = learnt(combiner, rows)
    found_BT = combiner.combine(signals(missing(rows)), state).score
    others = picked(rows, [i for i in range(3) if i != OBJECTIVE])
    assert torch.equal(found_BT[ROW], combiner.combine(signals(others), state).score[ROW])
    full_BT = combiner.combine(signals(rows), state).score
    assert torch.equal(found_BT[ROW + 1 :], full_BT[ROW + 1 :])
    assert not torch.equal(found_BT[ROW], full_BT[ROW])


@named("gives no margin")
def test_gives_no_margin_or_no_pairs(combiner):
    rows = full_rows()
    state = learnt(combiner, rows)
    found, full = (combiner.combine(signals(r), state) for r in (missing(rows), rows))
    only_third_B = rows.scores_BN[:4, 2] * state["weights"][2]
    torch.testing.assert_close(found.margin_B[:4], only_third_B)
    torch.testing.assert_close(found.margin_B[4:], full.margin_B[4:])
    assert torch.equal(found.score, full.score)

    other_primary = dataclasses.replace(combiner, primary="b")
    state = begin(other_primary, rows)
    assert not other_primary.combine(signals(missing(rows)), state).score[:4].any()
    assert other_primary.combine(signals(rows), state).score[:4].all()
