"""Combiners: the ways N objectives become one update. One file each, and a file in this folder is all it takes."""

import importlib
import inspect
import pkgutil

from moa_lightning.combiners.base import Combined, Combiner
from moa_lightning.combiners.caid import CAID
from moa_lightning.combiners.ctwa import CTWA
from moa_lightning.combiners.duals import PID, DualUpdate, Exponential, LogBarrier, LogPID, Optimistic, Projected
from moa_lightning.combiners.dynamic_weights import DynamicWeights
from moa_lightning.combiners.gapo import GAPO
from moa_lightning.combiners.gdpo import GDPO
from moa_lightning.combiners.gramian import Gramian
from moa_lightning.combiners.lagrangian import Lagrangian
from moa_lightning.combiners.linear import Linear
from moa_lightning.combiners.mgda_ub import MGDAUB
from moa_lightning.combiners.modpo import MODPO
from moa_lightning.combiners.mopo import MOPO
from moa_lightning.combiners.p_gapo import PGAPO
from moa_lightning.combiners.pama import PAMA
from moa_lightning.combiners.rvpo import RVPO
from moa_lightning.combiners.shared.scores import ScoreCombiner
from moa_lightning.combiners.smooth_tchebycheff import SmoothTchebycheff
from moa_lightning.combiners.tchebycheff import Tchebycheff

__all__ = [
    "CAID",
    "CTWA",
    "GAPO",
    "GDPO",
    "MGDAUB",
    "MODPO",
    "MOPO",
    "PAMA",
    "PGAPO",
    "PID",
    "RVPO",
    "Combined",
    "Combiner",
    "DualUpdate",
    "DynamicWeights",
    "Exponential",
    "Gramian",
    "Lagrangian",
    "Linear",
    "LogBarrier",
    "LogPID",
    "Optimistic",
    "Projected",
    "ScoreCombiner",
    "SmoothTchebycheff",
    "Tchebycheff",
]

# The imports above are for readers and type checkers; a combiner in a file of its own is exported without one.
for _file in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_file.name}")
    for _name, _class in inspect.getmembers(_module, inspect.isclass):
        if issubclass(_class, Combiner) and _class.__module__ == _module.__name__ and not inspect.isabstract(_class):
            globals().setdefault(_name, _class)
