"""How multipliers follow the constraints they stand for. One file each."""

from moa_lightning.combiners.duals.base import DualUpdate
from moa_lightning.combiners.duals.exponential import Exponential
from moa_lightning.combiners.duals.log_barrier import LogBarrier
from moa_lightning.combiners.duals.log_pid import LogPID
from moa_lightning.combiners.duals.optimistic import Optimistic
from moa_lightning.combiners.duals.pid import PID
from moa_lightning.combiners.duals.projected import Projected

__all__ = ["PID", "DualUpdate", "Exponential", "LogBarrier", "LogPID", "Optimistic", "Projected"]
