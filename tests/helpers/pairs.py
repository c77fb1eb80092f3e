"""Preference data and a module on them, small enough that a run takes a second or two."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from moa_lightning.data import Preferences
from moa_lightning.models import LoRA, PolicyConfig
from moa_lightning.module import AlignmentModule
from moa_lightning.rewards import FromLabels, FunctionReward, Objective
from moa_lightning.sources import PreferenceRows

PROMPTS = ["the film was", "the plot was very", "good film and", "bad plot and the", "dull"]
RESPONSES = ["good and fine", "very bad", "long", "short and dull plot", "fine"]


def shortness(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [-float(len(text.split())) for text in completions]


def rows(count: int = 16) -> list[dict[str, Any]]:
    """Two to four responses each; ``good`` by a winner or a matrix, ``kind`` against it and not on every row."""
    made = []
    for i in range(count):
        size = 2 + i % 3
        responses = [RESPONSES[(i + j) % 5] for j in range(size)]
        order = [[0.5 if a == b else float(a < b) for b in range(size)] for a in range(size)]
        kind = [[1 - p * 0.8 - 0.1 for p in line] for line in order]
        labels = {"good": {"wins": order} if i % 2 else {"winner": 0}, "kind": None if i % 5 == 4 else {"wins": kind}}
        made.append({"prompt": PROMPTS[i % 5], "responses": responses, "preferences": labels})
    return made


def write(path: Path, given: Sequence[dict[str, Any]] | None = None) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in (rows() if given is None else given)))
    return path


def data(path: Path, **settings: Any) -> Preferences:
    return Preferences(str(path), **{"val_size": 4, "batch_size": 4, **settings})


def objectives() -> dict[str, Objective]:
    return {
        "good": Objective(FromLabels("good")),
        "kind": Objective(FromLabels("kind")),
        "short": Objective(FunctionReward(shortness)),
    }


def module(folder: Path, lora: bool = False, **settings: Any) -> AlignmentModule:
    policy = PolicyConfig(str(folder), lora=LoRA(r=2) if lora else None)
    defaults = {
        "objectives": objectives(),
        "source": PreferenceRows(max_response_length=8),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    }
    return AlignmentModule(policy, **{**defaults, **settings})


def trainer(folder: Path, **settings: Any) -> Trainer:
    seed_everything(0, verbose=False)
    defaults = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "check_val_every_n_epoch": None,
        "val_check_interval": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**defaults, **settings})
