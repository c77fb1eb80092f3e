"""Schedules: weights that change over the run.

Progress is the share of the run's optimiser steps that are done, from 0 to 1.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from typing_extensions import override

from moa_lightning.errors import UserError

Point = tuple[float, float]


class WeightSchedule(ABC):
    """A weight that depends on the progress of the run. It can replace a number wherever a weight is configured.

    Subclasses are frozen dataclasses, validated in ``__post_init__``.
    """

    @property
    def knots(self) -> tuple[float, ...]:
        """Progress at which weights are checked before the run starts: breakpoints, and both ends of the run."""
        return (0.0, 1.0)

    @abstractmethod
    def at(self, progress: float) -> float:
        """The weight at this progress, at least 0 and finite."""


# In this order: for a union, the parser reports the error of the first type.
Weight = WeightSchedule | float
"""A configured weight: a number or a schedule."""


@dataclass(frozen=True)
class ConstantWeight(WeightSchedule):
    """A constant weight, like a plain number.

    Args:
        value: the weight, >= 0.
    """

    value: float

    def __post_init__(self) -> None:
        """Validate hyperparameters."""
        check_weights({"ConstantWeight.value": self.value})

    @property
    def knots(self) -> tuple[float, ...]:
        """A single one is enough."""
        return (0.0,)

    @override
    def at(self, progress: float) -> float:
        return self.value


@dataclass(frozen=True)
class LinearWeight(WeightSchedule):
    """Linear interpolation from one weight to another, constant before and after.

    >>> fading = LinearWeight(start=1.0, end=0.2, until=0.5)
    >>> [round(fading.at(progress), 6) for progress in (0.0, 0.25, 0.5, 1.0)]
    [1.0, 0.6, 0.2, 0.2]

    Args:
        start: the weight up to ``begin``, >= 0.
        end: the weight from ``until`` on, >= 0.
        begin: progress at which the change starts, a share of the run.
        until: progress at which the change ends, a share of the run.
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        """Validate hyperparameters."""
        check_weights({"LinearWeight.start": self.start, "LinearWeight.end": self.end})
        if not 0 <= self.begin < self.until <= 1:
            raise UserError(
                "LinearWeight's begin and until are shares of the run, 0 <= begin < until <= 1; got "
                f"{self.begin} and {self.until}"
            )

    @property
    def knots(self) -> tuple[float, ...]:
        """Where the change starts and ends, and both ends of the run."""
        return (0.0, self.begin, self.until, 1.0)

    @override
    def at(self, progress: float) -> float:
        return _interpolated(((self.begin, self.start), (self.until, self.end)), progress)


@dataclass(frozen=True)
class PiecewiseWeight(WeightSchedule):
    """Linear interpolation between points, constant before the first and after the last.

    >>> peak = PiecewiseWeight([(0.2, 0.0), (0.5, 1.0), (0.6, 0.5)])
    >>> [round(peak.at(progress), 6) for progress in (0.0, 0.35, 0.5, 0.55, 1.0)]
    [0.0, 0.5, 1.0, 0.75, 0.5]

    Args:
        points: ``[progress, weight]`` by ascending progress, a share of the run. For a step, put two points close
            together.
    """

    points: list[Point]

    def __post_init__(self) -> None:
        """Validate hyperparameters."""
        if not self.points:
            raise UserError("PiecewiseWeight needs at least one point [progress, weight]")
        check_weights({f"PiecewiseWeight's weight at {where}": value for where, value in self.points})
        for where, _ in self.points:
            if not 0 <= where <= 1:
                raise UserError(f"PiecewiseWeight's points are at shares of the run, in [0, 1]; got one at {where}")
        for (before, _), (after, _) in pairwise(self.points):
            if not before < after:
                raise UserError(
                    f"PiecewiseWeight's points must be in the order of progress, each once; got {after} after {before}"
                )

    @property
    def knots(self) -> tuple[float, ...]:
        """The points, and both ends of the run."""
        return (0.0, *(where for where, _ in self.points), 1.0)

    def at(self, progress: float) -> float:
        """Interpolate between the neighbouring points."""
        return _interpolated(self.points, progress)


def weight_at(weight: Weight, progress: float) -> float:
    """The value of a weight at some progress."""
    return weight.at(progress) if isinstance(weight, WeightSchedule) else float(weight)


def scheduled(weights: Mapping[str, Weight]) -> dict[str, WeightSchedule]:
    """The weights that follow a schedule."""
    return {name: weight for name, weight in weights.items() if isinstance(weight, WeightSchedule)}


def check_weights(weights: Mapping[str, float]) -> None:
    """Validate weights.

    Args:
        weights: by their names in messages.

    Raises:
        UserError: one is negative or not finite.
    """
    for name, value in weights.items():
        if not math.isfinite(value) or value < 0:
            raise UserError(f"{name} must be a finite number >= 0, got {value}")


def _interpolated(points: Iterable[Point], progress: float) -> float:
    # Not (1 - share) * start + share * end: for two equal weights that is not always exactly their value.
    before, value = None, math.nan
    for where, height in points:
        if progress < where:
            return height if before is None else value + (progress - before) / (where - before) * (height - value)
        before, value = where, height
    return value
