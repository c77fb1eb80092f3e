"""A task so small that a whole run takes about a second: the reward functions, the files, and a way to call ``moa``."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from moa_lightning.cli import main
from moa_lightning.signals import Signal
from moa_lightning.sources import Rollout
from tests.helpers import tiny

PROMPTS = ["the film was", "the plot was very", "good film and", "bad plot and the", "dull"]


def goodness(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
    """Good words minus bad ones."""
    good, bad = {"good", "fine"}, {"bad", "dull"}
    return [float(sum((w in good) - (w in bad) for w in text.split())) for text in completions]


def shortness(prompts: list[str], completions: list[str], wish: list[int]) -> list[float]:
    """How near the number of words is to the wished one."""
    return [-abs(len(text.split()) - words) / 4 for text, words in zip(completions, wish, strict=True)]


def one_too_few(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
    """Forgets the last completion."""
    return [0.0 for _ in completions[1:]]


@dataclass
class TooLate:
    """A reward that is fine at first and then far too large for the value loss. It counts its calls."""

    calls: int = 0

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        """Fine for the evaluation, the first update, and the evaluation after it."""
        self.calls += 1
        return [1e30 if self.calls > 3 else float(len(text)) for text in completions]


too_late = TooLate()


class Silent(Rollout):
    """A source without advantages."""

    provides = frozenset({Signal.SCORES, Signal.RATIO, Signal.GRAMIAN})


@dataclass(frozen=True)
class Task:
    """A folder with a policy, prompts and a config, ready for ``moa fit``."""

    folder: Path

    @property
    def policy(self) -> Path:
        return self.folder / "tiny"

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.jsonl"

    @property
    def config(self) -> Path:
        return self.folder / "task.yaml"

    @property
    def root(self) -> Path:
        """Where the config says that the run goes."""
        return self.folder / "runs" / "run"

    def settings(self) -> dict[str, Any]:
        """What the config says, to change and write elsewhere."""
        loaded: dict[str, Any] = yaml.safe_load(self.config.read_text())
        return loaded


def make(folder: Path) -> Task:
    """Write the task."""
    task = Task(folder)
    tiny.policy_folder(task.policy)
    write_prompts(task.prompts, [{"prompt": PROMPTS[i % 5], "wish": 2 + i % 4, "row": i} for i in range(12)])
    task.config.write_text(yaml.safe_dump(_settings(task), sort_keys=False))
    return task


def write_prompts(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _settings(task: Task) -> dict[str, Any]:
    def function(name: str) -> dict[str, Any]:
        return {"reward": {"class_path": "FunctionReward", "init_args": {"function": f"{__name__}.{name}"}}}

    return {
        "seed_everything": 7,
        "trainer": {
            "default_root_dir": str(task.root),
            "max_steps": 2,
            "val_check_interval": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
        },
        "data": {
            "class_path": "Prompts",
            "init_args": {"path": str(task.prompts), "val_size": 4, "batch_size": 4},
        },
        "model": {
            "policy": {"path": str(task.policy)},
            "objectives": {"good": function("goodness"), "short": function("shortness")},
            "source": {"class_path": "Rollout", "init_args": {"max_new_tokens": 6}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
    }


def moa(*arguments: object) -> None:
    """Run ``moa`` in this process."""
    main([str(argument) for argument in arguments])


def changed(task: Task, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the task's config with a change in it."""
    settings = task.settings()
    change(settings)
    path = task.folder / "changed.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What ``moa`` says when it refuses: one line behind ``moa: error:``, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        moa(*arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.endswith("\n"), error
    lines = error.splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith("moa: error: "), error
    return lines[0].removeprefix("moa: error: ")
