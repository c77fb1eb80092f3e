"""Every combiner of the package over shared inputs: the properties that all of them claim."""

import dataclasses
import inspect

import pytest
import torch

import moa_lightning.combiners as package
from moa_lightning.combiners import Combiner, Linear
from moa_lightning.functional import representation_gramian
from moa_lightning.signals import Signal, Signals

COMBINERS = [
    c for _, c in inspect.getmembers(package, inspect.isclass) if issubclass(c, Combiner) and c is not Combiner
]
VARIANTS = [
    # Where one objective is special, it must be the same one in every order.
    *[
        pytest.param(c(**({"primary": "o0"} if "primary" in c.__dataclass_fields__ else {})), id=c.__name__)
        for c in COMBINERS
    ],
    *[
        pytest.param(package.PAMA(granularity=g, noon=n), id=f"PAMA-{g}-{'noon' if n else 'signed'}")
        for g in ("token", "sequence", "batch")
        for n in (True, False)
    ],
    pytest.param(package.MGDAUB(normalize=True), id="MGDAUB-normalize"),
]


def signals(objectives=3, seed=0, scale=1.0, missing=False, only=None):
    generator = torch.Generator().manual_seed(seed)
    mask_BT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    advantages_BTN = torch.randn(4, 4, objectives, generator=generator) * scale * mask_BT.unsqueeze(-1)
    valid_BN = torch.ones(4, objectives, dtype=torch.bool)
    if missing:
        valid_BN[1, 0] = False
        advantages_BTN[1, :, 0] = torch.nan
    norms_BT = torch.rand(4, 4, generator=generator) * mask_BT
    fields = {
        Signal.ADVANTAGES: {"advantages_BTN": advantages_BTN},
        Signal.SCORES: {"scores_BN": torch.randn(4, objectives, generator=generator) * scale},
        Signal.WINS: {
            "wins_BN": torch.rand(4, objectives, generator=generator).masked_fill(~valid_BN, torch.nan),
        },
        Signal.RATIO: {"ratio_BT": 1 + 0.3 * torch.randn(4, 4, generator=generator)},
        Signal.GRAMIAN: {"gramian": lambda slopes_BTN: representation_gramian(slopes_BTN, norms_BT)},
    }
    chosen = {k: v for name, f in fields.items() if only is None or name in only for k, v in f.items()}
    group_B = torch.tensor([0, 0, 1, 1])  # always given: signal GROUPS says that prompts have several responses
    return Signals(mask_BT=mask_BT, valid_BN=valid_BN, group_B=group_B, clip_range=0.2, **chosen)


def permuted(given, order):
    return dataclasses.replace(
        given,
        valid_BN=given.valid_BN[:, order],
        advantages_BTN=given.advantages_BTN[..., order],
        scores_BN=given.scores_BN[:, order],
        wins_BN=given.wins_BN[:, order],
    )


def start(combiner, objectives=3, order=None):
    return combiner.init([f"o{i}" for i in order or range(objectives)], torch.ones(objectives))


@pytest.mark.parametrize("combiner", VARIANTS)
@pytest.mark.parametrize("objectives", [1, 2, 3, 16])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e15])
def test_weights_lie_on_the_simplex_and_scores_are_finite(combiner, objectives, scale):
    given = signals(objectives, scale=scale)
    combined = combiner.combine(given, start(combiner, objectives))
    assert torch.isfinite(combined.score).all()
    assert (combined.score[~given.mask_BT] == 0).all() if combined.score.ndim == 2 else (combined.score[3] == 0)
    assert (combined.weights_N >= 0).all()
    torch.testing.assert_close(combined.weights_N.sum(), torch.tensor(1.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("combiner", VARIANTS)
def test_permuting_the_objectives_permutes_the_weights(combiner):
    order = [2, 0, 1]
    given = signals(missing=True)
    combined = combiner.combine(given, start(combiner))
    other = combiner.combine(permuted(given, order), start(combiner, order=order))
    torch.testing.assert_close(other.weights_N, combined.weights_N[order], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.score, combined.score, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("combiner", VARIANTS)
def test_missing_scores_do_not_poison_the_rest(combiner):
    given = signals(missing=True)
    combined = combiner.combine(given, start(combiner))
    assert torch.isfinite(combined.score).all()
    assert torch.isfinite(combined.weights_N).all()
    # Whatever stands where an objective is missing must not matter.
    changed = given.advantages_BTN.clone()
    changed[1, :, 0] = 1e6
    scores_BN = given.scores_BN.clone()
    scores_BN[1, 0] = -1e6
    other = combiner.combine(dataclasses.replace(given, advantages_BTN=changed, scores_BN=scores_BN), start(combiner))
    assert torch.equal(other.score, combined.score)
    assert torch.equal(other.weights_N, combined.weights_N)


@pytest.mark.parametrize(
    "combiner",
    [v for v in VARIANTS if "noon" not in v.id and v.id != "PAMA" and Signal.ADVANTAGES in v.values[0].needs],
)
def test_one_objective_gives_back_the_plain_advantage(combiner):
    given = signals(1)
    combined = combiner.combine(given, start(combiner, 1))
    assert torch.equal(combined.score, given.advantages_BTN[..., 0])


@pytest.mark.parametrize("combiner", VARIANTS)
def test_needs_is_honest(combiner):
    whole = combiner.combine(signals(), start(combiner))
    bare = combiner.combine(signals(only=combiner.needs), start(combiner))
    assert torch.equal(whole.score, bare.score)
    assert torch.equal(whole.weights_N, bare.weights_N)


@pytest.mark.parametrize("combiner", VARIANTS)
def test_there_is_no_hidden_memory(combiner):
    state = start(combiner)
    before = {k: v.clone() for k, v in state.items()}
    first = combiner.combine(signals(), state)
    combiner.combine(signals(seed=1), state)
    second = combiner.combine(signals(), state)
    assert torch.equal(first.score, second.score)
    assert all(torch.equal(before[k].nan_to_num(9), state[k].nan_to_num(9)) for k in before)
    assert all(v.dtype == torch.float32 for v in state.values())


@pytest.mark.parametrize("combiner", VARIANTS)
def test_duplicated_and_constant_objectives_are_no_error(combiner):
    given = signals(2)
    twice = dataclasses.replace(
        given,
        advantages_BTN=torch.cat([given.advantages_BTN, given.advantages_BTN, torch.zeros(4, 4, 1)], -1),
        valid_BN=torch.ones(4, 5, dtype=torch.bool),
        scores_BN=torch.cat([given.scores_BN, given.scores_BN, torch.zeros(4, 1)], -1),
        wins_BN=torch.cat([given.wins_BN, given.wins_BN, torch.full((4, 1), 0.5)], -1),
    )
    combined = combiner.combine(twice, start(combiner, 5))
    assert torch.isfinite(combined.score).all()
    torch.testing.assert_close(combined.weights_N.sum(), torch.tensor(1.0))


def test_every_combiner_of_the_package_is_covered():
    assert {Linear, package.PAMA, package.MGDAUB} <= set(COMBINERS)
