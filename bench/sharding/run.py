"""Memory of a policy in training on 1, 2, 8 and 64 processes (FSDP2): measured without a GPU, against a closed form.

    python -m bench.sharding [--shapes gpt2-xl llama-7b] [--processes 1 2 8 64 8x8] [--output DIR] [--real]

How to read the tables. One table is one policy under full fine-tuning (with a frozen copy as the reference) or LoRA
(rank 16, the policy without it is the reference), computing in bfloat16 on float32 weights, with AdamW, two value
heads, a reward model of the policy's shape, and 4 sequences of 512 tokens on each process, 384 of them trained. Every
column is a number of processes (``8 x 8``: HSDP, 8 copies in 8 pieces each), every number is GiB on one process,
measured by ``bench.sharding.measured``: real modules, sharding and steps on tensors without data. ``=`` says that
the closed form of ``bench.sharding.closed_form`` has the same number of bytes; else the ratio measured / closed stands
there.

* ``gathered to train``: parameters that are whole for a while: the embeddings from the forward to the end of the
  backward pass, one block at a time, and the one that comes next.
* ``gathered to sample``: the whole policy, with ``generation: gathered``.
* ``peak of a step``: forward and backward pass, with all that this process holds of the policy and its gradients;
  without optimiser state, reference and rewards. It has no closed form.
* The last table has what does not depend on the number of processes: what the forward pass keeps for the backward pass,
  beside Korthikanti's count for one block (see ``bench.sharding.closed_form``), logits, and the cache of sampling.

What this cannot see: the allocator's fragmentation, NCCL's buffers, CUDA's context and kernels' workspaces, and how far
CUDA's streams run ahead. ``--real`` trains a small policy on two real processes and compares: fake tensors must
count what real ones do. A run takes some minutes on two cores;
``--shapes`` and ``--processes`` leave some out.
"""

import argparse
import csv
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GPT2Config, LlamaConfig, PretrainedConfig
from transformers.utils import logging

from bench.sharding.closed_form import GPT2, Decoder, Llama, Work, closed_form
from bench.sharding.measured import Layout, activations, fake_processes, measure
from bench.sharding.real import on_two_processes

GIB = 2**30
ENDS = {"bos_token_id": 0, "eos_token_id": 0}


@dataclass(frozen=True)
class Model:
    """A shape, as transformers and as the closed form have it."""

    config: PretrainedConfig
    shape: Decoder


def gpt2(layers: int, hidden: int, heads: int, vocabulary: int = 50257, positions: int = 1024) -> Model:
    """GPT-2's architecture."""
    sizes: dict[str, Any] = {"n_layer": layers, "n_embd": hidden, "n_head": heads, "n_positions": positions}
    config = GPT2Config(**sizes, vocab_size=vocabulary, **ENDS)
    return Model(config, GPT2(layers, hidden, heads, vocabulary, positions))


def llama(layers: int, hidden: int, heads: int, inner: int, groups: int, vocabulary: int = 32000) -> Model:
    """Llama's architecture."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=inner,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        **ENDS,
    )
    return Model(config, Llama(layers, hidden, heads, vocabulary, inner, groups))


MODELS = {"gpt2-xl": gpt2(48, 1600, 25), "llama-7b": llama(32, 4096, 32, 11008, 32)}
TUNING = {"full": Work(), "LoRA": Work(lora=True)}
SMALL = gpt2(2, 32, 2, vocabulary=101, positions=16)
SMALL_WORK = Work(sequences=2, length=16, trained=8)


@dataclass(frozen=True)
class Row:
    """One quantity."""

    shape: str
    tuning: str
    computation: str
    processes: str
    part: str
    measured: int
    closed: int | None

    @property
    def agreement(self) -> str:
        """``=`` to the byte, else the ratio."""
        if self.closed is None:
            return ""
        return "=" if self.closed == self.measured else f"{self.measured / max(self.closed, 1):.3f}"


def layout(text: str) -> Layout:
    """``8`` processes, or ``8x8``: so many copies in so many pieces."""
    copies, _, shards = text.rpartition("x")
    return Layout(int(copies or 1) * int(shards), int(copies or 1))


def sharded(name: str, tuning: str, where: Layout) -> list[Row]:
    """What depends on the number of processes."""
    _quiet()
    model, work = MODELS[name], TUNING[tuning]
    with fake_processes(where.processes):
        found = measure(model.config, work, where)
    closed = closed_form(model.shape, work, where.shards)
    del found["activations"]
    parts = [part for part in (*closed, "peak of a step") if part in found]
    return [Row(name, tuning, "bfloat16", where.name, part, found[part], closed.get(part)) for part in parts]


def kept(name: str, tuning: str) -> list[Row]:
    """What does not."""
    _quiet()
    model, rows = MODELS[name], []
    for element, computation in ((4, "float32"), (2, "bfloat16")):
        for checkpointed in (False, True):
            work = replace(TUNING[tuning], element=element, checkpointed=checkpointed)
            found, closed = activations(model.config, work), closed_form(model.shape, work, 1)
            how = f"{computation}, blocks again" if checkpointed else computation
            rows += [Row(name, tuning, how, "any", part, found[part], closed[part]) for part in found]
    return rows


def _quiet() -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)


def table(rows: Sequence[Row], across: str) -> list[str]:
    """Lines: a row for each part, a column for each value of a field."""
    columns, parts = list(dict.fromkeys(getattr(r, across) for r in rows)), list(dict.fromkeys(r.part for r in rows))
    cells = {(row.part, getattr(row, across)): row for row in rows}
    width = max(18, *(len(column) + 3 for column in columns))
    lines = [f"{'GiB on each process':20}" + "".join(f"{column:>{width}}" for column in columns)]
    for part in parts:
        found = [cells[part, column] for column in columns]
        numbers = [f"{row.measured / GIB:.4g} {row.agreement:5}" for row in found]
        lines.append(f"{part:20}" + "".join(f"{number:>{width}}" for number in numbers))
    return lines


def report(rows: Sequence[Row]) -> list[str]:
    """All tables."""
    lines: list[str] = []
    for name in dict.fromkeys(row.shape for row in rows):
        for tuning in dict.fromkeys(row.tuning for row in rows):
            mine = [row for row in rows if (row.shape, row.tuning) == (name, tuning)]
            lines += ["", f"{name}, {tuning}: bfloat16 on float32 weights, by processes", ""]
            lines += table([row for row in mine if row.processes != "any"], "processes")
            lines += ["", f"{name}, {tuning}: on any number of processes", ""]
            lines += table([row for row in mine if row.processes == "any"], "computation")
    return lines


def save(rows: Sequence[Row], lines: Sequence[str], folder: Path) -> None:
    """``sharding.csv`` and ``sharding.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "sharding.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["shape", "tuning", "computation", "processes", "part", "measured_bytes", "closed_form_bytes"])
        for row in rows:
            fixed = (row.shape, row.tuning, row.computation, row.processes, row.part)
            writer.writerow([*fixed, row.measured, "" if row.closed is None else row.closed])
    (folder / "sharding.md").write_text("```text\n" + "\n".join(lines).strip() + "\n```\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.sharding", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--processes", nargs="+", default=["1", "2", "8", "64", "8x8"])
    parser.add_argument("--workers", type=int, default=2, help="measurements at once")
    parser.add_argument("--output", type=Path, help="folder for sharding.csv and sharding.md")
    parser.add_argument("--real", action="store_true", help="two real processes against fake tensors, and no table")
    options = parser.parse_args(arguments)
    if options.real:
        compare_with_real()
        return
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(kept, name, tuning) for name in options.shapes for tuning in TUNING]
        waiting += [
            pool.submit(sharded, name, tuning, where)
            for name in options.shapes
            for tuning in TUNING
            for where in map(layout, options.processes)
        ]
        for done in tqdm(as_completed(waiting), "measuring", len(waiting), leave=False):
            done.result()  # an error shows at once
        rows = [row for future in waiting for row in future.result()]
    lines = report(rows)
    print("\n".join(lines))
    if options.output:
        save(rows, lines, options.output)


def compare_with_real() -> None:
    """One small policy, trained on two real processes and on fake ones."""
    _quiet()
    for tuning, task in TUNING.items():
        work = replace(SMALL_WORK, lora=task.lora)
        real = on_two_processes(SMALL.config, work)
        with fake_processes(2):
            fake = measure(SMALL.config, work, Layout(2))
        print(f"\n{tuning}, bytes on the first of two processes\n\n{'':20}{'real':>12}{'fake':>12}")
        for part in real:
            print(f"{part:20}{real[part]:>12,}{fake[part]:>12,}  {'=' if real[part] == fake[part] else ''}")
