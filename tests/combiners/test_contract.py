"""Every combiner of the package over shared batches: what all of them keep, and exactly what each one claims."""

import dataclasses

import pytest
import torch

from moa_lightning.combiners import MGDAUB, PAMA, PGAPO, Combined, Combiner, Gramian, Lagrangian, Linear, Tchebycheff
from moa_lightning.combiners.claims import Claim
from moa_lightning.signals import Signal
from tests.combiners import scored
from tests.combiners.claims import CHECKS
from tests.combiners.inputs import COMBINERS, EVERY, INPUTS, begin, changed, every_combiner, run, signals

CLAIMS = [
    pytest.param(combiner, claim, id=f"{name}-{claim.name.lower()}")
    for name, combiner in EVERY.items()
    for claim in sorted(combiner.claimed)
]


@pytest.mark.parametrize(("combiner", "claim"), CLAIMS)
def test_what_is_claimed_holds(combiner, claim):
    broken = {}
    for name, rows in INPUTS.items():
        try:
            CHECKS[claim](combiner, rows)
        except AssertionError as error:
            broken[name] = error
    assert not broken


class ByPosition(Combiner):
    """Weights that go by the objectives' places, the last one's below 0."""

    needs = frozenset({Signal.ADVANTAGES})

    def combine(self, signals, state):
        weights_N = torch.arange(signals.advantages_BTN.shape[-1], 0.0, -1) - 1.5
        return Combined(
            (signals.advantages_BTN.where(signals.present_BTN(), 0.0) * weights_N).sum(-1), weights_N / weights_N.sum()
        )


def _check_all(claim, combiner):
    for rows in INPUTS.values():
        CHECKS[claim](combiner, rows)


NOT = {
    Claim.SIMPLEX: ByPosition(),
    Claim.PERMUTATION: ByPosition(),
    Claim.MONOTONE: ByPosition(),
    Claim.ONE_OBJECTIVE: PAMA(),
    Claim.COMMON_SCALE: Tchebycheff(ideal={"a": 1.0}),
    Claim.OWN_SCALE: MGDAUB(),
    Claim.SHIFT: Tchebycheff(ideal={"a": 1.0}),
    Claim.NON_CONFLICT: Linear(),
    Claim.MIN_NORM: PGAPO(),
}


@pytest.mark.parametrize("claim", list(Claim))
def test_a_false_claim_is_caught(claim):
    assert claim not in NOT[claim].claimed
    with pytest.raises(AssertionError):
        _check_all(claim, NOT[claim])


@pytest.mark.parametrize("combiner", [pytest.param(c, id=c.__name__) for c in COMBINERS])
def test_every_combiner_claims_something(combiner):
    assert combiner.claims


@every_combiner
def test_scores_and_weights_are_finite_and_what_is_masked_has_none(combiner):
    for name, rows in INPUTS.items():
        combined = run(combiner, rows)
        assert combined.score.isfinite().all(), name
        assert combined.mean_weights().isfinite().all(), name
        counted = rows.mask_BT if combined.score.ndim == 2 else rows.mask_BT.any(1)
        assert (combined.score[~counted] == 0).all(), name
        assert not combined.score.requires_grad


@every_combiner
def test_what_stands_where_a_score_is_missing_does_not_matter(combiner):
    rows = INPUTS["missing"]
    # Win probabilities have no mask: NaN itself says what is missing there, so only the other numbers change.
    filled = dataclasses.replace(changed(rows, lambda v: v.nan_to_num(0.3)), wins_BN=rows.wins_BN)
    combined, other = run(combiner, rows), run(combiner, filled)
    assert torch.equal(other.score, combined.score)
    assert torch.equal(other.mean_weights(), combined.mean_weights())
    wild = dataclasses.replace(
        signals(rows),
        advantages_BTN=rows.advantages_BTN.nan_to_num(1e6),
        scores_BN=rows.scores_BN.where(rows.valid_BN, -1e6),
    )
    state = combiner.observe(rows, begin(combiner, rows))
    again = combiner.combine(wild, state)
    assert torch.equal(again.score, combined.score)
    assert torch.equal(again.mean_weights(), combined.mean_weights())


@every_combiner
def test_the_value_decides_and_not_the_raw_score(combiner):
    for name, rows in INPUTS.items():
        assert not (rows.rewards.raw_BN == rows.rewards.value_BN).all(0).any(), name
        raw_BN = torch.full_like(rows.rewards.raw_BN, torch.nan)
        others = dataclasses.replace(rows, rewards=dataclasses.replace(rows.rewards, raw_BN=raw_BN))
        assert same(*(combiner.observe(batch, begin(combiner, batch)) for batch in (rows, others))), name
        combined, other = run(combiner, rows), run(combiner, others)
        assert torch.equal(other.score, combined.score), name
        assert torch.equal(other.mean_weights(), combined.mean_weights()), name


def test_a_threshold_on_a_cost_is_in_its_value():
    """A length of .7 as a cost has value -.7: it violates -.1, although the raw .7 is above it, and keeps -.9."""
    value_BN = torch.tensor([[1.0, -0.6], [0.0, -0.8], [2.0, -0.7], [1.0, -0.7]])
    rows = scored.experience(value_BN, torch.zeros(4).long())
    rows = dataclasses.replace(rows, rewards=dataclasses.replace(rows.rewards, raw_BN=-value_BN))
    duals = {}
    for threshold in (-0.1, -0.9):
        combiner = Lagrangian({"b": threshold}, primary="a")
        states = [begin(combiner, rows)]
        for _ in range(12):
            states.append(combiner.observe(rows, states[-1]))
        duals[threshold] = [float(combiner.report(state)["duals"][1]) for state in (states[0], states[-1])]
    assert duals[-0.1][1] > duals[-0.1][0]
    assert duals[-0.9][1] <= duals[-0.9][0]


@every_combiner
def test_needs_is_honest(combiner):
    rows = INPUTS["plain"]
    state = combiner.observe(rows, begin(combiner, rows))
    whole, bare = (combiner.combine(signals(rows, only), state) for only in (None, combiner.needs))
    assert torch.equal(whole.score, bare.score)
    assert torch.equal(whole.mean_weights(), bare.mean_weights())


def same(state, other):
    return state.keys() == other.keys() and all(
        torch.equal(state[k].nan_to_num(9), other[k].nan_to_num(9)) for k in state
    )


def copied(state):
    return {name: value.clone() for name, value in state.items()}


@every_combiner
def test_state_goes_in_and_out_and_there_is_no_hidden_memory(combiner):
    rows, others = INPUTS["plain"], INPUTS["ties"]
    state = begin(combiner, rows)
    before = copied(state)
    after = combiner.observe(rows, state)
    assert same(state, before)  # what was passed in is left alone
    assert after.keys() == state.keys()
    assert all(value.dtype == torch.float32 for value in after.values())
    kept = copied(after)
    first = combiner.combine(signals(rows), after)
    combiner.combine(signals(others), after)
    combiner.observe(others, after)
    again = combiner.combine(signals(rows), after)
    assert same(after, kept)
    assert torch.equal(first.score, again.score)
    assert torch.equal(first.mean_weights(), again.mean_weights())
    assert same(combiner.observe(rows, state), after)


@every_combiner
def test_a_saved_state_takes_the_same_next_step(combiner, tmp_path):
    rows = INPUTS["plain"]
    state = begin(combiner, rows)
    for batch in (rows, INPUTS["missing"]):
        state = combiner.observe(batch, state)
        state = combiner.combine(signals(batch), state).state or state
        state = combiner.observe_evaluation(torch.tensor([0.1, 0.2, 0.3]), state)
    torch.save(state, tmp_path / "state.pt")
    loaded = combiner.resume(torch.load(tmp_path / "state.pt", weights_only=True), begin(combiner, rows))
    assert same(loaded, state)
    state, loaded = (combiner.observe(INPUTS["ties"], s) for s in (state, loaded))
    one, other = (combiner.combine(signals(INPUTS["ties"]), s) for s in (state, loaded))
    assert same(loaded, state)
    assert torch.equal(other.score, one.score)
    assert torch.equal(other.mean_weights(), one.mean_weights())
    assert (one.state is None) == (other.state is None)
    assert one.state is None or same(one.state, other.state)


def test_every_combiner_of_the_package_is_covered():
    assert {Linear, PAMA, MGDAUB, Gramian} <= set(COMBINERS)
    assert set(CHECKS) == set(Claim) == set(NOT)
