"""Theorem 1 against minima that know nothing of it."""

import itertools
import math
from fractions import Fraction

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moa_lightning.functional import pama

SCALES = [1e-30, 1e-12, 1e-6, 1.0, 1e6, 1e12, 1e30]
FLOATS = [torch.float32, torch.float64]
# Zeros, ties and both signs come often; magnitudes of one problem may lie 60 decades apart.
ENTRY = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 1e-30, -1e-30, 1e30, -1e30]),
    st.floats(-10, 10),
    st.builds(lambda sign, exponent: sign * 10.0**exponent, st.sampled_from([-1.0, 1.0]), st.floats(-30, 30)),
)


def least_square_on_the_simplex(values):
    """``min_c (c.a)^2``: a sum over the simplex covers what its edges cover, so the least of all pairs is the least.

    On the edge between two entries the best point is that of a one-dimensional least-squares problem, clamped.
    """
    exact = [Fraction(value) for value in values]
    best = min(abs(value) for value in exact)
    for a, b in itertools.combinations(exact, 2):
        if a != b:
            share = min(max(b / (b - a), 0), 1)
            best = min(best, abs(share * a + (1 - share) * b))
    return float(best)


def check(values_N, dtype):
    """Everything that Theorem 1 promises of one problem."""
    advantages_N = torch.tensor(values_N, dtype=torch.float64).to(dtype)
    score, weights_N = pama(advantages_N)
    exact_N = advantages_N.double()
    limits = torch.finfo(dtype)
    assert abs(float(score)) == least_square_on_the_simplex(exact_N.tolist())
    assert (weights_N >= 0).all() and (weights_N <= 1).all()
    assert float(weights_N.double().sum()) == pytest.approx(1, abs=16 * limits.eps)
    # Each term c_i A_i is right to a few roundings, and weights below the smallest float are 0.
    # Summed exactly: half of the smallest float is 0 in float64, which is no fault of the weights.
    terms = [Fraction(c) * Fraction(a) for c, a in zip(weights_N.tolist(), exact_N.tolist(), strict=True)]
    largest = Fraction(float(exact_N.abs().max()))
    allowed = 16 * Fraction(limits.eps) * sum(map(abs, terms)) + Fraction(limits.tiny) * largest
    assert abs(sum(terms) - Fraction(float(score))) <= allowed


@settings(max_examples=400, deadline=None)
@given(st.lists(ENTRY, min_size=1, max_size=16), st.sampled_from(FLOATS))
@example([5e-324, 5e-324], torch.float64)
def test_theorem_1_on_hostile_numbers(values_N, dtype):
    check(values_N, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", SCALES)
def test_theorem_1_at_every_scale(scale, dtype):
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for count, shift in itertools.product(range(1, 17), (-3.0, -0.5, 0.0, 0.5, 3.0)):
        values_N = torch.randn(count, generator=generator, dtype=torch.float64) + shift
        rounded_N = values_N.round()  # integers: ties and zeros
        check((values_N * scale).tolist(), dtype)
        check((rounded_N * scale).tolist(), dtype)
        seen |= {float(pama(values_N)[0].sign()), "tie" if len(rounded_N.unique()) < count else None}
    assert seen >= {-1.0, 0.0, 1.0, "tie"}, "these problems leave a branch out"


@pytest.mark.parametrize("count", [2, 3])
def test_the_score_is_the_least_of_a_fine_grid(count):
    steps = 400 if count == 2 else 80
    grid = [c for c in itertools.product(range(steps + 1), repeat=count) if sum(c) == steps]
    grid_GN = torch.tensor(grid, dtype=torch.float64) / steps
    generator = torch.Generator().manual_seed(count)
    for shift in (-2.0, -1.0, 0.0, 1.0, 2.0):
        for _ in range(10):
            advantages_N = torch.randn(count, generator=generator, dtype=torch.float64) + shift
            score, _ = pama(advantages_N)
            least = (grid_GN @ advantages_N).abs().min()
            spread = advantages_N.max() - advantages_N.min()
            assert score.abs() <= least + 1e-12  # no grid point beats it
            assert least - score.abs() <= spread / steps + 1e-12  # and the grid comes near


@pytest.mark.parametrize("count", [2, 5, 16])
def test_the_score_is_the_optimum_of_a_general_solver(count):
    generator = torch.Generator().manual_seed(count)
    for shift in (-2.5, -1.0, 0.0, 1.0, 2.5):
        advantages_N = torch.randn(count, generator=generator, dtype=torch.float64) + shift
        weights = cp.Variable(count, nonneg=True)
        problem = cp.Problem(cp.Minimize(cp.square(advantages_N.numpy() @ weights)), [cp.sum(weights) == 1])
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        score, weights_N = pama(advantages_N)
        assert float(score) ** 2 == pytest.approx(problem.value, abs=1e-8)
        assert float(weights_N @ advantages_N) == pytest.approx(float(advantages_N.numpy() @ weights.value), abs=1e-4)


@pytest.mark.parametrize(
    ("advantages", "score", "weights"),
    [
        ([-1.0, 3.0], 0.0, [0.75, 0.25]),
        ([3.0, -1.0], 0.0, [0.25, 0.75]),
        ([2.0, 0.5, 1.0], 0.5, [0.0, 1.0, 0.0]),
        ([-2.0, -0.5, -1.0], -0.5, [0.0, 1.0, 0.0]),
        ([2.0, 2.0, 3.0], 2.0, [0.5, 0.5, 0.0]),
        ([-2.0, -3.0, -2.0], -2.0, [0.5, 0.0, 0.5]),
        ([-1.0, -1.0, 0.5, 3.0], 0.0, [0.375, 0.375, 0.0, 0.25]),
        ([-1.0, 3.0, 3.0, 3.0], 0.0, [0.75, 0.25 / 3, 0.25 / 3, 0.25 / 3]),
        ([0.0, 1.0], 0.0, [1.0, 0.0]),
        ([-1.0, 0.0], 0.0, [0.0, 1.0]),
        ([0.0, 0.0, 0.0, 0.0], 0.0, [0.25] * 4),
        ([-2.0, -2.0], -2.0, [0.5, 0.5]),
        ([7.0], 7.0, [1.0]),
        ([-7.0], -7.0, [1.0]),
    ],
)
def test_worked_numbers(advantages, score, weights):
    got, weights_N = pama(torch.tensor(advantages))
    assert got.item() == score
    torch.testing.assert_close(weights_N, torch.tensor(weights))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_small_share_survives_beside_a_large_one(sign):
    """As ``1 - share`` it would round to 0, and the weighted sum to the smaller entry instead of 0."""
    advantages_N = sign * torch.tensor([-1e-9, 1.0])
    _, weights_N = pama(advantages_N)
    torch.testing.assert_close(weights_N[1], torch.tensor(1e-9))
    assert abs(float((weights_N * advantages_N).sum())) < 1e-15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_ends_of_the_number_range(dtype):
    limits = torch.finfo(dtype)
    for size in (limits.max, limits.tiny, limits.smallest_normal * limits.eps):
        unit = torch.tensor(size, dtype=dtype)
        score, weights_N = pama(torch.stack([-unit, unit, 0 * unit]))
        assert score.item() == 0
        assert weights_N.tolist() == [0.5, 0.5, 0.0]
        score, weights_N = pama(torch.stack([0 * unit, unit]))
        assert (score.item(), weights_N.tolist()) == (0.0, [1.0, 0.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_type_and_its_meaning(dtype):
    generator = torch.Generator().manual_seed(0)
    advantages_BN = torch.randn(500, 6, generator=generator).to(dtype)
    score_B, weights_BN = pama(advantages_BN)
    assert score_B.dtype == weights_BN.dtype == dtype
    exact_B, exact_BN = pama(advantages_BN.float())
    torch.testing.assert_close(score_B.float(), exact_B, rtol=0, atol=0)  # a projection rounds nothing
    torch.testing.assert_close(weights_BN.float(), exact_BN, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_dim_is_where_the_objectives_are(dim):
    advantages = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    score, weights = pama(advantages, dim)
    last_score, last_weights = pama(advantages.movedim(dim, -1))
    assert score.shape == last_score.shape
    assert weights.shape == advantages.shape
    torch.testing.assert_close(score, last_score, rtol=0, atol=0)
    torch.testing.assert_close(weights.movedim(dim, -1), last_weights, rtol=0, atol=0)
    for index in np.ndindex(*last_score.shape):  # each entry is a problem of its own
        alone, alone_N = pama(advantages.movedim(dim, -1)[index])
        assert alone == last_score[index]
        assert alone_N.tolist() == last_weights[index].tolist()


@pytest.mark.parametrize("hidden", [0.0, 1e30, -1e30, math.nan, math.inf])
def test_a_missing_objective_is_as_if_it_were_not_there(hidden):
    generator = torch.Generator().manual_seed(1)
    advantages_BN = torch.randn(200, 5, generator=generator) + torch.randn(200, 1, generator=generator) * 2
    valid_BN = torch.rand(200, 5, generator=generator) < 0.5
    assert not valid_BN.any(1).all() and valid_BN.all(1).any()
    score_B, weights_BN = pama(advantages_BN.masked_fill(~valid_BN, hidden), valid=valid_BN)
    for score, weights_N, advantages_N, valid_N in zip(score_B, weights_BN, advantages_BN, valid_BN, strict=True):
        assert (weights_N[~valid_N] == 0).all()
        if valid_N.any():
            alone, alone_N = pama(advantages_N[valid_N])
            assert score == alone
            torch.testing.assert_close(weights_N[valid_N], alone_N, rtol=0, atol=0)
        else:
            assert score == 0


def test_valid_broadcasts():
    advantages_BTN = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2))
    valid_B1N = torch.tensor([[[True, False, True, True]], [[False, True, False, True]]])
    got = pama(advantages_BTN, valid=valid_B1N)
    expected = pama(advantages_BTN, valid=valid_B1N.expand(2, 3, 4).clone())
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert (got[1][0, :, 1] == 0).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(ENTRY, min_size=1, max_size=16), st.randoms(use_true_random=False))
def test_the_order_of_objectives_does_not_matter(values_N, random):
    order = list(range(len(values_N)))
    random.shuffle(order)
    advantages_N = torch.tensor(values_N, dtype=torch.float64)
    score, weights_N = pama(advantages_N)
    moved, moved_N = pama(advantages_N[order])
    assert moved == score
    torch.testing.assert_close(moved_N, weights_N[order], rtol=0, atol=0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=16), st.integers(-60, 60))
def test_scaling_scales_the_score_and_leaves_the_weights(values_N, exponent):
    advantages_N = torch.tensor(values_N, dtype=torch.float64)
    score, weights_N = pama(advantages_N)
    scaled, scaled_N = pama(advantages_N * 2.0**exponent)  # exact: powers of two
    assert scaled == score * 2.0**exponent
    torch.testing.assert_close(scaled_N, weights_N, rtol=0, atol=0)
    turned, turned_N = pama(-advantages_N)
    assert turned == -score
    torch.testing.assert_close(turned_N, weights_N, rtol=1e-14, atol=0)


def test_nan_is_not_hidden():
    assert pama(torch.tensor([math.nan, 1.0]))[0].isnan()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"floating-point advantages, got torch.int64; call .float\(\)"):
        pama(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="at least one objective"):
        pama(torch.zeros(3, 0))
