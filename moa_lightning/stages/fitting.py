"""Training that the stages share: its settings, module, sampler and loop."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel
from typing_extensions import override

from moa_lightning.errors import UserError


@dataclass(frozen=True)
class Fitting:
    """How to train.

    Args:
        epochs: passes over the texts.
        max_steps: stop after this many updates, if that is earlier; -1 is no limit.
        batch_size: texts per update.
        learning_rate: peak of the schedule (linear warm-up, linear decay to 0).
        warmup: share of the updates in which the learning rate rises.
        weight_decay: of AdamW.
        max_length: truncate texts to this many tokens.
        seed: of the initial weights and the order of the texts.
        accelerator: Lightning's.
        precision: Lightning's.
    """

    epochs: int = 1
    max_steps: int = -1
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    max_length: int = 512
    seed: int = 0
    accelerator: str = "auto"
    precision: str = "32-true"

    def __post_init__(self) -> None:
        """Validate hyperparameters."""
        for name, least in {"epochs": 1, "batch_size": 1, "max_length": 2, "seed": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"fit.{name} must be at least {least}, got {getattr(self, name)}")
        if self.max_steps < 1 and self.max_steps != -1:
            raise UserError(f"fit.max_steps must be at least 1, or -1 for no limit, got {self.max_steps}")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"fit.learning_rate must be a finite number above 0, got {self.learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"fit.weight_decay must be a finite number of at least 0, got {self.weight_decay}")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"fit.warmup must lie in [0, 1], got {self.warmup}")


class FittedModule(LightningModule, ABC):
    """A model trained in place with AdamW, linear warm-up and linear decay.

    Args:
        model: the model to train.
        fit: how to train it.
    """

    def __init__(self, model: PreTrainedModel, fit: Fitting) -> None:
        super().__init__()
        self.model, self.fit = model, fit

    @abstractmethod
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss of a batch, in nats."""

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, with one step of the schedule per update."""
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.fit.learning_rate, weight_decay=self.fit.weight_decay
        )
        updates = max(int(self.trainer.estimated_stepping_batches), 1)
        rising = max(int(self.fit.warmup * updates), 1)

        def share(step: int) -> float:
            return min((step + 1) / rising, max(updates - step, 0) / max(updates - rising, 1))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run(module: FittedModule, loader: "DataLoader[Any]") -> None:
    """Train the module's model on the loader's batches."""
    fit = module.fit
    trainer = Trainer(
        max_epochs=fit.epochs,
        max_steps=fit.max_steps,
        accelerator=fit.accelerator,
        devices=1,
        precision=fit.precision,  # type: ignore[arg-type]  # Lightning checks the text
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module.train()  # a loaded model is in evaluation mode, and Lightning does not change that
    trainer.fit(module, loader)


class SimilarLengths(Sampler[list[int]]):
    """Samples batches of texts of similar length in random order: little padding, and every text once per epoch.

    Args:
        lengths: of the texts.
        batch_size: texts per batch.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        """Batches per epoch."""
        return (len(self.lengths) + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of one epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += 1
        noise = torch.rand(len(self.lengths), generator=generator) * 8  # neighbours change from epoch to epoch
        order = sorted(range(len(self.lengths)), key=lambda i: self.lengths[i] + float(noise[i]))
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        yield from (batches[int(i)] for i in torch.randperm(len(batches), generator=generator))
