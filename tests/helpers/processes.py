"""Runs of a few steps in one process or in two, on the same global batches, for tests that compare them."""

import atexit
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.multiprocessing as mp
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy

from moa_lightning.combiners import MOPO, Linear
from moa_lightning.data import PromptData
from moa_lightning.distributed import all_objects, all_sum, end_process_group, rank, world_size
from moa_lightning.distributed.shards import full_state_dict
from moa_lightning.losses import ClippedSurrogate, LossKL, WeightedLikelihood
from moa_lightning.models import LaggedCopy, LoRA, Policy, PolicyConfig
from moa_lightning.module import AlignmentModule
from moa_lightning.rewards import FunctionReward, Length, Objective, TextClassifier
from moa_lightning.sources import Rollout
from moa_lightning.training.checkpoints import AtomicCheckpointIO
from moa_lightning.training.strategies import FSDP2Strategy
from tests.helpers import pairs

PATIENCE = 120  # seconds after which processes that wait for each other fail, instead of hanging
STRATEGIES = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=PATIENCE)),
    **{
        name: lambda settings=settings: FSDP2Strategy(
            process_group_backend="gloo", timeout_seconds=PATIENCE, **settings
        )
        for name, settings in {
            "fsdp2": {},
            "fsdp2-layerwise": {"generation": "layerwise"},
            "fsdp2-pieces": {"save_distributed_checkpoint": True},
            "hsdp": {"replicas": 2},
            "bfloat16": {"param_dtype": "bfloat16"},
        }.items()
    },
}


class Losses(Callback):
    """The mean over the processes of each step's loss, and the rows that batches were collected on."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rows: list[list[int]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(all_sum(outputs["loss"].detach().double())) / world_size())
        if batch.collected is not None:
            rows = all_objects(batch.collected.responses.columns.get("row", []))
            self.rows.append(sorted({row for of_process in rows for row in of_process}))


class Films(PromptData):
    def rows(self, stage: Any) -> list[dict[str, Any]]:
        return [{"prompt": text, "row": row} for row, text in enumerate(pairs.PROMPTS[:4] * 3)]


def goodness(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """No opinion on what has neither kind of word."""
    counts = [sum((w in {"good", "fine"}) - (w in {"bad", "dull"}) for w in text.split()) for text in completions]
    return [float(c) if c else None for c in counts]


ORDER = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()  # of the films in the first epoch


def good_of_first(prompts: list[str], completions: list[str], row: list[int], **columns: Any) -> list[float | None]:
    """No opinion on what the second of two processes collects."""
    return [None if ORDER.index(r) % 2 else float("good" in text) for r, text in zip(row, completions, strict=True)]


def short_of_first(prompts: list[str], completions: list[str], row: list[int], **columns: Any) -> list[float | None]:
    """Nor has this one."""
    return [None if ORDER.index(r) % 2 else -len(text) / 40 for r, text in zip(row, completions, strict=True)]


def scripted(policy: Policy, input_ids_BP: torch.Tensor, attention_mask_BP: torch.Tensor, config: Any) -> torch.Tensor:
    """Responses that depend on the prompt and on how many of its kind came before in the batch, not on the process."""
    rows, seen = [], {}
    for ids, mask in zip(input_ids_BP.tolist(), attention_mask_BP.tolist(), strict=True):
        key = tuple(i for i, m in zip(ids, mask, strict=True) if m)
        seen[key] = seen.get(key, 0) + 1
        generator = torch.Generator().manual_seed(sum(key) * 101 + seen[key] % 4)
        length = int(torch.randint(1, config.max_new_tokens, (1,), generator=generator))
        words = torch.randint(3, 14, (length,), generator=generator).tolist()
        rows.append([*ids, *words, 1, *[0] * (config.max_new_tokens - length - 1)])
    return torch.tensor(rows)


def module(case: dict[str, Any], folder: Path) -> AlignmentModule:
    policy = PolicyConfig(
        str(folder / "policy"),
        gradient_checkpointing=case.get("checkpointing", False),
        lora=LoRA(r=case.get("r", 2), lora_dropout=case.get("dropout", 0.0)) if case.get("lora") else None,
    )
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)  # noqa: E731
    combiner = case.get("combiner", Linear)()
    offline = {"objectives": pairs.objectives(), "source": pairs.PreferenceRows(max_response_length=8)}
    online = {
        "objectives": {
            "good": Objective(FunctionReward(goodness)),
            "short": Objective(Length(divisor=8.0), scale=-1.0),
        },
        "source": Rollout(
            max_new_tokens=6,
            num_generations=4,
            num_iterations=case.get("passes", 1),
            num_mini_batches=case.get("minibatches", 1),
        ),
    }
    if case.get("silent"):
        online["objectives"] = {
            "good": Objective(FunctionReward(good_of_first)),
            "short": Objective(FunctionReward(short_of_first)),
        }
    if case.get("judge"):
        online["objectives"]["liked"] = Objective(TextClassifier(str(folder / "judge"), batch_size=3))
    pieces = offline if case.get("offline") else online
    likelihood = isinstance(combiner, MOPO)
    return AlignmentModule(
        policy=policy,
        combiner=combiner,
        loss=WeightedLikelihood() if likelihood else ClippedSurrogate(**case.get("surrogate", {})),
        kl=LossKL(0.05) if likelihood or case.get("offline") else None,
        reference=LaggedCopy(2) if case.get("lagged") else None,
        optimizer=optimizer,
        **pieces,
    )


def run(strategy: str, case: dict[str, Any], folder: Path, **options: Any) -> dict[str, Any]:
    """Losses, final weights and the combiner's state; ``one`` is a single process with the batches of both."""
    seed_everything(0, verbose=False)
    alone, losses = strategy == "one", Losses()
    moa = module(case, folder)
    size = 4 if alone else 2
    data = pairs.data(folder / "data.jsonl", batch_size=size) if case.get("offline") else Films(batch_size=size)
    trainer = Trainer(
        default_root_dir=folder / "run",
        accelerator="cpu",
        devices=1 if alone else 2,
        strategy="auto" if alone else STRATEGIES[strategy](),
        max_steps=case.get("steps", 3),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[losses],
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        limit_val_batches=0,
        gradient_clip_val=1.0,
    )
    with patch.object(Policy, "generate", scripted if case.get("scripted", True) else Policy.generate):
        trainer.fit(moa, datamodule=data, **options)
    if path := case.get("save"):
        with files_of_at_most(case.get("limit", {}).get(rank())):
            trainer.save_checkpoint(folder / f"{strategy}-{path}")
    if case.get("export"):
        moa.policy.save_pretrained(folder / f"exported-{strategy}")
    return {
        "losses": losses.losses,
        "logged": float(trainer.callback_metrics["loss"]),
        "rows": losses.rows,
        "weights": full_state_dict(moa.policy),
        "state": moa.combiner_state,
    }


@contextmanager
def files_of_at_most(size: int | None) -> Iterator[None]:
    """Within it the system writes no more of a file, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


Cell = tuple[str, str, dict[str, Any]]
"""A strategy, a name, and what to run under it."""
Job = Callable[..., dict[str, Any]]
"""What runs a case under a strategy, in a folder; :func:`run`, or one that has its arguments."""


def free_port() -> int:
    """One that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def join(number: int, port: int) -> None:
    """What a launcher would tell this process of the two of them."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
        "HF_HUB_OFFLINE": "1",
    }
    torch.set_num_threads(1)


def require_no_threads_of_the_group() -> None:
    """Fail the process that still has one: it may abort while Python shuts down."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    if left := [name for name in names if "gloo" in name]:
        print(f"threads of the process group are left at the end: {left}", file=sys.stderr, flush=True)
        os._exit(70)


def one_of_two(number: int, port: int, cells: Sequence[Cell], folder: Path, job: Job) -> None:
    """This process runs all cells after one another, with its peer."""
    join(number, port)
    atexit.unregister(end_process_group)
    atexit.register(require_no_threads_of_the_group)  # runs after the one that is registered next
    atexit.register(end_process_group)
    for strategy, name, case in cells:
        options = {}
        if "resume" in case:
            writer = case.get("written_by", strategy)
            options = {"ckpt_path": folder / f"{writer}-{case['resume']}", "weights_only": True}
        try:
            result = job(strategy, case, folder, **options)
        except ValueError as error:
            if not case.get("refused"):
                raise
            result = {"refused": str(error)}
        if rank() == 0:
            torch.save(result, folder / f"{strategy}-{name}.pt")


def both(cells: Sequence[Cell], folder: Path, job: Job = run) -> dict[tuple[str, str], dict[str, Any]]:
    """What each cell came to, by strategy and name."""
    mp.spawn(one_of_two, args=(free_port(), cells, folder, job), nprocs=2)
    return {(strategy, name): torch.load(folder / f"{strategy}-{name}.pt") for strategy, name, _ in cells}
