"""The former place of :class:`moa_lightning.training.strategies.FSDP2Strategy`, which older runs' configs name."""

from moa_lightning.training.strategies import FSDP2Strategy

__all__ = ["FSDP2Strategy"]
