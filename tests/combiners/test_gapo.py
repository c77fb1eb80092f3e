import pytest
import torch
import torchjd.aggregation as torchjd

from moa_lightning.combiners import GAPO, MGDAUB, Gramian
from tests.combiners.gradients import WORKED, combine, direction

PRECISE = {"max_iters": 20_000, "epsilon": 1e-9}


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_is_the_min_norm_point_of_the_scaled_gradients(power, seed):
    jacobian = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    jacobian[0] *= 30
    scaled = jacobian / jacobian.norm(dim=1, keepdim=True) ** power
    # The nearest point to 0 of a segment, in closed form.
    between = scaled[1] - scaled[0]
    share = ((-scaled[0] @ between) / (between @ between)).clamp(0, 1)
    expected = scaled[0] + share * between
    found = direction(GAPO(power=power, **PRECISE), jacobian)
    torch.testing.assert_close(found / found.norm(), expected / expected.norm(), rtol=1e-3, atol=1e-3)


def test_worked_numbers():
    """Orthogonal gradients of lengths 100 and 1: unit vectors share equally, and their weights undo the lengths."""
    weights_N = combine(GAPO(**PRECISE), [[100.0, 0.0], [0.0, 1.0]]).mean_weights()
    torch.testing.assert_close(weights_N, torch.tensor([1 / 101, 100 / 101]))
    # Power 2: lengths .01 and 1; c = (1, .0001) / 1.0001 and the weights c / norm^2 are alike.
    weights_N = combine(GAPO(power=2, **PRECISE), [[100.0, 0.0], [0.0, 1.0]]).mean_weights()
    torch.testing.assert_close(weights_N, torch.tensor([0.5, 0.5]), rtol=1e-3, atol=0)


def test_is_mgda_ub_with_normalised_gradients_and_gramian_with_a_power():
    for jacobian in WORKED:
        one = combine(GAPO(), jacobian).mean_weights()
        torch.testing.assert_close(one, combine(MGDAUB(normalize=True), jacobian).mean_weights())
        two = Gramian(torchjd.MGDAWeighting(epsilon=1e-5, max_iters=250), norm_power=2.0)
        torch.testing.assert_close(
            combine(GAPO(power=2), jacobian).mean_weights(), combine(two, jacobian).mean_weights()
        )


def test_the_scale_of_an_objective_does_not_change_the_direction():
    jacobian = torch.tensor(WORKED[1], dtype=torch.float64)
    scaled = jacobian * torch.tensor([[1e6], [1.0], [1e-6]]).double()
    one, other = direction(GAPO(**PRECISE), jacobian), direction(GAPO(**PRECISE), scaled)
    torch.testing.assert_close(one / one.norm(), other / other.norm(), rtol=1e-4, atol=1e-4)


def test_a_solver_that_cannot_run_is_refused():
    with pytest.raises(ValueError, match="max_iters >= 1"):
        GAPO(max_iters=0)
