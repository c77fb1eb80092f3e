"""The toy problems: their fronts and optima are the exact ones, and every combiner gets a line and a mark."""

import csv

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from bench.combiners.roster import exported
from bench.fronts import run as fronts
from bench.fronts.learned import NAMES, Recipe, experience_of, learn, signals_of
from bench.fronts.problems import PROBLEMS, TwoHills
from bench.fronts.report import Ends
from moa_lightning.losses import RewardKL

BANDITS, HILLS = PROBLEMS[:2], PROBLEMS[2]
ALL = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)


def parameters(problem, count, generator):
    """Of many policies, good and bad."""
    if problem is HILLS:
        return 1.2 * torch.randn(count, 2, generator=generator)
    size = len(problem.rewards_A2)
    return torch.distributions.Dirichlet(torch.full((size,), 0.3)).sample((count,)).clamp(min=1e-12).log()


@ALL
def test_no_policy_is_beyond_the_front(problem):
    torch.manual_seed(0)
    values = np.array([problem.values(p) for p in parameters(problem, 3000, torch.default_generator)])
    for ahead in problem.front:
        assert not ((values > ahead + 1e-6).all(1)).any()
    # The front can be come near to, everywhere: nothing that was drawn here is needed to be on it, but much is close.
    assert min(problem.distance(v) for v in values) < 0.02


@ALL
def test_the_front_is_attained_and_none_of_its_points_is_dominated(problem):
    front = problem.front
    assert (np.diff(front[:, 0]) < 0).all() and (np.diff(front[:, 1]) > 0).all()
    if problem is HILLS:
        points = [problem.values(t * problem.centre) for t in torch.linspace(1, -1, 7)]
    else:
        actions = [problem.rewards_A2.index(tuple(point)) for point in front]
        points = [problem.values(40.0 * torch.nn.functional.one_hot(torch.tensor(a), 6)[: len(problem.rewards_A2)])
                  for a in actions]  # fmt: skip
    assert max(problem.distance(point) for point in points) < 1e-6


def test_the_bandits_fronts_and_optima_are_those_of_a_linear_program():
    for problem in BANDITS:
        rewards = np.array(problem.rewards_A2)
        for weight in np.linspace(0.01, 0.99, 25):
            weights = np.array([weight, 1 - weight])
            assert (rewards @ weights).max() == pytest.approx((problem.front @ weights).max())
        found = linprog(
            -rewards[:, 0], A_ub=-rewards[:, 1:].T, b_ub=[-problem.threshold], A_eq=np.ones((1, len(rewards))), b_eq=[1]
        )
        np.testing.assert_allclose(problem.constrained, [-found.fun, problem.threshold], atol=1e-9)


def test_the_hills_optimum_is_the_best_of_a_grid_and_its_front_bends_inwards():
    steps = torch.linspace(-1.5, 1.5, 6001)
    grid = torch.cartesian_prod(steps, steps[::300])
    s = 1 + 2 * HILLS.sigma**2
    values = [torch.exp(-(grid - side * HILLS.centre).square().sum(1) / s) / s for side in (1, -1)]
    best = values[0][values[1] >= HILLS.threshold].max()
    assert HILLS.constrained[0] == pytest.approx(float(best), abs=5e-4)
    middle = HILLS.front[len(HILLS.front) // 2]
    assert middle.sum() < HILLS.front[0].sum() - 0.1  # a weighted sum prefers the ends


def test_the_hills_values_are_the_means_of_sampled_rewards():
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([0.3, 0.4])
    rewards = HILLS.rewards(HILLS.sample(mean, 200_000, generator))
    np.testing.assert_allclose(rewards.mean(0), HILLS.values(mean), atol=4 * 0.3 / 200_000**0.5)


@ALL
def test_slopes_are_the_derivatives_of_the_log_probabilities(problem):
    generator = torch.Generator().manual_seed(0)
    start_P = problem.start(generator)
    actions = problem.sample(start_P, 5, generator)
    by_autograd = torch.autograd.functional.jacobian(lambda p: problem.logprobs(p, actions), start_P)
    torch.testing.assert_close(problem.slopes(start_P, actions), by_autograd)
    assert not isinstance(problem, TwoHills) or by_autograd.abs().min() > 0


def test_distance_is_to_the_nearest_point():
    concave = PROBLEMS[0]
    assert concave.distance(np.array([1.0, 0.0])) == 0
    assert concave.distance(np.array([0.725, 0.725])) == pytest.approx(0, abs=1e-9)
    assert concave.distance(np.array([0.0, 0.0])) == pytest.approx(0.6 / np.hypot(0.15, 0.6))
    assert concave.distance(np.array([1.3, -0.4])) == pytest.approx(0.5)


def test_sampled_comparisons_follow_bradley_and_terry():
    problem, generator = PROBLEMS[1], torch.Generator().manual_seed(0)
    actions = torch.tensor([0, 2]).repeat(20_000)  # a reward of 1 against one of 0, in groups of two
    zeros = torch.zeros(len(actions))
    given = experience_of(problem, actions, zeros, zeros, generator, RewardKL(0.0), 2)
    share = float(given.wins_BN[::2, 0].mean())
    assert share == pytest.approx(1 / (1 + np.exp(-1)), abs=4 * 0.5 / 20_000**0.5)
    torch.testing.assert_close(given.wins_BN[::2] + given.wins_BN[1::2], torch.ones(20_000, 2))


def test_the_gram_matrix_is_that_of_the_surrogates_gradients():
    problem, generator = PROBLEMS[0], torch.Generator().manual_seed(0)
    start_P = problem.start(generator)
    actions = problem.sample(start_P, 32, generator)
    zeros = torch.zeros(32)
    given = experience_of(problem, actions, zeros, zeros, None, RewardKL(0.0), 4)
    signals = signals_of(given, problem.slopes(start_P, actions), 0.2)

    def surrogates(p):
        ratio_B1 = (problem.logprobs(p, actions) - problem.logprobs(start_P, actions)).exp().unsqueeze(1)
        return (ratio_B1 * given.advantages_BTN[:, 0]).mean(0)

    gradients_NP = torch.autograd.functional.jacobian(surrogates, start_P)
    torch.testing.assert_close(signals.gramian(given.advantages_BTN), gradients_NP @ gradients_NP.T)


def test_training_reaches_the_front_and_the_seed_decides():
    linear = exported()[0]
    recipe = Recipe(steps=150, samples=64)
    first, again, other = (learn(PROBLEMS[1], linear, recipe, seed) for seed in (0, 0, 1))
    assert first.distance < 0.05
    np.testing.assert_array_equal(first.values_2, again.values_2)
    assert abs(first.values_2 - other.values_2).max() > 1e-3
    assert first.from_optimum is None


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("fronts"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *a, sep=" ", **_: lines.append(sep.join(map(str, a))))
        fronts.main(["--quick", "--jobs", "1", "--out", str(out)])
    with (out / "fronts.csv").open(encoding="utf-8", newline="") as opened:
        return out, list(csv.DictReader(opened)), "\n".join(lines)


def test_every_exported_combiner_has_a_line_for_each_problem(quick):
    out, rows, printed = quick
    names = [entry.name for entry in fronts.roster()]
    assert {entry.name for entry in exported()} < set(names)
    assert [(row["problem"], row["combiner"]) for row in rows] == [(p.name, name) for p in PROBLEMS for name in names]
    for name in names:
        assert sum(line.startswith(f"{name:26}") for line in printed.split("\n")) == len(PROBLEMS)
    assert (out / "fronts.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with_optimum = {row["combiner"] for row in rows if row["from_optimum"]}
    assert with_optimum == {
        e.name for e in fronts.roster() if "thresholds" in e.combiner.__dataclass_fields__
    } >= {"Lagrangian", "MOPO", "CAID"}  # fmt: skip


def test_the_table_shows_mean_and_standard_error():
    runs = [fronts.Run(np.array([v, 0.5]), d, 2 * d) for v, d in ((0.1, 0.01), (0.2, 0.02), (0.6, 0.06))]
    row = Ends("x", "weights", PROBLEMS[0], tuple(runs)).numbers()
    assert row["distance"] == pytest.approx(0.03)
    assert row["distance_error"] == pytest.approx(np.std([0.01, 0.02, 0.06], ddof=1) / 3**0.5)
    assert row["from_optimum"] == pytest.approx(0.06)
    assert (row["first"], row["second_spread"]) == (pytest.approx(0.3), 0)
    assert NAMES == ("first", "second")
