"""Stopping at a loss that is not finite, with the state before it kept.

Legend: T tokens, N trained objectives.
"""

from pathlib import Path

import torch
from lightning.pytorch import Trainer

from moa_lightning.distributed import any_rank
from moa_lightning.losses import LossTerms
from moa_lightning.types import Experience


class NonFiniteLossError(ValueError):
    """The loss is NaN or infinite; a checkpoint from before the update was written."""


def require_finite(result: LossTerms, experience: Experience, trainer: Trainer) -> None:
    """Nothing if the loss is finite on every process; else write ``non_finite.ckpt`` and stop.

    Raises:
        NonFiniteLossError: one line with the objective and the term that broke.
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
    path = Path(trainer.default_root_dir) / "non_finite.ckpt"
    trainer.save_checkpoint(path)
    source = f"objective {' and '.join(blamed)}" if blamed else "no single objective"
    raise NonFiniteLossError(
        f"the loss is not finite at step {trainer.global_step}: {source} ({', '.join(bad_terms) or 'total'}). The "
        f"state before this update is in {path}; lower the learning rate, or clip that objective's reward"
    )
