"""A module that plays given rewards to the callbacks, under a real Trainer: every number is known beforehand.

Legend: B responses, T response tokens, N objectives.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from moa_lightning.rewards.base import transform_in_words
from moa_lightning.types import Evaluation, Experience, Minibatch, Responses, RewardTable, Statistics, StepOutput
from moa_lightning.utils.moments import Moments

NAMES = ("good", "short")
LENGTH = 3  # tokens of every response, unless a test gives a mask


def responses(mask_BT: Tensor, word: str = "fine") -> Responses:
    rows, length = mask_BT.shape
    return Responses(
        input_ids_BL=torch.ones(rows, length + 1, dtype=torch.long),
        attention_mask_BL=torch.ones(rows, length + 1, dtype=torch.long),
        mask_BT=mask_BT,
        truncated_B=mask_BT.all(1),
        prompts=[f"prompt {i}" for i in range(rows)],
        completions=[f"{word} été {i}" for i in range(rows)],
        columns={"source": list(range(rows))},
    )


def rewards(
    raw_BN: Tensor, names: Sequence[str], unwatched: Sequence[str] = (), scales: Sequence[float] = ()
) -> RewardTable:
    """Raw scores, and the values that objectives with these scales make of them; without scales they are the same."""
    scales = scales or [1.0] * len(names)
    transforms = tuple(transform_in_words(scale, 0.0, None) for scale in scales)
    trained = tuple(n not in unwatched for n in names)
    return RewardTable(tuple(names), trained, raw_BN, torch.tensor(scales) * raw_BN, transforms)


def evaluation(
    raw_BN: Tensor, names: Sequence[str] = NAMES, unwatched: Sequence[str] = (), scales: Sequence[float] = ()
) -> Evaluation:
    mask_BT = torch.ones(len(raw_BN), LENGTH, dtype=torch.bool)
    mask_BT[0, 1:] = False
    return Evaluation(responses(mask_BT), rewards(raw_BN, names, unwatched, scales), torch.zeros(len(raw_BN)))


def around(*means: float) -> Tensor:
    """Four responses whose mean, objective by objective, is exactly this; their standard deviation is 1/sqrt(3)."""
    return torch.tensor(means) + torch.tensor([[0.5], [-0.5], [0.5], [-0.5]])


def experience(
    raw_BN: Tensor,
    names: Sequence[str] = NAMES,
    mask_BT: Tensor | None = None,
    advantages_BTN: Tensor | None = None,
    seconds: dict[str, float] | None = None,
    unwatched: Sequence[str] = (),
    scales: Sequence[float] = (),
) -> Experience:
    mask_BT = torch.ones(len(raw_BN), LENGTH, dtype=torch.bool) if mask_BT is None else mask_BT
    table = rewards(raw_BN, names, unwatched, scales)
    nothing_BT = torch.zeros(mask_BT.shape)
    return Experience(
        responses=responses(mask_BT),
        rewards=table,
        valid_BN=table.valid_BN,
        mask_BT=mask_BT,
        behaviour_logprobs_BT=nothing_BT,
        reference_logprobs_BT=nothing_BT,
        advantages_BTN=torch.zeros(*mask_BT.shape, len(table.trained_names))
        if advantages_BTN is None
        else advantages_BTN,
        returns_BTN=None,
        values_BTN=None,
        tokens_per_row=float(LENGTH),
        seconds=seconds or {},
        tokens=float(mask_BT.sum()),
        kl=0.25,
        kl_coefficient=0.2,
    )


class Items:
    """A loader; Lightning would take a list for several of them."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


class Equal:
    """Stands for a combiner; its name goes into the summary, and what it reports into the metrics."""

    def report(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state


class Scripted(LightningModule):
    """Evaluations and collected batches in the given order; each collected batch is used for ``updates`` updates."""

    def __init__(
        self,
        evaluations: Sequence[Evaluation] = (),
        collected: Sequence[Experience] = (),
        updates: int = 1,
        weights: Sequence[float] = (0.5, 0.5),
        score_BT: Tensor | None = None,
        terms: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.combiner, self.combiner_state, self.seed = Equal(), {}, None
        self.evaluations, self.collected, self.updates = list(evaluations), list(collected), updates
        self.weights, self.score_BT, self.terms = list(weights), score_BT, terms or {}
        table = (*self.evaluations, *self.collected)[0].rewards
        self.objective_names = table.trained_names
        self._shown = -1
        self.evaluation = Moments(2 * len(table.names))

    @property
    def policy(self) -> Any:
        return self

    def save_pretrained(self, folder: Path, record: object = None) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    def train_dataloader(self) -> Items:
        collected = self.collected or [experience(torch.zeros(4, len(self.objective_names)), self.objective_names)]
        return Items([Minibatch(e, e if update == 0 else None) for e in collected for update in range(self.updates)])

    def val_dataloader(self) -> Items:
        return Items([0, 1])

    def on_validation_epoch_start(self) -> None:
        self._shown += 1
        self.evaluation.reset()

    def evaluation_statistics(self) -> dict[str, Statistics]:
        return Statistics.by_name(self.evaluations[self._shown].rewards, self.evaluation.compute())

    def validation_step(self, batch: int, batch_idx: int) -> Evaluation:
        """One half of the evaluation; the halves differ in size."""
        whole = self.evaluations[self._shown]
        rows = range(len(whole.kl_B))
        picked = torch.tensor(rows[:1] if batch_idx == 0 else rows[1:])
        responses_, table = whole.responses, whole.rewards
        part = Responses(
            responses_.input_ids_BL[picked],
            responses_.attention_mask_BL[picked],
            responses_.mask_BT[picked],
            responses_.truncated_B[picked],
            [responses_.prompts[i] for i in picked],
            [responses_.completions[i] for i in picked],
            {name: [column[i] for i in picked] for name, column in responses_.columns.items()},
        )
        half = replace(table, raw_BN=table.raw_BN[picked], value_BN=table.value_BN[picked])
        self.evaluation.update(torch.cat([half.value_BN, half.raw_BN], dim=1))
        return Evaluation(part, half, whole.kl_B[picked])

    def training_step(self, batch: Minibatch, batch_idx: int) -> dict[str, Any]:
        mask_BT = batch.experience.mask_BT
        step = StepOutput(
            names=self.objective_names,
            weights_N=torch.tensor(self.weights),
            score_BT=torch.zeros(mask_BT.shape) if self.score_BT is None else self.score_BT,
            terms={name: torch.tensor(value) for name, value in self.terms.items()},
            minibatch=batch,
            seconds=0.0,
        )
        return {"loss": (self.weight - 1).square(), "step": step}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """Evaluates before the run and after each step."""
    settings: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "max_steps": 3,
        "num_sanity_val_steps": -1,
        "check_val_every_n_epoch": None,
        "val_check_interval": 1,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **{**settings, **options})
