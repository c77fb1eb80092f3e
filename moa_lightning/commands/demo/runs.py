"""The runs of the demo: what each was asked for, and what it reached."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
SENTIMENT, INFORMATIVE = "sentiment", "informative"


@dataclass(frozen=True)
class Asked:
    """One run, and what it was asked for: weights, a threshold, or neither.

    Args:
        name: of its folder.
        flags: that turn ``configs/demo.yaml`` into this run.
        weight: of informative, where weights were given; that of sentiment is the rest of 1.
        threshold: least mean of informative, where one was given.
    """

    name: str
    flags: tuple[str, ...] = ()
    weight: float | None = None
    threshold: float | None = None

    @property
    def words(self) -> str:
        """What was asked for."""
        if self.weight is not None:
            return f"weights {1 - self.weight:.2g}, {self.weight:.2g}"
        return "no weights" if self.threshold is None else f"{INFORMATIVE} >= {self.threshold:.2g}"

    @property
    def best(self) -> float | None:
        """Informative at the point of the exact front that was asked for; ``None`` where none was.

        With weights ``w_s`` and ``w_f`` it is where ``w_s (1 - f^2) + w_f f`` is largest; with a threshold, at it.
        """
        if self.weight is None:
            return self.threshold
        return min(1.0, self.weight / (2 * (1 - self.weight))) if self.weight < 1 else 1.0


def _linear(weight: float) -> Asked:
    weights = f"{{{SENTIMENT}: {1 - weight:.2g}, {INFORMATIVE}: {weight:.2g}}}"
    # On raw advantages: then the weights are those of the rewards, and what they ask for is a point of the front.
    raw = ("--model.source.advantages=GAE", "--model.source.advantages.standardize=false")
    flags = ("--model.combiner=Linear", f"--model.combiner.weights={weights}", *raw)
    return Asked(f"linear-{weight:.2g}", flags, weight=weight)


def _threshold(threshold: float) -> Asked:
    thresholds = f"{{{INFORMATIVE}: {threshold:.2g}}}"
    return Asked(
        "lagrangian",
        ("--model.combiner=Lagrangian", f"--model.combiner.thresholds={thresholds}"),
        threshold=threshold,
    )


RUNS = (Asked("pama"), _linear(0.2), _linear(0.5), _linear(0.8), _threshold(0.5))


@dataclass(frozen=True)
class Point:
    """Mean values of one evaluation, with their standard errors."""

    sentiment: float
    informative: float
    sentiment_error: float
    informative_error: float

    @property
    def distance(self) -> float:
        """From the exact front."""
        from moa_lightning.data.reviews import distance_to_front

        return distance_to_front(self.sentiment, self.informative)


@dataclass(frozen=True)
class Reached:
    """A finished run.

    Args:
        asked: what it was asked for.
        path: its evaluations, in their order; the first is of the policy that all runs start from.
        verdict: of its threshold: met, missed or open; empty without one.
    """

    asked: Asked
    path: tuple[Point, ...]
    verdict: str

    @property
    def end(self) -> Point:
        """The last evaluation."""
        return self.path[-1]


def nearest(run: Reached, runs: Sequence[Reached]) -> Reached:
    """The other run that ends nearest to a run."""

    def distance(other: Reached) -> float:
        return math.hypot(other.end.sentiment - run.end.sentiment, other.end.informative - run.end.informative)

    return min((other for other in runs if other is not run), key=distance)


def read(asked: Asked, folder: Path) -> Reached:
    """What the folder of a finished run says."""
    from moa_lightning.commands.run_summary import verdict

    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    with (folder / "front.csv").open(newline="", encoding="utf-8") as file:
        path = tuple(Point(*(float(row[name] or math.nan) for name in _COLUMNS)) for row in csv.DictReader(file))
    return Reached(asked, path, verdict(summary, INFORMATIVE))


_COLUMNS = (SENTIMENT, INFORMATIVE, f"{SENTIMENT}_std_error", f"{INFORMATIVE}_std_error")


def steps_done(folder: Path) -> int:
    """Updates that a run has made, as far as its files say."""
    file = folder / "metrics.csv"
    if not file.is_file():
        return 0
    rows = file.read_text(encoding="utf-8").splitlines()[1:]
    steps = [int(row.split(",")[0]) for row in rows if row.split(",")[0].isdigit()]
    return max(steps, default=-1) + 1


def is_finished(folder: Path, steps: int) -> bool:
    """Whether a run has come to its end: the policy is the last file but one that it writes, the summary the last.

    A run whose summary cannot be read has not.
    """
    summary = folder / "summary.json"
    if not (folder / "policy" / "config.json").is_file() or not summary.is_file():
        return False
    try:
        return bool(json.loads(summary.read_text(encoding="utf-8"))["steps"] >= steps)
    except (ValueError, KeyError, TypeError):
        return False
