"""The time of one combination: PAMA, MGDA-UB and full-gradient MGDA, over N objectives and sizes of policy.

    python -m bench.combiners.combine [--quick] [--json FILE] [--policies tiny small medium gpt2] [--cpu-time]

How to read the table. One row is one policy with N objectives; every number is for one update on 32 sequences of 512
tokens, the median of repeats after a warm-up, on the CPU with torch's threads.

* ``step``: one forward pass and one backward pass of the policy, with the clipped surrogate. No generation, no value
  heads and no optimiser: a real update takes longer, so the shares of it are upper bounds.
* ``PAMA``: ``PAMA().combine`` on the N advantages per token, and its share of the step. It reads (sequences, tokens, N)
  numbers and nothing of the policy.
* ``MGDA-UB``: ``MGDAUB().combine``, with the gradient through the language-model head that it asks for, also as a
  multiple of PAMA.
* ``full MGDA``: what a trainer pays that takes MGDA literally: N backward passes over all parameters, the N x N Gram
  matrix of these gradients, and TorchJD's min-norm solve. ``held`` is the memory of the N gradients. Such a trainer
  gets the combined gradient from these N and saves the one backward pass of the step; nothing is deducted here.

``~`` marks a number that was measured on fewer sequences and multiplied: 32 sequences of a large policy do not fit, and
a trainer would accumulate such micro-batches. What grows with the sequences is multiplied (forward and backward
passes, the gradient through the head); what does not is measured as it is (Gram matrix of the parameters' gradients,
solves), and so is PAMA, always on the whole 32 sequences.

Below the table stand the ratios that carry the claims: PAMA over N (linear), PAMA over the policies (flat), PAMA
against the step, and the full-gradient solve against both. Ratios survive another machine; seconds do not.

Run it on an idle machine. The last line says what share of its cores the process got: threads that wait for each other
lose most of their time when it is small, and a PAMA of milliseconds loses more than a step of seconds. Where other
programs must run, ``--cpu-time`` counts the CPU time of one thread, which they hardly change.

The whole run takes about four minutes on two cores and 10 GB of memory, nearly all of it for ``gpt2``;
``--policies`` leaves policies out.

Legend: B sequences, T tokens, N objectives, P parameters.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from torchjd.aggregation import MGDAWeighting
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from bench.combiners.combine_report import HEAD, UNITS, Row, summarise, summary_lines, table_line
from moa_lightning.combiners import MGDAUB, PAMA, Combined
from moa_lightning.functional.surrogate import clipped_surrogate
from moa_lightning.losses import ClippedSurrogate, RewardKL
from moa_lightning.models import Policy
from moa_lightning.models.loading import disable_dropout
from moa_lightning.models.policy import PolicyOutput
from moa_lightning.signals import Signals
from moa_lightning.sources import Rollout
from moa_lightning.types import Experience, Responses, RewardTable


@dataclass(frozen=True)
class Size:
    """A policy to build: GPT-2's architecture, its own defaults where nothing is said."""

    name: str
    fields: dict[str, Any]
    measured: int  # sequences of one measurement; what grows with them is multiplied up to the plan's


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    sizes: tuple[Size, ...]
    sequences: int = 32
    tokens: int = 512
    objectives: tuple[int, ...] = (2, 4, 8, 16)
    cheap_repeats: int = 51  # of PAMA
    repeats: int = 3  # of the step and of MGDA-UB; every backward pass of the full gradient is a repeat too
    timer: Callable[[], float] = time.perf_counter


DEFAULT = Plan(
    (
        Size("tiny", {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 1024}, 32),
        Size("small", {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 16384}, 2),
        Size("medium", {"n_embd": 512, "n_layer": 6, "n_head": 8}, 1),
        Size("gpt2", {}, 1),
    )
)
QUICK = Plan(
    (
        Size("nano", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64}, 8),
        Size("micro", {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 256}, 4),
    ),
    sequences=8,
    tokens=32,
    cheap_repeats=21,
)


@dataclass
class Clock:
    """Times the calls it makes."""

    timer: Callable[[], float]
    laps: list[float] = field(default_factory=list)

    def __call__(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """What the call returns."""
        started = self.timer()
        result = call(*arguments)
        self.laps.append(self.timer() - started)
        return result


def median_seconds(call: Callable[[], Any], repeats: int, timer: Callable[[], float]) -> float:
    """Median time of a call after one that does not count."""
    call()
    clock = Clock(timer)
    for _ in range(repeats):
        clock(call)
    return median(clock.laps)


def build_policy(size: Size) -> Policy:
    """A policy with random weights, and a tokenizer that has no more than the end token."""
    torch.manual_seed(0)
    config = GPT2Config(**size.fields, bos_token_id=0, eos_token_id=0)
    core = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    model = AutoModelForCausalLM.from_config(config)
    disable_dropout(model)
    return Policy(model, PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>"))


def make_experience(ids_BL: Tensor, logprobs_BT: Tensor, objectives: int) -> Experience:
    """Experience of full length whose ratios lie on both sides of the clip range, with random advantages."""
    sequences, tokens = logprobs_BT.shape
    generator = torch.Generator().manual_seed(objectives)
    names = tuple(f"objective_{i}" for i in range(objectives))
    table_BN = torch.randn(sequences, objectives, generator=generator)
    mask_BT = torch.ones(sequences, tokens, dtype=torch.bool)
    texts = [""] * sequences
    return Experience(
        responses=Responses(ids_BL, torch.ones_like(ids_BL), mask_BT, ~mask_BT.any(1), texts, texts, {}),
        rewards=RewardTable(names, (True,) * objectives, table_BN, table_BN),
        valid_BN=torch.ones_like(table_BN, dtype=torch.bool),
        mask_BT=mask_BT,
        behaviour_logprobs_BT=logprobs_BT + 0.2 * torch.randn(logprobs_BT.shape, generator=generator),
        reference_logprobs_BT=logprobs_BT,
        advantages_BTN=torch.randn(sequences, tokens, objectives, generator=generator),
        returns_BTN=None,
        values_BTN=None,
        tokens_per_row=float(tokens),
    )


def full_gradients(
    policy: Policy, experience: Experience, output: PolicyOutput, timer: Callable[[], float]
) -> tuple[Tensor, list[float]]:
    """Gradients (N, P) of each objective's own surrogate by all parameters, and the seconds of each backward pass."""
    parameters = policy.trainable()[0]
    objectives = experience.advantages_BTN.shape[2]
    # Filled, so that the first touch of the memory is not counted as time of a backward pass.
    gradients_NP = torch.empty(objectives, sum(p.numel() for p in parameters)).fill_(0.0)
    ratio_BT = (output.logprobs_BT - experience.behaviour_logprobs_BT).exp()
    clock = Clock(timer)

    def backward(index: int) -> None:
        surrogate_BT = clipped_surrogate(ratio_BT, experience.advantages_BTN[..., index], 0.2)
        parts = torch.autograd.grad(surrogate_BT.mean(), parameters, retain_graph=True)
        torch.cat([part.flatten() for part in parts], out=gradients_NP[index])

    for index in range(objectives):
        clock(backward, index)
    return gradients_NP, clock.laps


def min_norm(gradients_NP: Tensor) -> Tensor:
    """MGDA's weights (N,): Gram matrix over all parameters, then TorchJD's solve."""
    gram_NN = (gradients_NP @ gradients_NP.T).double()
    weights_N: Tensor = MGDAWeighting()(gram_NN / gram_NN.diagonal().max())
    return weights_N


def measure(size: Size, plan: Plan) -> list[Row]:
    """The rows of one policy."""
    policy = build_policy(size)
    source, loss, kl = Rollout(), ClippedSurrogate(), RewardKL()
    times = plan.sequences / size.measured
    # One token of prompt, and the response behind it.
    ids_BL = torch.randint(1, policy.causal_lm.config.vocab_size, (plan.sequences, 1 + plan.tokens))
    few = torch.arange(size.measured)
    full_BT = torch.ones(plan.sequences, plan.tokens, dtype=torch.bool)
    inputs = (ids_BL[few], torch.ones_like(ids_BL[few]), full_BT[few])

    output: PolicyOutput = policy(*inputs)  # its graph stays: MGDA-UB and the full gradient differentiate it
    logprobs_BT = output.logprobs_BT.detach().repeat(-(-plan.sequences // size.measured), 1)[: plan.sequences]
    experiences = {n: make_experience(ids_BL, logprobs_BT, n) for n in plan.objectives}
    all_output = replace(output, logprobs_BT=logprobs_BT)
    signals = {n: source.signals(e, all_output, loss.clip_range) for n, e in experiences.items()}
    part = {n: source.signals(e.select(few), output, loss.clip_range) for n, e in experiences.items()}

    largest = experiences[max(plan.objectives)].select(few)
    combined = Combined(largest.advantages_BTN[..., 0], torch.ones(max(plan.objectives)))

    def step() -> None:
        policy.zero_grad()
        loss(combined, largest, policy(*inputs), kl).loss.backward()

    def mgda_ub(n: int) -> float:
        clock, total = Clock(plan.timer), Clock(plan.timer)
        head_gramian = part[n].gramian
        assert head_gramian is not None
        whole = replace(signals[n], gramian=lambda slopes_BTN: clock(head_gramian, slopes_BTN[few]))
        total(MGDAUB().combine, whole, {})
        return total.laps[0] + (times - 1) * clock.laps[0]

    step_seconds = times * median_seconds(step, plan.repeats, plan.timer)
    policy.zero_grad()
    pama = pama_seconds(signals, plan.cheap_repeats, plan.timer)
    mgda_ub(plan.objectives[0])
    ub = {n: median(mgda_ub(n) for _ in range(plan.repeats)) for n in plan.objectives}
    gradients_NP, laps = full_gradients(policy, largest, output, plan.timer)
    backward = times * median(laps)
    full = {
        n: n * backward + median_seconds(partial(min_norm, gradients_NP[:n]), 1, plan.timer) for n in plan.objectives
    }
    return [
        Row(
            policy=size.name,
            parameters=gradients_NP.shape[1],
            objectives=n,
            shape=(plan.sequences, plan.tokens, n),
            measured_sequences=size.measured,
            scaled=size.measured < plan.sequences,
            step_seconds=step_seconds,
            pama_seconds=pama[n],
            mgda_ub_seconds=ub[n],
            full_gradient_seconds=full[n],
            gradient_bytes=gradients_NP[:n].nbytes,
        )
        for n in plan.objectives
    ]


def pama_seconds(signals: dict[int, Signals], repeats: int, timer: Callable[[], float]) -> dict[int, float]:
    """Median time of one PAMA per N; the N take turns, so that a slow moment of the machine hits them all."""
    clocks = {n: Clock(timer) for n in signals}
    for _ in range(1 + repeats):
        for n, clock in clocks.items():
            clock(PAMA().combine, signals[n], {})
    return {n: median(clock.laps[1:]) for n, clock in clocks.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the numbers if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.combiners.combine", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="tiny policies and short sequences, for a few seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the settings, rows and ratios there too")
    names = [size.name for size in DEFAULT.sizes]
    parser.add_argument("--policies", nargs="+", choices=names, default=names, help="leave out the others")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, and its CPU time in place of the time on the wall: for a machine that has other work to do",
    )
    options = parser.parse_args(arguments)
    plan = QUICK if options.quick else DEFAULT
    if options.cpu_time:
        torch.set_num_threads(1)
        plan = replace(plan, timer=time.process_time)
    if not options.quick:
        plan = replace(plan, sizes=tuple(size for size in plan.sizes if size.name in options.policies))

    clock = "CPU time" if options.cpu_time else "Wall time"
    print(
        f"The time of one combination on {plan.sequences} sequences of {plan.tokens} tokens, medians. "
        f"{clock} of {torch.get_num_threads()} CPU thread(s), torch {torch.__version__}.\n"
        f"~ measured on fewer of the {plan.sequences} sequences (see 'measured') and scaled linearly; PAMA never is.\n"
        "full MGDA: N backward passes over all parameters + N x N Gram matrix + TorchJD's min-norm solve.\n"
    )
    print(HEAD, UNITS, sep="\n", flush=True)
    rows: list[Row] = []
    started, cpu_started = time.perf_counter(), time.process_time()
    for size in plan.sizes:
        of_policy = measure(size, plan)
        rows += of_policy
        print(*map(table_line, of_policy), sep="\n", flush=True)
    busy = (time.process_time() - cpu_started) / (time.perf_counter() - started) / torch.get_num_threads()
    summary = summarise(rows)
    print("", *summary_lines(summary), sep="\n")
    print(f"This process had {busy:.0%} of the cores that its threads could use.")
    if busy < 0.5 and not options.cpu_time:
        print("Other programs took the rest, so these seconds say little: run again on an idle machine, or --cpu-time.")
    if options.json is not None:
        described: dict[str, Any] = {"sizes": [asdict(size) for size in plan.sizes], "objectives": plan.objectives}
        described |= {"sequences": plan.sequences, "tokens": plan.tokens}
        settings = {"plan": described, "clock": clock, "threads": torch.get_num_threads(), "torch": torch.__version__}
        settings["share_of_cores"] = busy
        content = {"settings": settings, "rows": [asdict(r) | r.ratios for r in rows], "summary": summary}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
