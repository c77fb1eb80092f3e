"""Dual steps: worked numbers, the exact multipliers, and what each remembers."""

import pytest
import torch

from moa_lightning.combiners import CAID, MOPO, PID, Exponential, Lagrangian, LogBarrier, LogPID, Optimistic, Projected
from moa_lightning.functional import one_shot_dual
from tests.functional.closed_forms import mopo_ratio

EXACT = [
    Projected(lr=0.3),
    Optimistic(lr=0.3),
    PID(kp=0.3, ki=0.3, kd=0.1),
    Exponential(lr=1.0),
    LogPID(ki=0.5, margin=0.0, floor=1e-4, cap=50.0),
]


def multipliers(dual, slacks, start=None):
    """After each slack of one constraint."""
    duals_M, state, seen = torch.tensor([dual.start if start is None else start]), dual.init(1), []
    for slack in slacks:
        duals_M, state = dual.update(duals_M, torch.tensor([slack]), state)
        seen.append(float(duals_M))
    return seen


@pytest.mark.parametrize(
    ("dual", "start", "expected"),
    [  # violations 2, 1, -4
        (Projected(lr=0.1), 0.5, [0.7, 0.8, 0.4]),
        (Optimistic(lr=0.1), 0.5, [0.7, 0.7, 0.0]),  # 2 * 1 - 2 = 0; 2 * -4 - 1 = -9
        (Optimistic(lr=0.1, cap=0.6), 0.5, [0.6, 0.6, 0.0]),
        (PID(kp=0.2, ki=0.1), 0.5, [0.4 + 0.7, 0.2 + 0.8, 0.0]),  # -.8 + .4
        (PID(kp=0.0, ki=0.1, kd=1.0), 0.0, [0.2, 0.3, 0.0]),  # only an increase of the violation is charged
        (Exponential(lr=0.1), 1.0, [1.221403, 1.380078, 0.794620]),
        (Exponential(lr=0.1, cap=1.1), 1.0, [1.1, 1.1, 1.1 * 2.718282**-0.44]),
        # log lambda: .2 + .2; .1 + .3 - .1 (the change); and -.4 - .1 is below the floor, where the sum stands still
        (LogPID(kp=0.1, ki=0.1, kd=0.1, margin=0.0, smoothing=0.0, floor=0.9), 1.0, [1.491825, 1.349859, 0.9]),
        (LogPID(kp=0.0, ki=0.1, kd=1.0, margin=0.5, smoothing=0.5), 1.0, [1.284025, 0.904837, 0.067206]),
        (LogBarrier(sigma=1.0, margin=0.5, rate=0.5), 0.0, [1.0, 1.5, 0.75 + 0.125]),
    ],
)
def test_worked_numbers(dual, start, expected):
    for found, number in zip(multipliers(dual, [-2.0, -1.0, 4.0], start), expected, strict=True):
        assert found == pytest.approx(number, abs=1e-6)


def test_a_rising_violation_is_charged_by_its_derivative():
    assert multipliers(PID(kp=0.0, ki=0.1, kd=1.0), [-1.0, -3.0]) == pytest.approx([0.1, 0.4 + 2.0])


@pytest.mark.parametrize("dual", EXACT)
@pytest.mark.parametrize(("seed", "active"), [(0, 0), (5, 1), (2, 2)])
def test_converges_to_the_exact_multipliers(dual, seed, active):
    """Of ``max E[p] - tau KL, E[q] >= b``: with the optimal policy for the multipliers of the moment."""
    generator = torch.Generator().manual_seed(seed)
    p_B, q_BM = torch.rand(6, generator=generator), torch.rand(6, 2, generator=generator)
    b_M = (4 * torch.randn(6, generator=generator)).softmax(0) @ q_BM - 0.005  # that policy shows that they can be met
    exact = one_shot_dual(p_B, q_BM, b_M, beta=0.2)
    assert exact.feasible
    assert int((exact.duals > 0.1).sum()) == active
    duals_M, state = torch.full((2,), dual.start), dual.init(2)
    for _ in range(4000):
        values_M = mopo_ratio(p_B, q_BM, duals_M, 0.2) @ q_BM / 6
        duals_M, state = dual.update(duals_M, values_M - b_M, state)
    torch.testing.assert_close(duals_M, exact.duals, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("dual", "settles"),
    [
        (Projected(lr=0.1), False),
        (Optimistic(lr=0.1), True),
        (PID(kp=0.1, ki=0.1), True),
        (LogPID(margin=0.0), True),
    ],
)
def test_where_plain_steps_circle_the_others_settle(dual, settles):
    """The bilinear game ``x lambda - x``, solution (0, 1); as in training, each plays upon the other's last move."""
    x, duals_M, state, distances = 0.3, torch.tensor([1.0]), dual.init(1), []
    for _ in range(1000):
        duals_M, state = dual.update(duals_M, torch.tensor([x]), state)
        x += 0.1 * (float(duals_M) - 1)
        distances.append(max(abs(x), abs(float(duals_M) - 1)))
    assert max(distances[:100]) > 0.25
    assert (max(distances[-100:]) < 0.01) == settles
    assert settles or max(distances[-100:]) > 0.25


def test_an_unknown_slack_leaves_multiplier_and_memory_alone():
    for dual in (*EXACT, LogBarrier()):
        state, duals_M = dual.init(2), torch.full((2,), 1.0)
        for slack in (-0.2, 0.1):
            duals_M, state = dual.update(duals_M, torch.tensor([slack, slack]), state)
        after_M, memory = dual.update(duals_M, torch.tensor([torch.nan, -0.3]), state)
        assert float(after_M[0]) == float(duals_M[0])
        assert float(after_M[1]) != float(duals_M[1])
        assert all(torch.equal(memory[name][0], state[name][0]) for name in state)
        assert set(memory) == set(dual.init(2))


def test_the_controllers_sum_does_not_wind_up():
    held = multipliers(PID(kp=0.0, ki=0.1, cap=2.0), [-1.0] * 500 + [1.0])
    assert held[-2:] == pytest.approx([2.0, 1.9])
    # At its largest by the proportional part alone: the sum has not moved, and met again the multiplier is the first.
    held = multipliers(
        LogPID(kp=2.0, ki=0.1, kd=0.0, margin=0.0, cap=3.0, floor=0.1), [-1.0] * 500 + [0.0] + [2.0] * 500 + [0.0]
    )
    assert held[499:502] == pytest.approx([3.0, 1.0, 0.1])
    assert held[-1] == pytest.approx(1.0)


def plant(dual, window, speed_M, balance_M, steps=180):
    """Mean values of policies with two kinds of response, of which one has value 1 and costs the primary objective 1.

    Standardised advantages of the two are each other's negatives, so a multiplier away from its balance moves the
    policy at constant speed. Batches of 64 responses, an optimiser with a momentum of .9; threshold .7.

    Args:
        dual: how the multipliers move.
        window: batches that their values are averaged over.
        speed_M: of the policy's logit.
        balance_M: logarithm of the multiplier that would hold it.
        steps: batches.
    """
    generator, count = torch.Generator().manual_seed(0), len(speed_M)
    logit_M, momentum_M, values, batches = torch.full((count,), -2.0), torch.zeros(count), [], []
    state = dual.init(count) | {"spreads": torch.full((count,), 0.45), "duals": torch.full((count,), dual.start)}
    for _ in range(steps):
        values.append(logit_M.sigmoid())
        batches.append((torch.rand(64, count, generator=generator) < values[-1]).float().mean(0))
        state |= dual.step_state(state, torch.stack(batches[-window:]).mean(0) - 0.7)
        push_M = ((state["duals"].log() - balance_M) / 2).tanh()
        momentum_M = 0.9 * momentum_M + 0.1 * push_M * (values[-1] * (1 - values[-1])).sqrt()
        logit_M = (logit_M + speed_M * momentum_M).clamp(-6.0, 6.0)
    return torch.stack(values)


def test_settles_where_a_fixed_multiplier_holds_nothing():
    """Noisy batches, momentum, and a front that is a straight line: what circled in short runs on language."""
    speed_M = torch.tensor([1.2, 2.0, 4.0]).repeat(30)
    balance_M = torch.linspace(-0.7, 0.7, 90)
    last = plant(LogPID(margin=0.0), 1, speed_M, balance_M)[-60:]
    held = (last - 0.7).abs()
    assert held.mean() < 0.05
    assert (held[-1] < 0.1).float().mean() > 0.9  # two standard errors of a batch
    aimed = plant(LogPID(margin=0.2), 1, speed_M, balance_M)[-60:]  # .09 in this value's unit
    assert float(aimed.mean() - last.mean()) == pytest.approx(0.09, abs=0.02)
    circling = (plant(Exponential(), 8, speed_M, balance_M)[-60:] - 0.7).abs()
    assert circling.mean() > 0.2


def test_slacks_are_measured_in_spreads_where_a_step_says_so():
    state = {"duals": torch.ones(1), "spreads": torch.tensor([0.25])}
    for dual, scale in ((LogPID(), 4.0), (Exponential(), 1.0)):
        state |= dual.init(1)
        expected, _ = dual.update(state["duals"], torch.tensor([-0.1 * scale]), state)
        assert float(dual.step_state(state, torch.tensor([-0.1]))["duals"]) == float(expected) > 1


@pytest.mark.parametrize("kind", [Lagrangian, MOPO, CAID])
def test_another_dual_step_begins_with_its_own_memory(kind):
    """PID's sum is in units of lambda / ki, LogPID's is a logarithm: a multiplier of .165 became 4.3."""

    def begin(dual):
        combiner = kind({"b": 0.5}, dual=dual) if kind is not MOPO else MOPO(thresholds={"b": 0.5}, dual=dual)
        return combiner, combiner.init("ab", torch.ones(2))

    slack_N, dual = torch.tensor([torch.nan, -0.1]), LogPID(kp=0.0, kd=0.0, margin=0.0)
    _, state = begin(PID())
    for _ in range(22):
        state |= PID().step_state(state, slack_N)
    other, fresh = begin(dual)
    resumed = other.resume(state, fresh)
    after = dual.step_state(resumed, slack_N)["duals"]
    assert float(after[1]) == pytest.approx(float(state["duals"][1]), rel=0.01)
    # Back again, and from a checkpoint that holds LogPID's memory under names that PID uses.
    resumed |= dual.step_state(resumed, slack_N)
    old = {name.replace("log_pid", "dual"): value for name, value in resumed.items()}
    assert "dual_sum" in old
    taken = other.resume(old, fresh)
    assert torch.equal(taken["log_pid_sum"][1:], resumed["log_pid_sum"][1:])
    back, first = begin(PID())
    for saved in (resumed, old):
        after = PID(kp=0.0).step_state(back.resume(saved, first), slack_N)["duals"]
        assert float(after[1]) == pytest.approx(float(resumed["duals"][1]) + 0.005, abs=1e-4)


def test_how_long_a_threshold_is_stuck():
    dual, batches_M = Projected(cap=2.0), torch.tensor([3.0, 3.0, 3.0])
    violated_M = torch.tensor([True, True, False])
    assert dual.stuck(torch.tensor([2.0, 1.9, 2.0]), violated_M, batches_M).tolist() == [4.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Projected(lr=0.0), "Projected needs lr > 0 and cap > 0, got 0.0 and 10.0"),
        (lambda: Optimistic(cap=-1.0), "Optimistic needs lr > 0"),
        (lambda: PID(ki=0.0), "PID needs ki > 0"),
        (lambda: PID(kp=-0.1), "kp >= 0"),
        (lambda: Exponential(lr=float("nan")), "Exponential needs lr > 0"),
        (lambda: LogPID(kd=-1.0), "LogPID needs kp >= 0 and kd >= 0, got 1.5 and -1.0"),
        (lambda: LogPID(margin=-0.1), "LogPID needs margin >= 0, got -0.1"),
        (lambda: LogPID(smoothing=1.0), r"smoothing in \[0, 1\), got 1.0"),
        (lambda: LogPID(start=9.0), "LogPID needs floor <= start <= cap, got 0.01, 9.0 and 5.0"),
        (lambda: Exponential(start=0.0), "floor <= start <= cap, .*; Projected starts at 0"),
    ],
)
def test_refuses_settings_without_meaning(make, message):
    with pytest.raises(ValueError, match=message):
        make()
