"""What every combiner adds to a training step, in time and in peak memory, relative to ``Linear``.

    python -m bench.combiners.family [--quick] [--json FILE] [--objectives 2 4 8] [--cpu-time]

A step is what one collected batch of 4 responses of 320 tokens (2 to each of 2 prompts) costs a policy of 14 million
parameters: the combiner, which has seen some batches before, observes this one, then the policy's forward pass,
signals, combination, loss, backward pass.
The policy is GPT-2 at a third of its width: as many layers, heads of the same size, and a vocabulary in the same
proportion, so that the head, which gradients at the representation pay for once more, has GPT-2's share of the
parameters: about 30 % (of a model of 7 billion it is 2 %). There is no generation, no reference, no reward and no
optimiser, and the batch is small, so the shares are upper bounds: a real step takes longer. Combiners are those that
the package exports, as they are without arguments, and a few variants; each goes with the loss that takes its score,
and is compared with ``Linear`` in front of that same loss.

How to read the table. A line is a combiner with N objectives.

* ``time``: median milliseconds added to a step, and as a share of the step with ``Linear``. All combiners and the step
  take turns within one run, so that a slow moment of the machine hits them all. What a combiner does to the step is
  timed by itself, ``observe`` and ``combine`` on the batch (a backward pass through the head or the policy that it asks
  for included), less the same of ``Linear``: the whole step varies by more than most of them add.
* ``memory``: megabytes added to the peak of what all tensors of a step hold, parameters and gradients included, and as
  a share of the peak with ``Linear``. Counted storage by storage on one whole step (``bench.combiners.memory``), not
  sampled: the
  same on every run. Nothing added means that the peak is elsewhere, mostly in the backward pass.
* ``limit`` is the largest share that is claimed, of time and of memory alike: 2 % for combiners of scores, 3 % for all
  others that need no gradients (constrained, adaptive, closed form), 30 % for those with gradients at the
  representation and two objectives. ``DynamicWeights`` looks at gradients at every tenth step alone: its time is
  the mean over ten, and its limit 3 %. ``FAILS`` stands where the measurement says otherwise.
  Gradients at parameters take one backward pass for each objective: no claim,
  and no line beyond four objectives.

Run it on an idle machine; the last line says what share of the cores it got. ``--cpu-time`` counts one thread's CPU
time, which other programs hardly change. About six minutes on two idle cores, and 2 GB.

Legend: B sequences, T tokens, L = 1 + T, N objectives.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.combiners.combine import Clock, Size, build_policy, make_experience
from bench.combiners.family_report import HEAD, UNITS, Row, claims_line, step_lines, table_line
from bench.combiners.memory import peak_bytes
from bench.combiners.roster import Entry, deeper, exported, variants
from moa_lightning.combiners import Combined
from moa_lightning.losses import PolicyLoss, RewardKL
from moa_lightning.models import Policy
from moa_lightning.models.policy import PolicyOutput
from moa_lightning.sources import Rollout
from moa_lightning.types import Experience, State

SOURCE, KL = Rollout(num_generations=2), RewardKL()
SEEN = 9  # batches before the first that is measured: windows are full, and multipliers move


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    size: Size
    sequences: int = 4
    tokens: int = 320
    objectives: tuple[int, ...] = (2, 4, 8)
    repeats: int = 3
    deepest: int = 4  # objectives up to which gradients of parameters are measured: one backward pass for each
    timer: Callable[[], float] = time.perf_counter
    claims: bool = True  # whether the limits are about steps of this size


DEFAULT = Plan(Size("third", {"n_embd": 256, "n_layer": 12, "n_head": 4, "vocab_size": 16384}, 4))
QUICK = Plan(
    Size("nano", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64}, 8),
    sequences=8,
    tokens=16,
    objectives=(2, 4),
    repeats=3,
    claims=False,
)


@dataclass(frozen=True)
class Bench:
    """A policy with a batch for N objectives, and what a training step does on it."""

    policy: Policy
    experience: Experience

    @staticmethod
    def build(policy: Policy, plan: Plan, objectives: int) -> "Bench":
        """Random responses and scores."""
        generator = torch.Generator().manual_seed(objectives)
        shape = (plan.sequences, 1 + plan.tokens)  # one token of prompt, and the response behind it
        ids_BL = torch.randint(1, policy.causal_lm.config.vocab_size, shape, generator=generator)
        logprobs_BT = torch.full((plan.sequences, plan.tokens), -math.log(policy.causal_lm.config.vocab_size))
        experience = replace(
            make_experience(ids_BL, logprobs_BT, objectives),
            group_B=torch.arange(plan.sequences) // SOURCE.num_generations,
            wins_BN=torch.rand(plan.sequences, objectives, generator=generator),
            log_prior_B=torch.zeros(plan.sequences),
            kl_penalty_B=torch.randn(plan.sequences, generator=generator),
            kl_coefficient=0.1,
        )
        return Bench(policy, experience)

    def start(self, entry: Entry) -> State:
        """The combiner's state when it has seen some batches."""
        names = self.experience.rewards.trained_names
        state = entry.combiner.init(names, torch.ones(len(names)))
        for _ in range(SEEN):
            state = entry.combiner.observe(self.experience, state)
        return state

    def forward(self) -> PolicyOutput:
        """With its graph."""
        responses = self.experience.responses
        output: PolicyOutput = self.policy(responses.input_ids_BL, responses.attention_mask_BL, responses.mask_BT)
        return output

    def combine(self, entry: Entry, state: State, output: PolicyOutput) -> tuple[Combined, State]:
        """What differs between the combiners."""
        state = entry.combiner.observe(self.experience, state)
        parameters = self.policy.parameters_at(entry.combiner.gradients_at)
        signals = SOURCE.signals(self.experience, output, entry.loss.clip_range, parameters)
        combined = entry.combiner.combine(signals, state)
        return combined, state if combined.state is None else combined.state

    def backward(self, loss: PolicyLoss, combined: Combined, output: PolicyOutput, again: bool) -> None:
        """Loss and backward pass; some losses take no negative scores, and none takes longer for their sign."""
        score = combined.score if loss.takes_advantages else combined.score.abs()
        result = loss(replace(combined, score=score), self.experience, output, KL)
        result.loss.backward(retain_graph=again)

    def step(self, entry: Entry, loss: PolicyLoss, state: State) -> None:
        """All of it; the gradients stay."""
        self.policy.zero_grad()
        output = self.forward()
        self.backward(loss, self.combine(entry, state, output)[0], output, again=False)


def measure(policy: Policy, entries: Sequence[Entry], plan: Plan, objectives: int) -> list[Row]:
    """The rows of one number of objectives; the first entry is what the others are compared with."""
    bench, linear = Bench.build(policy, plan, objectives), entries[0]
    losses = {type(entry.loss): entry.loss for entry in entries}
    parts = {entry.name: Clock(plan.timer) for entry in entries}
    forward, backwards = Clock(plan.timer), {loss: Clock(plan.timer) for loss in losses}
    between = {entry.name: Clock(plan.timer) for entry in entries if entry.period > 1}
    states = {entry.name: bench.start(entry) for entry in entries}
    for _ in range(1 + plan.repeats):
        policy.zero_grad()
        output = forward(bench.forward)
        # One graph for all of them: what they ask of it does not change it.
        combined = {}
        for e in entries:
            combined[e.name], states[e.name] = parts[e.name](bench.combine, e, states[e.name], output)
            if e.name in between:
                between[e.name](bench.combine, e, states[e.name], output)
                states[e.name] = bench.start(e)  # so that the next turn's first step is the dear one again
        for kind, loss in losses.items():
            backwards[kind](bench.backward, loss, combined[linear.name], output, loss is not list(losses.values())[-1])
            policy.zero_grad()
        del output, combined

    own = {name: median(clock.laps[1:]) for name, clock in parts.items()}
    for entry in (e for e in entries if e.name in between):
        usual = median(between[entry.name].laps[1:])
        own[entry.name] = usual + (own[entry.name] - usual) / entry.period
    shared = median(forward.laps[1:]) + own[linear.name]
    parameters = list(policy.parameters())
    # What was learnt is the same for each loss, and the first step of those with a period is the dear one.
    states = {entry.name: bench.start(entry) for entry in entries}
    peaks = {
        kind: peak_bytes(lambda loss=loss: bench.step(linear, loss, states[linear.name]), parameters)
        for kind, loss in losses.items()
    }
    rows = []
    for entry in entries:
        kind = type(entry.loss)
        policy.zero_grad()
        peak = peak_bytes(lambda entry=entry: bench.step(entry, entry.loss, states[entry.name]), parameters)
        row = Row(
            combiner=entry.name,
            kind=entry.kind,
            loss=kind.__name__,
            objectives=objectives,
            added_seconds=own[entry.name] - own[linear.name],
            step_seconds=shared + median(backwards[kind].laps[1:]),
            added_bytes=peak - peaks[kind],
            step_bytes=peaks[kind],
            limit=entry.limit(objectives) if plan.claims else None,
        )
        rows.append(row)
    policy.zero_grad()
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the numbers if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.combiners.family", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="a tiny policy and short responses, for a few seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--objectives", nargs="+", type=int, help="other numbers of objectives")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and its CPU time")
    options = parser.parse_args(arguments)
    plan = QUICK if options.quick else DEFAULT
    if options.objectives:
        plan = replace(plan, objectives=tuple(options.objectives))
    if options.cpu_time:
        torch.set_num_threads(1)
        plan = replace(plan, timer=time.process_time)
    policy, entries = build_policy(plan.size), [*exported(), *variants()]
    print(
        f"Added to a training step of {sum(p.numel() for p in policy.parameters()):,} parameters on {plan.sequences} "
        f"responses of {plan.tokens} tokens, relative to Linear with the same loss.\n"
        f"{'CPU time' if options.cpu_time else 'Wall time'} of {torch.get_num_threads()} CPU thread(s), medians of "
        f"{plan.repeats} turns; torch {torch.__version__}.\n"
    )
    print(HEAD, UNITS, sep="\n", flush=True)
    started, cpu_started = time.perf_counter(), time.process_time()
    rows: list[Row] = []
    for objectives in plan.objectives:
        more = deeper() if objectives <= plan.deepest else []
        found = measure(policy, [*entries, *more], plan, objectives)
        rows += found
        print(*map(table_line, found), sep="\n", flush=True)
        print(*step_lines(found), "", sep="\n", flush=True)
    share = (time.process_time() - cpu_started) / (time.perf_counter() - started) / torch.get_num_threads()
    print(claims_line(rows))
    print(f"This process had {share:.0%} of the cores that its threads could use.")
    if options.json is not None:
        content: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__, "share": share}
        content["rows"] = [row.numbers() for row in rows]
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
