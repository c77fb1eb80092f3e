import pytest
import torch

from moa_lightning.combiners import PGAPO
from tests.combiners.gradients import combine


@pytest.mark.parametrize("power", [1, 2])
def test_the_direction_is_the_weighted_sum_of_scaled_gradients(power):
    jacobian = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights_N = torch.tensor([0.5, 0.3, 0.2]).double()
    expected = (weights_N / jacobian.norm(dim=1) ** power) @ jacobian
    found = combine(PGAPO(power=power), jacobian, weights_N.float()).mean_weights().double() @ jacobian
    torch.testing.assert_close(found / found.norm(), expected / expected.norm(), rtol=1e-5, atol=1e-6)


def test_weights_by_name_are_checked_and_go_before_the_objectives_own():
    combiner = PGAPO(weights={"o0": 3.0, "o1": 1.0})
    weights_N = combine(combiner, [[10.0, 0.0], [0.0, 1.0]]).mean_weights()  # 3/10 against 1/1
    torch.testing.assert_close(weights_N, torch.tensor([0.3, 1.0]) / 1.3)
    with pytest.raises(ValueError, match="unknown: o1; missing: b"):
        combiner.init(["o0", "b"], torch.ones(2))


def test_an_objective_of_weight_0_gets_none_and_all_of_them_give_no_update():
    assert combine(PGAPO(), [[1.0, 0.0], [0.0, 1.0]], torch.tensor([1.0, 0.0])).mean_weights().tolist() == [1.0, 0.0]
    # The only objective with a weight has no gradient here.
    assert (combine(PGAPO(), [[0.0, 0.0], [0.0, 1.0]], torch.tensor([1.0, 0.0])).score == 0).all()
