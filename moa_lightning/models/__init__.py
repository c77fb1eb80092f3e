"""The policy, its value heads and its reference."""

from moa_lightning.models.config import LoRA, PolicyConfig
from moa_lightning.models.encoding import Encoder
from moa_lightning.models.multi_reference import MultiReference
from moa_lightning.models.policy import Policy, PolicyOutput
from moa_lightning.models.reference import AdapterOff, FrozenCopy, LaggedCopy, Reference
from moa_lightning.models.value_heads import ValueHeads

__all__ = [
    "AdapterOff",
    "Encoder",
    "FrozenCopy",
    "LaggedCopy",
    "LoRA",
    "MultiReference",
    "Policy",
    "PolicyConfig",
    "PolicyOutput",
    "Reference",
    "ValueHeads",
]
