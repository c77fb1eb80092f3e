"""Every combiner of the package, and the batches that all of them are run on.

Legend: B sequences, T tokens, N objectives.
"""

import dataclasses
import inspect

import pytest
import torch
import torchjd.aggregation as torchjd

import moa_lightning.combiners as package
from moa_lightning.combiners import Combiner
from moa_lightning.distributed import all_sum
from moa_lightning.functional import representation_gramian
from moa_lightning.signals import ClipRange, Signal, Signals
from tests.combiners import scored

COMBINERS = [
    c for _, c in inspect.getmembers(package, inspect.isclass) if issubclass(c, Combiner) and not inspect.isabstract(c)
]
# Where one objective is special, it must be the same one in every order; what a combiner waits for, it has at once.
CHOSEN = {"primary": "a", "reference_batches": 1}
DEFAULTS = {c.__name__: c(**{k: v for k, v in CHOSEN.items() if k in c.__dataclass_fields__}) for c in COMBINERS}
SETTINGS = {
    **{
        f"PAMA-{g}-{'noon' if noon else 'signed'}": package.PAMA(g, noon)
        for g in ("token", "sequence", "batch")
        for noon in (True, False)
    },
    "MGDAUB-normalize": package.MGDAUB(normalize=True),
    "GAPO-2": package.GAPO(power=2),
    "PGAPO-2": package.PGAPO(power=2),
    "Tchebycheff-given": package.Tchebycheff(ideal={"a": 3.0}),
    "Gramian-MGDA": package.Gramian(torchjd.MGDAWeighting(1e-5, 250)),
    "Gramian-DualProj": package.Gramian(torchjd.DualProjWeighting()),
    "Gramian-CAGrad": package.Gramian(torchjd.CAGradWeighting(c=0.5)),
    "Gramian-UPGrad-1": package.Gramian(norm_power=1.0),
}
EVERY = DEFAULTS | SETTINGS
every_combiner = pytest.mark.parametrize("combiner", [pytest.param(c, id=name) for name, c in EVERY.items()])

LENGTHS = torch.tensor([4, 4, 2, 3, 4, 1, 3, 0])  # the last row is not trained on


def collected(objectives=3, seed=0, prompts=2):
    """A collected batch with all that any combiner reads: 4 responses to each prompt."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    count = 4 * prompts
    mask_BT = torch.arange(4) < LENGTHS.repeat(prompts)[:count].unsqueeze(1)
    rows = scored.experience(draw(count, objectives), torch.arange(prompts).repeat_interleave(4))
    return dataclasses.replace(
        rows,
        rewards=as_costs(rows.rewards),
        mask_BT=mask_BT,
        advantages_BTN=draw(count, 4, objectives) * mask_BT.unsqueeze(-1),
        wins_BN=draw(count, objectives).sigmoid(),
        behaviour_logprobs_BT=0.3 * draw(count, 4),  # the policy's are 0
        reference_logprobs_BT=-draw(count, 4).square(),  # stands for the gradients' squared norms
        kl_penalty_B=torch.zeros(count),
        kl_coefficient=0.1,
    )


def as_costs(table):
    """The same values, as objectives have them that are costs, doubled and shifted: no raw score is its value."""
    scales_N = torch.tensor([-1.0, 2.0, 0.5, 1.0] * 4)[: len(table.names)]
    shifts_N = torch.tensor([0.1, -1.0, 0.25, 3.0] * 4)[: len(table.names)]
    return dataclasses.replace(table, raw_BN=(table.value_BN - shifts_N) / scales_N)


def clipped(rows, low=-0.5, high=0.5):
    """The same batch with values that objectives clip."""
    value_BN = rows.rewards.value_BN.clamp(low, high)
    return dataclasses.replace(rows, rewards=dataclasses.replace(rows.rewards, value_BN=value_BN))


def changed(rows, change):
    """The same batch with other numbers: ``change`` is applied to advantages, scores and logits of the wins."""
    table = as_costs(dataclasses.replace(rows.rewards, value_BN=change(rows.rewards.value_BN)))
    return dataclasses.replace(
        rows,
        rewards=table,
        advantages_BTN=change(rows.advantages_BTN),
        wins_BN=change(rows.wins_BN.logit()).sigmoid(),
    )


def picked(rows, objectives):
    """The same batch with these of its objectives, in this order."""
    table = dataclasses.replace(
        rows.rewards,
        names=tuple(rows.rewards.names[i] for i in objectives),
        trained=(True,) * len(objectives),
        raw_BN=rows.rewards.raw_BN[:, objectives],
        value_BN=rows.rewards.value_BN[:, objectives],
    )
    return dataclasses.replace(
        rows,
        rewards=table,
        valid_BN=rows.valid_BN[:, objectives],
        advantages_BTN=rows.advantages_BTN[..., objectives],
        wins_BN=rows.wins_BN[:, objectives],
    )


def renamed(rows):
    """Names that are all different, whatever was picked."""
    names = tuple("abcdefghijklmnop"[: len(rows.rewards.names)])
    return dataclasses.replace(rows, rewards=dataclasses.replace(rows.rewards, names=names))


def missing(rows):
    """Some scores are NaN: one, all of an objective for a prompt, and all of a row."""
    gone_BN = torch.zeros_like(rows.valid_BN)
    gone_BN[1, 0] = gone_BN[4:, 1] = gone_BN[3] = True
    return without(rows, gone_BN)


def without(rows, gone_BN, advantage=torch.nan):
    """Those scores are missing; their advantages are what must not count."""
    value_BN = rows.rewards.value_BN.masked_fill(gone_BN, torch.nan)
    return dataclasses.replace(
        rows,
        rewards=as_costs(dataclasses.replace(rows.rewards, value_BN=value_BN)),
        valid_BN=~gone_BN,
        mask_BT=rows.mask_BT & ~gone_BN.all(1, keepdim=True),
        advantages_BTN=rows.advantages_BTN.masked_fill(gone_BN.unsqueeze(1), advantage),
        wins_BN=rows.wins_BN.masked_fill(gone_BN, torch.nan),
    )


def _column(sign):
    return lambda values: torch.cat([values[..., :1], sign * values[..., :1] * torch.tensor([1.0, 2.0])], -1)


INPUTS = {
    "plain": collected(),
    "tiny": changed(collected(), lambda v: v * 1e-10),
    "huge": changed(collected(), lambda v: v * 1e15),
    "apart": changed(collected(), lambda v: v * torch.tensor([1e-10, 1.0, 1e15])),
    "one": collected(1),
    "two": collected(2, seed=1),
    "sixteen": collected(16, seed=2),
    "zeros": changed(collected(), lambda v: v * 0.0),
    "ties": changed(collected(seed=3), torch.round),
    "duplicated": renamed(picked(collected(seed=4), [0, 1, 0, 1, 2])),
    "constant": changed(collected(), lambda v: v * torch.tensor([1.0, 1.0, 0.0])),
    "missing": missing(collected(seed=5)),
    "conflicting": changed(collected(), _column(-1.0)),
    "aligned": changed(collected(), _column(1.0)),
    "clipped": clipped(collected(seed=6)),
}


def norms(rows):
    """Squared norms of the tokens' gradients at the representation."""
    return -rows.reference_logprobs_BT * rows.mask_BT


CLIPPED = ClipRange(0.2, 0.2)


def signals(rows, only=None, clip_range=CLIPPED):
    """What a source would give of it, or only some of that."""
    norms_BT = norms(rows)
    fields = {
        Signal.ADVANTAGES: {"advantages_BTN": rows.advantages_BTN},
        Signal.SCORES: {"scores_BN": rows.scores_BN},
        Signal.WINS: {"wins_BN": rows.wins_BN},
        Signal.RATIO: {"ratio_BT": (-rows.behaviour_logprobs_BT).exp()},
        Signal.GRAMIAN: {"gramian": lambda slopes_BTN: all_sum(representation_gramian(slopes_BTN, norms_BT))},
    }
    chosen = {k: v for name, f in fields.items() if only is None or name in only for k, v in f.items()}
    # The group is always given: signal GROUPS says that prompts have several responses.
    return Signals(rows.mask_BT, rows.valid_BN, group_B=rows.group_B, clip_range=clip_range, **chosen)


def begin(combiner, rows):
    """First state; the objectives' own weights go by their names, so that none is like another."""
    names = rows.rewards.names
    return combiner.init(names, torch.tensor([1.0 + "abcdefghijklmnop".index(name) for name in names]))


def run(combiner, rows, clip_range=CLIPPED):
    """What it makes of a batch that it has just observed."""
    return combiner.combine(signals(rows, clip_range=clip_range), combiner.observe(rows, begin(combiner, rows)))
