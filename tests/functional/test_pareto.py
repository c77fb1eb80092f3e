"""Hypervolume against inclusion and exclusion, the non-dominated set against all pairs."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_lightning.functional import hypervolume, non_dominated


def inclusion_exclusion(points, reference):
    """Volume of the union of boxes from the reference to each point, from the volumes of all intersections."""
    boxes = [[p - r for p, r in zip(point, reference, strict=True)] for point in points]
    boxes = [box for box in boxes if min(box) > 0]
    total = 0.0
    for size in range(1, len(boxes) + 1):
        for chosen in itertools.combinations(boxes, size):
            total += (-1) ** (size + 1) * math.prod(min(sides) for sides in zip(*chosen, strict=True))
    return total


def test_worked_number_in_two_dimensions():
    points_PN = torch.tensor([[8.5, 3.0], [8.5, 3.5], [5.0, 5.0], [9.0, 1.0], [4.0, 5.0]])
    assert hypervolume(points_PN, torch.zeros(2)) == 37.75
    assert non_dominated(points_PN).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("objectives", [1, 2, 3, 4, 5])
def test_hypervolume_against_inclusion_and_exclusion(objectives):
    generator = torch.Generator().manual_seed(objectives)
    below = 0
    for count in (1, 2, 5, 8):
        for _ in range(5):
            points_PN = torch.randn(count, objectives, generator=generator, dtype=torch.float64) * 2
            reference_N = torch.randn(objectives, generator=generator, dtype=torch.float64) - 1
            below += int((points_PN <= reference_N).any(1).sum())
            expected = inclusion_exclusion(points_PN.tolist(), reference_N.tolist())
            assert hypervolume(points_PN, reference_N) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert below > 0


def test_worked_number_in_three_dimensions():
    """Two boxes 1 x 2 x 3 and 3 x 2 x 1 share 1 x 2 x 1."""
    points_PN = torch.tensor([[2.0, 3.0, 4.0], [4.0, 3.0, 2.0]])
    assert hypervolume(points_PN, torch.ones(3)) == pytest.approx(10)


def test_points_that_are_not_better_everywhere_add_nothing():
    reference_N = torch.tensor([1.0, 1.0])
    inside_PN = torch.tensor([[2.0, 3.0]])
    outside_PN = torch.tensor([[0.0, 0.0], [100.0, 0.5], [1.0, 50.0], [0.5, 100.0], [1.0, 1.0]])
    assert hypervolume(inside_PN, reference_N) == 2
    assert hypervolume(torch.cat([inside_PN, outside_PN]), reference_N) == 2
    assert hypervolume(outside_PN, reference_N) == 0


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_no_points(objectives):
    assert hypervolume(torch.zeros(0, objectives), torch.zeros(objectives)) == 0
    mask_P = non_dominated(torch.zeros(0, objectives))
    assert mask_P.shape == (0,)
    assert mask_P.dtype == torch.bool


def test_one_objective_is_the_distance_to_the_best():
    points_PN = torch.tensor([[1.0], [4.0], [2.0], [4.0], [-9.0]])
    assert hypervolume(points_PN, torch.tensor([-1.0])) == 5
    assert hypervolume(points_PN, torch.tensor([4.0])) == 0
    assert non_dominated(points_PN).tolist() == [False, True, False, True, False]


def non_dominated_by_pairs(points):
    def dominates(p, q):
        return all(a >= b for a, b in zip(p, q, strict=True)) and any(a > b for a, b in zip(p, q, strict=True))

    return [not any(dominates(other, point) for other in points) for point in points]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_non_dominated_against_all_pairs(data):
    """Small integers: duplicates and ties in single objectives come often."""
    objectives = data.draw(st.integers(1, 5))
    point = st.lists(st.integers(-2, 2), min_size=objectives, max_size=objectives)
    points = data.draw(st.lists(point, min_size=1, max_size=25))
    assert non_dominated(torch.tensor(points, dtype=torch.float32)).tolist() == non_dominated_by_pairs(points)


def test_non_dominated_on_many_points():
    generator = torch.Generator().manual_seed(0)
    for objectives in (2, 3, 6):
        points_PN = torch.randn(120, objectives, generator=generator)
        points_PN = torch.cat([points_PN, points_PN[:30]])
        mask_P = non_dominated(points_PN)
        assert mask_P.tolist() == non_dominated_by_pairs(points_PN.tolist())
        assert torch.equal(mask_P[:30], mask_P[120:])  # duplicates share their fate
        # Dominated points and copies add no volume.
        reference_N = torch.full((objectives,), -5.0)
        assert hypervolume(points_PN[mask_P], reference_N) == pytest.approx(hypervolume(points_PN, reference_N))


def test_gradients_and_half_precision_are_no_obstacle():
    points_PN = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.bfloat16, requires_grad=True)
    assert hypervolume(points_PN, torch.zeros(2)) == 3
    assert non_dominated(points_PN).tolist() == [True, True]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    points_PN = torch.tensor([[1.0, bad]])
    with pytest.raises(ValueError, match="hypervolume: points must be finite"):
        hypervolume(points_PN, torch.zeros(2))
    with pytest.raises(ValueError, match="hypervolume: reference must be finite"):
        hypervolume(torch.ones(1, 2), torch.tensor([0.0, bad]))
    with pytest.raises(ValueError, match="non_dominated: points must be finite"):
        non_dominated(points_PN)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"points \(P, N\) and a reference \(N,\); got \(2,\) and \(2,\)"):
        hypervolume(torch.ones(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"got \(4, 2\) and \(3,\)"):
        hypervolume(torch.ones(4, 2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"points \(P, N\), got \(3,\)"):
        non_dominated(torch.ones(3))
