"""Call ``moa`` with wrong input of every kind: is each mistake one clear line, and is nothing right refused?

    python -m bench.fuzz [--seed 0] [--processes 1] [--kind rewards] [--only TEXT] [--seconds 60]

Over three hundred cases over YAML, flags, prompts, preferences, rewards, policy folders and resumed runs, random damage
among them, run in a few processes that import once. The table counts, by kind of input:

* **clear**: exit code 2 with one line ``moa: error: …`` and, where that is possible, no run folder left; of a reward
  that raises, its own traceback behind the line;
* **traceback**: anything else that ended the call, or took longer than ``--seconds``;
* **accepted wrongly**, **refused wrongly**.

Failures are listed with what was said. The exit code is 1 if there are any.
"""

import argparse
import contextlib
import io
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn

import yaml

from bench.fuzz.cases import Case, all_cases, preference_row

KINDS = ("flags", "YAML", "prompts", "preferences", "rewards", "policies", "resumed")
FAILURES = ("traceback", "accepted wrongly", "refused wrongly")
WORDS = ["the", "film", "was", "good", "bad", "long", "short", "and", "very", "dull", "fine", "plot", "."]


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    case: int
    kind: str
    name: str
    result: str
    said: str


def rollouts(folder: Path) -> dict[str, Any]:
    """Settings of a run on prompts that works."""
    reward = {"class_path": "FunctionReward"}
    functions = {"good": "bench.fuzz.rewards.goodness", "short": "bench.fuzz.rewards.shortness"}
    return {
        "seed_everything": 7,
        "trainer": {
            "default_root_dir": "{folder}/run",
            "max_steps": 1,
            "val_check_interval": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
        },
        "data": {
            "class_path": "Prompts",
            "init_args": {"path": f"{folder}/prompts.jsonl", "val_size": 4, "batch_size": 4},
        },
        "model": {
            "policy": {"path": f"{folder}/policy"},
            "objectives": {name: {"reward": {**reward, "init_args": {"function": f}}} for name, f in functions.items()},
            "source": {"class_path": "Rollout", "init_args": {"max_new_tokens": 6}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
        },
    }


def preferences(folder: Path) -> dict[str, Any]:
    """Settings of a run on preference rows that works."""
    good = rollouts(folder)
    labels = {name: {"reward": {"class_path": "FromLabels", "init_args": {"label": name}}} for name in ("good", "kind")}
    dual = {"class_path": "Projected", "init_args": {"lr": 1.0}}
    combiner = {
        "class_path": "MOPO",
        "init_args": {"primary": "good", "thresholds": {"kind": 0.6}, "dual": dual},
    }
    return {
        **good,
        "data": {
            "class_path": "Preferences",
            "init_args": {"path": f"{folder}/preferences.jsonl", "val_size": 4, "batch_size": 4},
        },
        "model": {
            "policy": good["model"]["policy"],
            "objectives": labels,
            "combiner": combiner,
            "loss": {"class_path": "WeightedLikelihood", "init_args": {"max_weight": 4.0}},
            "source": {"class_path": "PreferenceRows", "init_args": {"max_response_length": 8}},
            "reference": {"class_path": "LaggedCopy", "init_args": {"interval": 2}},
            "optimizer": good["model"]["optimizer"],
        },
    }


def make(folder: Path) -> None:
    """Write a policy, prompts and preference rows, and the checkpoint of a run on the prompts."""
    import json

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=len(words), **ends)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    rows = [{"prompt": "the film was", "wish": 3}] * 12
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "preferences.jsonl").write_text("".join(json.dumps(preference_row(i)) + "\n" for i in range(16)))
    result, said = call(Case("resumed", "the run that is resumed", "accept"), folder / "first", folder)
    if result != "accepted":
        raise SystemExit(f"the run that all cases change does not work: {said}")


def call(case: Case, folder: Path, shared: Path, seconds: int = 600) -> tuple[str, str]:
    """Run a case in a folder of its own: how it ended (accepted, clear, traceback), and what was said."""
    from moa_lightning.cli import main

    folder.mkdir(parents=True)
    (folder / "a-file").write_text("hello\n")
    case.prepare(folder)
    settings = preferences(shared) if case.preferences else rollouts(shared)
    content = case.config if case.config is not None else yaml.safe_dump(settings, sort_keys=False)
    content = content.encode() if isinstance(content, str) else content
    (folder / "run.yaml").write_bytes(content.replace(b"{folder}", str(folder).encode()))
    arguments = [case.command, f"--config={folder}/run.yaml"]
    if case.resumed:
        arguments += [f"--ckpt_path={folder}/run/checkpoints/last.ckpt"]
        shutil.copytree(shared / "first" / "run", folder / "run")
    arguments += [flag.replace("{folder}", str(folder)) for flag in case.flags]
    error, output, code = io.StringIO(), io.StringIO(), "none"
    before = sys.path.copy(), dict(os.environ)
    try:
        with _in(folder), contextlib.redirect_stderr(error), contextlib.redirect_stdout(output), _within(seconds):
            warnings.simplefilter("ignore")
            main(arguments)
    except SystemExit as stop:
        code = str(stop.code)
    except BaseException as raised:  # noqa: BLE001 - whatever it is, it is the outcome
        code = type(raised).__name__
        error.write("".join(traceback.format_exception(raised)[-3:]))
    finally:
        sys.path[:] = before[0]
        os.environ.clear()
        os.environ.update(before[1])
        sys.modules.pop("own_rewards", None)
    lines = [line for line in error.getvalue().splitlines() if line.startswith("moa: error: ")]
    said = lines[0] if lines else " ".join(error.getvalue().split())[-300:]
    if code in {"none", "0"}:
        return "accepted", said
    own = case.kind == "rewards" and "objective 'good'" in said
    if code == "2" and len(lines) == 1 and (own or "Traceback" not in error.getvalue()):
        left = folder / "run"
        return ("clear", said) if case.late or case.resumed or not left.exists() else ("left a folder", said)
    return "traceback", f"[{code}] {said}"


def judged(number: int, seed: int, shared: Path, seconds: int) -> Outcome:
    """Run one case and compare what became of it with what should."""
    case = all_cases(rollouts(shared), preferences(shared), seed)[number]
    folder = shared / f"case-{number}"
    try:
        result, said = call(case, folder, shared, seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if result == "accepted" and case.expected == "refuse":
        result = "accepted wrongly"
    elif result != "accepted" and case.expected == "accept":
        result = "refused wrongly"
    elif result == "left a folder":
        result = "accepted wrongly"
    return Outcome(number, case.kind, case.name, result, said)


@contextlib.contextmanager
def _in(folder: Path) -> Iterator[None]:
    back = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(back)


@contextlib.contextmanager
def _within(seconds: int) -> Iterator[None]:
    def late(*args: Any) -> NoReturn:
        raise TimeoutError(f"it took longer than {seconds} s")

    former = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def _start() -> None:
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true")
    import torch

    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz")
    parser.add_argument("--seed", type=int, default=0, help="of the random damage")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS, help="this kind of input alone")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name holds one of these texts")
    parser.add_argument("--seconds", type=int, default=60, help="that a case may take")
    given = parser.parse_args()
    _start()
    with tempfile.TemporaryDirectory(prefix="moa-fuzz-") as temporary:
        shared = Path(temporary)
        make(shared)
        cases = all_cases(rollouts(shared), preferences(shared), given.seed)
        chosen = [
            i
            for i, case in enumerate(cases)
            if given.kind in (None, case.kind) and any(text in case.name for text in given.only)
        ]
        outcomes = []
        with ProcessPoolExecutor(given.processes, get_context("spawn"), _start) as pool:
            waiting = [pool.submit(judged, i, given.seed, shared, given.seconds) for i in chosen]
            for done, future in enumerate(waiting, start=1):
                outcomes.append(future.result())
                print(f"\r{done}/{len(chosen)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    failed = report(outcomes)
    raise SystemExit(1 if failed else 0)


def report(outcomes: list[Outcome]) -> int:
    """Print the table and the failures; the number of these."""
    headings = ("clear", "accepted", *FAILURES)
    print(f"{'input':<14}{'cases':>7}" + "".join(f"{heading:>18}" for heading in headings))
    for kind in (*KINDS, "all"):
        counts = Counter(o.result for o in outcomes if kind in {"all", o.kind})
        if total := sum(counts.values()):
            print(f"{kind:<14}{total:>7}" + "".join(f"{counts[heading]:>18}" for heading in headings))
    failures = [o for o in outcomes if o.result in FAILURES]
    for outcome in failures:
        print(f"\n{outcome.result}: {outcome.kind}: {outcome.name}\n    {outcome.said}")
    return len(failures)
