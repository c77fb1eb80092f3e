"""Toy problems with two objectives whose fronts are known exactly, and policies for them.

Legend: B samples, A actions, P parameters, D dimensions, K points of a curve; 2 objectives.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Problem(ABC):
    """A policy class with parameters (P,), and two objectives that its expected rewards are."""

    name: str
    says: str
    threshold: float  # of the second objective, for constrained combiners
    kl: float  # strength for what cannot do without a KL penalty, small enough that it hardly shifts the optimum
    lr: float  # of Adam, at the start

    @abstractmethod
    def start(self, generator: torch.Generator) -> Tensor:
        """First parameters."""

    @abstractmethod
    def sample(self, parameters_P: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Actions (B, …)."""

    @abstractmethod
    def logprobs(self, parameters_P: Tensor, actions: Tensor) -> Tensor:
        """Log-probability of each action (B,), up to a constant; differentiable."""

    @abstractmethod
    def slopes(self, parameters_P: Tensor, actions: Tensor) -> Tensor:
        """Derivatives (B, P) of the log-probabilities by the parameters."""

    @abstractmethod
    def rewards(self, actions: Tensor) -> Tensor:
        """Rewards (B, 2), in [0, 1]."""

    @abstractmethod
    def values(self, parameters_P: Tensor) -> Array:
        """Expected rewards (2,), exact."""

    @property
    @abstractmethod
    def front(self) -> Array:
        """The Pareto front (K, 2) as a line from the best of the first objective to the best of the second."""

    def distance(self, values_2: Array) -> float:
        """Euclidean, to the nearest point of the front."""
        starts, ends = self.front[:-1], self.front[1:]
        along = ends - starts
        share = np.clip(((values_2 - starts) * along).sum(1) / (along**2).sum(1), 0, 1)
        return float(np.linalg.norm(starts + share[:, None] * along - values_2, axis=1).min())

    @property
    def constrained(self) -> Array:
        """The point of the front where the second objective is at its threshold and the first as high as it goes."""
        second = self.front[:, 1]  # it rises along the line
        return np.array([np.interp(self.threshold, second, self.front[:, 0]), self.threshold])


@dataclass(frozen=True)
class Bandit(Problem):
    """A few actions, and a softmax over as many logits.

    The attainable values are the convex hull of the actions' rewards, so the front is the upper right part of its
    boundary: straight pieces between vertices, always concave. The hull is found by walking from the best action of the
    first objective to that of the second, each time to the action seen at the largest angle outwards.
    """

    rewards_A2: tuple[tuple[float, float], ...] = ()

    def start(self, generator: torch.Generator) -> Tensor:
        """All alike, apart from a little noise."""
        return 0.1 * torch.randn(len(self.rewards_A2), generator=generator)

    def sample(self, parameters_P: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Indices of actions."""
        return torch.multinomial(parameters_P.softmax(0), count, replacement=True, generator=generator)

    def logprobs(self, parameters_P: Tensor, actions: Tensor) -> Tensor:
        """Of a softmax."""
        return parameters_P.log_softmax(0)[actions]

    def slopes(self, parameters_P: Tensor, actions: Tensor) -> Tensor:
        """One at the action's own logit, less the probabilities."""
        return torch.nn.functional.one_hot(actions, len(parameters_P)) - parameters_P.softmax(0)

    def rewards(self, actions: Tensor) -> Tensor:
        """From the table."""
        return torch.tensor(self.rewards_A2)[actions]

    def values(self, parameters_P: Tensor) -> Array:
        """Weighted by the probabilities."""
        return parameters_P.double().softmax(0).numpy() @ np.array(self.rewards_A2)

    @property
    def front(self) -> Array:
        """The hull's vertices."""
        actions = sorted(set(self.rewards_A2), key=lambda a: (-a[0], -a[1]))
        last = max(actions, key=lambda a: (a[1], a[0]))
        walk = [actions[0]]
        while walk[-1] != last:
            here = walk[-1]
            higher = [a for a in actions if a[1] > here[1]]
            walk.append(max(higher, key=lambda a: ((a[0] - here[0]) / (a[1] - here[1]), a[1])))
        return np.array(walk)


@dataclass(frozen=True)
class TwoHills(Problem):
    """A step in the plane, drawn from a narrow normal distribution; each reward is a hill around a point of its own.

    ``r_1(a) = exp(-|a - c|^2)``, ``r_2(a) = exp(-|a + c|^2)`` with ``|c| = 1``: the problem of Fonseca & Fleming
    (1995) in two dimensions, as rewards. The policy's mean is trained and its width ``sigma`` is fixed, so it cannot
    mix the two hills, and expectations have a closed form: ``J_1 = exp(-|mean - c|^2 / s) / s`` with
    ``s = 1 + 2 sigma^2``, and ``J_2`` likewise. Both grow towards the segment from c to -c, so the front is
    that segment's image: ``mean = t c``, t from 1 to -1. It is convex towards the origin in the middle, where no
    weighted sum of the values has a maximum.
    """

    sigma: float = 0.2

    @property
    def centre(self) -> Tensor:
        """The top of the first hill; the second one's is opposite."""
        return torch.tensor([1.0, 0.0])

    def start(self, generator: torch.Generator) -> Tensor:
        """Off the segment, about as far from both hills."""
        return torch.tensor([0.0, 1.0]) + 0.2 * torch.randn(2, generator=generator)

    def sample(self, parameters_P: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Points of the plane (B, 2)."""
        return parameters_P + self.sigma * torch.randn(count, 2, generator=generator)

    def logprobs(self, parameters_P: Tensor, actions: Tensor) -> Tensor:
        """Of a normal distribution."""
        return -(actions - parameters_P).square().sum(1) / (2 * self.sigma**2)

    def slopes(self, parameters_P: Tensor, actions: Tensor) -> Tensor:
        """Towards the action."""
        return (actions - parameters_P) / self.sigma**2

    def rewards(self, actions: Tensor) -> Tensor:
        """Heights of the two hills."""
        return torch.stack([(-(actions - side * self.centre).square().sum(1)).exp() for side in (1, -1)], 1)

    def values(self, parameters_P: Tensor) -> Array:
        """The closed form."""
        s = 1 + 2 * self.sigma**2
        squares = [float((parameters_P - side * self.centre).double().square().sum()) for side in (1, -1)]
        return np.exp(-np.array(squares) / s) / s

    @property
    def front(self) -> Array:
        """A thousand pieces."""
        t, s = np.linspace(1, -1, 1001), 1 + 2 * self.sigma**2
        return np.stack([np.exp(-((t - 1) ** 2) / s), np.exp(-((t + 1) ** 2) / s)], 1) / s


PROBLEMS: tuple[Problem, ...] = (
    Bandit(
        name="concave front",
        says="two good compromises among six actions",
        threshold=0.7,
        kl=0.02,
        lr=0.03,
        rewards_A2=((1.0, 0.0), (0.85, 0.6), (0.6, 0.85), (0.0, 1.0), (0.3, 0.3), (0.0, 0.0)),
    ),
    Bandit(
        name="specialists",
        says="each good action serves one objective alone",
        threshold=0.4,
        kl=0.02,
        lr=0.03,
        rewards_A2=((1.0, 0.0), (0.0, 1.0), (0.0, 0.0)),
    ),
    TwoHills(
        name="non-convex",
        says="one mean between two hills: it cannot mix them",
        threshold=0.25,
        kl=0.002,
        lr=0.01,
    ),
)
