import dataclasses

import pytest
import torch

from moa_lightning.combiners import SmoothTchebycheff, Tchebycheff
from moa_lightning.functional import tchebycheff
from tests.combiners import scored

both = pytest.mark.parametrize("combiner", [Tchebycheff, SmoothTchebycheff])


def test_against_a_plain_loop():
    scores_BN, group_B = scored.draw()
    weights, ideal = {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 1.0, "b": 2.0, "c": 3.0}
    raw_B = torch.tensor(
        [min(weights[n] * (float(s) - ideal[n]) for n, s in zip("abc", row, strict=True)) for row in scores_BN]
    )
    centred_B = (raw_B.view(3, 4) - raw_B.view(3, 4).mean(1, keepdim=True)).flatten()
    combined = scored.run(Tchebycheff(weights, ideal), scored.experience(scores_BN, group_B))[1]
    torch.testing.assert_close(combined.score, centred_B / centred_B.square().mean().sqrt(), rtol=1e-5, atol=1e-5)


def test_ties_share_and_the_shares_are_those_of_the_worst():
    scores_BN = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.5, 0.5], [1.0, 1.0, 0.0], [0.2, 0.2, 0.2]])
    shares_BN = tchebycheff(scores_BN, torch.ones(3), torch.ones(3))[1]
    torch.testing.assert_close(
        shares_BN, torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0], [1 / 3, 1 / 3, 1 / 3]])
    )


@both
def test_a_balanced_response_beats_better_specialists(combiner):
    scores_BN = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.4, 0.4]])  # by any weighted sum the last one is never best
    rows = scored.experience(scores_BN, torch.zeros(3, dtype=torch.int64))
    assert scored.run(combiner(), rows)[1].score.argmax() == 2


@both
def test_a_response_alone_is_compared_with_the_batch(combiner):
    scores_BN = torch.tensor([[0.0, 1.0], [3.0, 2.0], [4.0, 5.0]])
    rows = scored.experience(scores_BN, torch.arange(3))
    state, combined = scored.run(combiner(), rows)
    torch.testing.assert_close(combined.score.mean(), torch.tensor(0.0), rtol=0, atol=1e-6)
    assert combined.score.tolist() == sorted(combined.score.tolist())
    # In a minibatch as well: the mean is that of the whole batch, not its own.
    for row in range(3):
        alone_B = combiner().combine(rows.select(torch.tensor([row])), state).score
        torch.testing.assert_close(alone_B, combined.score[[row]])


@both
def test_a_missing_score_is_the_mean_of_the_prompts_others(combiner):
    scores_BN, group_B = scored.draw()
    missing_BN, filled_BN = scores_BN.clone(), scores_BN.clone()
    missing_BN[1, 0], filled_BN[1, 0] = torch.nan, scores_BN[[0, 2, 3], 0].mean()
    score_B = scored.run(combiner(), scored.experience(missing_BN, group_B))[1].score
    torch.testing.assert_close(score_B, scored.run(combiner(), scored.experience(filled_BN, group_B))[1].score)
    # Of a prompt where nobody has it, it is left out; the others know nothing of that.
    missing_BN[:4, 0] = torch.nan
    ideal = dict.fromkeys("abc", 3.0)
    three, two = combiner(ideal=ideal), combiner(ideal={"a": 3.0, "b": 3.0})
    if combiner is SmoothTchebycheff:  # weights of 1/2 instead of 1/3 stretch the distances, so mu as well
        two = dataclasses.replace(two, mu=1.5 * three.mu)
    score_B = scored.run(three, scored.experience(missing_BN, group_B))[1].score[:4]
    alone_B = scored.run(two, scored.experience(scores_BN[:4, 1:], group_B[:4]))[1].score
    torch.testing.assert_close(score_B / score_B.norm(), alone_B / alone_B.norm())


@both
def test_the_running_ideal_is_the_best_so_far(combiner):
    scores_BN, group_B = scored.draw()
    made = combiner(ideal={"b": 2.5})
    state = made.init(("a", "b", "c"), torch.ones(3))
    assert made.report(state)["ideal"].isnan().tolist() == [True, False, True]
    missing_BN = scores_BN.clone()
    missing_BN[:, 2] = torch.nan
    state = made.observe(scored.experience(missing_BN, group_B), state)
    assert state["ideal"].tolist() == [scores_BN[:, 0].max(), 2.5, -torch.inf]
    state = made.observe(scored.experience(scores_BN - torch.tensor([1.0, 0.0, 0.0]), group_B), state)
    assert state["ideal"].tolist() == [scores_BN[:, 0].max(), 2.5, scores_BN[:, 2].max()]
    # A coordinate that is no longer given is looked for anew, one that is given now counts.
    other = combiner(ideal={"a": 9.0})
    resumed = other.resume(state, other.init(("a", "b", "c"), torch.ones(3)))
    assert resumed["ideal"].tolist() == [9.0, -torch.inf, scores_BN[:, 2].max()]


@both
def test_bad_input_is_refused(combiner):
    name = combiner.__name__
    for ideal, says in (
        ({"x": 1.0}, f"{name}.ideal names 'x', .* they are a, b"),
        ({"a": torch.nan}, "leave the objective out"),
    ):
        with pytest.raises(ValueError, match=says) as caught:
            combiner(ideal=ideal).init(["a", "b"], torch.ones(2))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="unknown: x"):
        combiner(weights={"x": 1.0}).init(["a", "b"], torch.ones(2))
    with pytest.raises(TypeError, match="granularity"):  # a token has no score, so it cannot be asked for
        combiner(granularity="token")
