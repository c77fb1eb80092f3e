"""Callbacks: they observe a run and write what they see; without them the run is the same."""

if __name__ != "moa_lightning.callbacks":
    raise ImportError(f"import these as 'moa_lightning.callbacks', not as '{__name__}'")

from moa_lightning.callbacks.constraints import Constraints
from moa_lightning.callbacks.evaluations import EvaluationCallback
from moa_lightning.callbacks.metrics_file import MetricsBeforeCheckpoints, MetricsFile
from moa_lightning.callbacks.pareto_front import ParetoFront
from moa_lightning.callbacks.predictions import PredictionWriter
from moa_lightning.callbacks.progress import ObjectiveProgressBar
from moa_lightning.callbacks.rewards import ObjectiveMetrics
from moa_lightning.callbacks.run_files import RunFiles
from moa_lightning.callbacks.samples import SampleTable
from moa_lightning.callbacks.throughput import Throughput
from moa_lightning.types import Statistics

__all__ = [
    "Constraints",
    "EvaluationCallback",
    "MetricsBeforeCheckpoints",
    "MetricsFile",
    "ObjectiveMetrics",
    "ObjectiveProgressBar",
    "ParetoFront",
    "PredictionWriter",
    "RunFiles",
    "SampleTable",
    "Statistics",
    "Throughput",
]
