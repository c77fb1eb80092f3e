"""The time of MOPO's dual step and combination, beside one training step of the policy on the same batch.

CPU time of one thread, which other programs on the machine hardly change: on the wall, threads that wait for each other
make a training step several times slower there, and a share of it looks better than it is.

Legend: P prompts, K responses to each, B = P K sequences, T tokens, N objectives.
"""

import time
from dataclasses import asdict, dataclass, replace
from statistics import median

import torch

from bench.combiners.combine import Clock, Size, build_policy, make_experience
from moa_lightning.combiners import MOPO, Combined
from moa_lightning.losses import RewardKL, WeightedLikelihood
from moa_lightning.sources import PreferenceRows

RESPONSES = 4  # to each prompt
OBJECTIVES = 3


@dataclass(frozen=True)
class Case:
    """A policy and a batch for it."""

    size: Size
    prompts: int
    tokens: int


@dataclass(frozen=True)
class CostRow:
    """Medians, in seconds."""

    policy: str
    parameters: int
    sequences: int
    tokens: int
    step: float  # forward and backward pass of the policy
    observe: float  # the dual step
    combine: float  # the weights

    @property
    def share(self) -> float:
        """The dual step and the weights, of the training step."""
        return (self.observe + self.combine) / self.step


_TINY = Size("tiny", {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 1024}, 0)
_SMALL = Size("small", {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 16384}, 0)
_GPT2 = Size("gpt2", {}, 0)
DEFAULT = (
    Case(replace(_TINY, name="nano", fields={"n_embd": 16, "n_layer": 1, "n_head": 1, "vocab_size": 64}), 1, 4),
    Case(_TINY, 2, 32),
    Case(_TINY, 8, 128),
    Case(_SMALL, 2, 32),
    Case(_SMALL, 4, 128),
    Case(_GPT2, 2, 64),
)
QUICK = DEFAULT[:2]


def measure(case: Case, repeats: int) -> CostRow:
    """The medians of one case; step and combination take turns, so that a slow moment of the machine hits both."""
    policy, sequences = build_policy(case.size), case.prompts * RESPONSES
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(1, policy.causal_lm.config.vocab_size, (sequences, 1 + case.tokens), generator=generator)
    inputs = (ids_BL, torch.ones_like(ids_BL), torch.ones(sequences, case.tokens, dtype=torch.bool))
    experience = replace(
        make_experience(ids_BL, torch.zeros(sequences, case.tokens), OBJECTIVES),
        group_B=torch.arange(case.prompts).repeat_interleave(RESPONSES),
        wins_BN=torch.rand(sequences, OBJECTIVES, generator=generator),
        log_prior_B=torch.randn(sequences, generator=generator),
    )
    names = list(experience.rewards.names)
    combiner = MOPO(thresholds=dict.fromkeys(names[1:], 0.6))
    state = combiner.init(names, torch.ones(OBJECTIVES))
    source, loss, kl = PreferenceRows(), WeightedLikelihood(), RewardKL()
    combined = Combined(torch.ones(sequences), torch.ones(OBJECTIVES))

    def step() -> None:
        policy.zero_grad()
        loss(combined, experience, policy(*inputs), kl).loss.backward()

    with torch.no_grad():
        signals = source.signals(experience, policy(*inputs), loss.clip_range)
    clocks = [Clock(time.process_time) for _ in range(3)]
    for _ in range(1 + repeats):
        clocks[0](step)
        state = clocks[1](combiner.observe, experience, state)
        clocks[2](combiner.combine, signals, state)
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    medians = [median(clock.laps[1:]) for clock in clocks]
    return CostRow(case.size.name, parameters, sequences, case.tokens, *medians)


def cost(quick: bool) -> list[CostRow]:
    """Measure all cases and print each as it comes."""
    print(
        f"\nThe dual step (MOPO.observe) and the weights (MOPO.combine) beside one training step (forward and backward "
        f"pass, no optimiser)\non the same batch, {RESPONSES} responses to each prompt, {OBJECTIVES} objectives. "
        "Medians of the CPU time of one thread.\n"
    )
    print(f"{'policy':8}{'parameters':>13}{'batch':>10}{'step':>12}{'observe':>11}{'combine':>11}{'share':>9}")
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for case in QUICK if quick else DEFAULT:
        row = measure(case, 3 if case.size is _GPT2 else 7)
        rows.append(row)
        print(
            f"{row.policy:8}{row.parameters:>13,}{f'{row.sequences} x {row.tokens}':>10}{row.step * 1e3:>9.1f} ms"
            f"{row.observe * 1e3:>8.2f} ms{row.combine * 1e3:>8.2f} ms{row.share:>9.2%}",
            flush=True,
        )
    torch.set_num_threads(threads)
    above = [f"{row.policy} with {row.sequences} x {row.tokens}" for row in rows if row.share >= 0.01]
    constant = median(row.observe + row.combine for row in rows)
    print(
        f"\nUnder 1 % of a training step in {len(rows) - len(above)} of {len(rows)} cases"
        + (f"; not for {', '.join(above)}" if above else "")
        + f".\nIt costs about {constant * 1e3:.1f} ms whatever the policy: under 1 % of any step that takes more than "
        f"{constant * 1e2:.2f} s."
    )
    return rows


def as_dict(row: CostRow) -> dict[str, object]:
    """For a CSV file."""
    return asdict(row) | {"share": row.share}
