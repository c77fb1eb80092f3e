"""Stopping at a non-finite loss, gradient, weight or logit, before it reaches a file.

Legend: T tokens, N trained objectives.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import Optimizer

from moa_lightning.distributed import any_rank
from moa_lightning.distributed.shards import local_shard
from moa_lightning.losses import LossTerms
from moa_lightning.training.checkpoints import newest_valid
from moa_lightning.types import Experience
from moa_lightning.utils.non_finite import NonFiniteError, names_of_non_finite, norm_here, some


class NonFiniteLossError(NonFiniteError):
    """The loss is NaN or infinite; a checkpoint from before the update was written."""


def require_finite(result: LossTerms, experience: Experience, trainer: Trainer) -> None:
    """If the loss is not finite on some process, write ``non_finite.ckpt`` and stop.

    Raises:
        NonFiniteLossError: one line with the objective and the terms that are not finite.
    """
    if not any_rank(not bool(torch.isfinite(result.loss)), result.loss.device):
        return
    blamed = [
        name
        for i, name in enumerate(experience.rewards.trained_names)
        if not bool(torch.isfinite(result.terms.get(f"value_loss/{name}", torch.tensor(0.0))))
        or not bool(torch.isfinite(experience.advantages_BTN[..., i]).all())
    ]
    bad_terms = [name for name, value in result.terms.items() if not bool(torch.isfinite(value))]
    raise NonFiniteLossError(
        f"the loss is not finite at step {trainer.global_step}: {_objectives(blamed)} "
        f"({', '.join(bad_terms) or 'total'}). {_saved_before(trainer)}; lower the learning rate, or clip that "
        f"objective's reward. {way_back(trainer)}"
    )


def require_finite_gradients(module: nn.Module, optimizer: Optimizer, trainer: Trainer) -> None:
    """If the gradient is not finite on some process, write ``non_finite.ckpt`` and stop before the optimiser step.

    Under float16 with a loss scaler (``precision: 16-mixed``) nothing is checked: the scaler skips steps with an
    infinite gradient and lowers its scale.

    Args:
        module: with ``policy.value_heads`` and the names of their objectives.
        optimizer: about to step.
        trainer: of the run.

    Raises:
        NonFiniteError: one line with the parameters, and the objective if only value heads are affected.
    """
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return
    norm = norm_here(gradients)
    if not any_rank(not bool(torch.isfinite(norm)), norm.device):
        return
    named = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    bad = names_of_non_finite(named)
    heads = [name for name in bad if ".value_heads." in f".{name}"]
    blamed: list[str] = []
    if heads == bad:  # then the value loss is the cause, and a head has one row for each objective
        names: tuple[str, ...] = module.objective_names  # type: ignore[assignment]  # of AlignmentModule
        rows = [local_shard(named[name]).detach().float() for name in heads]
        complete = [row.flatten(1).sum(1) if row.ndim > 1 else row for row in rows if len(row) == len(names)]
        blamed = [name for i, name in enumerate(names) if any(not bool(torch.isfinite(row[i])) for row in complete)]
    where = some(bad) if bad else "its norm overflows"
    raise NonFiniteError(
        f"the gradient is not finite at step {trainer.global_step}: {_objectives(blamed)} ({where}). "
        f"{_saved_before(trainer)}; lower the learning rate, or clip that objective's reward. {way_back(trainer)}"
    )


def require_finite_weights(module: nn.Module, trainer: Trainer) -> None:
    """Refuse trained weights that are not finite on some process. Every process calls it.

    Raises:
        NonFiniteError: one line with the weights, the step, and the checkpoint to resume from.
    """
    bad = names_of_non_finite({name: p for name, p in module.named_parameters() if p.requires_grad})
    if any_rank(bool(bad), trainer.strategy.root_device):
        raise NonFiniteError(
            f"the weights are not finite at step {trainer.global_step} ({some(bad) if bad else 'on another process'}): "
            f"nothing of this step is written. Lower the learning rate. {way_back(trainer)}"
        )


@contextmanager
def naming_the_step(trainer: Trainer) -> Iterator[None]:
    """Context manager: a non-finite logit while sampling is raised with the step and the checkpoint to resume from.

    Raises:
        NonFiniteError: one line with both.
    """
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{error} at step {trainer.global_step}; the learning rate is too high, or the policy's weights are "
            f"damaged. {way_back(trainer)}"
        ) from error


def way_back(trainer: Trainer) -> str:
    """One sentence with the newest valid checkpoint of an earlier step: the current policy is the cause."""
    callback: Any = trainer.checkpoint_callback
    folder = Path(getattr(callback, "dirpath", None) or Path(trainer.default_root_dir) / "checkpoints")
    if (newest := newest_valid(folder, before=trainer.global_step)) is not None:
        return f"Resume from the newest finite checkpoint before it with --ckpt_path={newest}"
    return f"There is no checkpoint of an earlier step in {folder}; start a new run"


def _objectives(names: list[str]) -> str:
    return f"objective {' and '.join(names)}" if names else "no single objective"


def _saved_before(trainer: Trainer) -> str:
    """Write the state before the update; returns a sentence with its path. A failure must not hide the cause."""
    path = Path(trainer.default_root_dir) / "non_finite.ckpt"
    try:
        trainer.save_checkpoint(path, weights_only=False)
    except (ValueError, OSError) as error:
        return f"The state before this update was not written ({error})"
    return f"The state before this update is in {path}"
