import inspect

import pytest
import torch
import torchjd.aggregation as torchjd
from torchjd.linalg import Matrix

from moa_lightning.combiners import Gramian
from tests.combiners.gradients import WORKED, combine, direction

WITH_ARGUMENTS = {
    "CAGradWeighting": {"c": 0.5},
    "FairGradWeighting": {"alpha": 1.0},
    "KrumWeighting": {"n_byzantine": 0},
}
# Every weighting of TorchJD that reads a Gram matrix, or only its size, and has no memory.
NAMES = [
    name
    for name, c in inspect.getmembers(torchjd, inspect.isclass)
    if name.endswith("Weighting")
    and name not in ("Weighting", "ConstantWeighting")
    and not hasattr(c, "reset")
    and Matrix not in inspect.get_annotations(c.forward, eval_str=True).values()
]
NEVER_IN_CONFLICT = ["UPGradWeighting", "MGDAWeighting", "DualProjWeighting"]  # by their theorems


def weighting(name):
    return getattr(torchjd, name)(**WITH_ARGUMENTS.get(name, {}))


def test_the_list_is_not_empty():
    named = ["MGDA", "UPGrad", "CAGrad", "PCGrad", "FairGrad", "DualProj", "IMTLG", "AlignedMTL"]
    assert {f"{name}Weighting" for name in named} <= set(NAMES)


@pytest.mark.parametrize(
    ("name", "jacobian", "weights"),
    [
        ("MGDAWeighting", WORKED[0], [0.6, 0.4]),
        ("UPGradWeighting", WORKED[0], [1.1109, 0.7894]),
        ("MGDAWeighting", WORKED[1], [30 / 69, 11 / 69, 28 / 69]),
    ],
)
def test_worked_numbers(name, jacobian, weights):
    chosen = Gramian(torchjd.MGDAWeighting(1e-6, 2000)) if name == "MGDAWeighting" else Gramian(weighting(name))
    expected_N = torch.tensor(weights)
    found_N = combine(chosen, jacobian).mean_weights()
    torch.testing.assert_close(found_N, expected_N / expected_N.sum(), rtol=1e-4, atol=1e-4)


def test_min_norm_direction():
    found = direction(Gramian(torchjd.MGDAWeighting(1e-6, 2000)), WORKED[0])
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 1.0]).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_the_direction_is_that_of_torchjd(name, seed):
    jacobian = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram_NN = jacobian @ jacobian.T
    torch.manual_seed(0)  # as the first batch does
    theirs = weighting(name)(gram_NN / gram_NN.diagonal().max()) @ jacobian
    ours = direction(Gramian(weighting(name)), jacobian)
    torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm(), rtol=1e-5, atol=1e-6)


def test_what_a_weighting_draws_goes_by_the_runs_seed(monkeypatch):
    def weights():
        combiner = Gramian(torchjd.RandomWeighting())
        state = combiner.init("abc", torch.ones(3))
        return combiner.weigh(torch.eye(3), torch.ones(3).bool(), state)

    unseeded = weights()
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    first = weights()
    assert torch.equal(weights(), first)
    assert not torch.equal(first, unseeded)
    before = {"batches": torch.zeros(())}  # of a checkpoint that has no seed
    drawn = Gramian(torchjd.RandomWeighting()).weigh(torch.eye(3), torch.ones(3).bool(), before)
    assert torch.equal(drawn, unseeded)


@pytest.mark.parametrize("name", NEVER_IN_CONFLICT)
@pytest.mark.parametrize("count", [2, 3, 8])
def test_no_objective_is_made_worse_to_first_order(name, count):
    chosen = torchjd.MGDAWeighting(1e-9, 20_000) if name == "MGDAWeighting" else weighting(name)
    for seed in range(5):
        jacobian = torch.randn(count, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        jacobian[0] = -2 * jacobian[1] + 0.1 * jacobian[0]  # nearly opposed
        assert (jacobian @ direction(Gramian(chosen), jacobian) >= -2e-3 * jacobian.norm(dim=1).max()).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_a_common_scale_does_not_matter(name, scale):
    jacobian = torch.tensor(WORKED[1], dtype=torch.float64)
    torch.testing.assert_close(
        combine(Gramian(weighting(name)), jacobian * scale).mean_weights(),
        combine(Gramian(weighting(name)), jacobian).mean_weights(),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "KrumWeighting"])  # which takes three at least
def test_an_objective_without_gradient_is_left_out(name):
    jacobian = [WORKED[0][0], [0.0, 0.0, 0.0], WORKED[0][1]]
    combined, without = combine(Gramian(weighting(name)), jacobian), combine(Gramian(weighting(name)), WORKED[0])
    torch.testing.assert_close(combined.mean_weights()[[0, 2]], without.mean_weights())
    assert combined.mean_weights()[1] == 0
    nothing = combine(Gramian(weighting(name)), [[0.0], [0.0]])
    assert (nothing.score == 0).all()
    torch.testing.assert_close(nothing.mean_weights(), torch.tensor([0.5, 0.5]))


def test_a_weighting_for_a_fixed_number_weighs_those_without_gradient_too():
    weights_N = torch.tensor([0.2, 0.3, 0.5])
    combined = combine(Gramian(torchjd.ConstantWeighting(weights_N)), [[1.0], [0.0], [2.0]])
    torch.testing.assert_close(combined.mean_weights(), torch.tensor([2 / 7, 0.0, 5 / 7]))


def test_random_orders_are_of_the_batch_and_leave_the_stream_of_random_numbers_alone():
    jacobian = torch.randn(5, 4, generator=torch.Generator().manual_seed(3)).double() - 0.3
    combiner = Gramian(torchjd.PCGradWeighting())
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again = combine(combiner, jacobian), combine(combiner, jacobian)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.mean_weights(), again.mean_weights())
    state = combiner.init(["a"], torch.ones(1))
    assert combiner.observe(None, state)["batches"] == 1
    gram_NN, all_N = jacobian @ jacobian.T, torch.ones(5, dtype=torch.bool)
    orders = {tuple(combiner.weigh(gram_NN, all_N, {"batches": torch.tensor(float(i))}).tolist()) for i in range(8)}
    assert len(orders) > 1


@pytest.mark.parametrize("name", ["GradVacWeighting", "PCDWeighting", "ExcessMTLWeighting"])
def test_weightings_with_a_memory_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} keeps a memory"):
        Gramian(getattr(torchjd, name)())


def test_weightings_of_whole_gradients_are_refused():
    class OfGradients(torchjd.Weighting):
        def forward(self, matrix: Matrix, /) -> torch.Tensor:
            return matrix[:, 0]

    with pytest.raises(ValueError, match="OfGradients reads the gradients themselves"):
        Gramian(OfGradients())


def test_what_is_not_defined_for_so_many_objectives_is_refused_at_the_start():
    with pytest.raises(ValueError, match="KrumWeighting cannot weigh 2 objectives: Parameter"):
        Gramian(torchjd.KrumWeighting(n_byzantine=1)).init(["a", "b"], torch.ones(2))
    with pytest.raises(ValueError, match="ConstantWeighting cannot weigh 3 objectives"):
        Gramian(torchjd.ConstantWeighting(torch.ones(2))).init(["a", "b", "c"], torch.ones(3))
    with pytest.raises(ValueError, match="norm_power must be a finite number >= 0"):
        Gramian(norm_power=-1.0)
