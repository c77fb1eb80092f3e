"""The reward panel: scores responses under all objectives.

Legend: B responses, N objectives (of ``weights_N``: trained objectives).
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from moa_lightning.errors import RewardError, UserError
from moa_lightning.rewards.base import Objective, Reward, ShardModel
from moa_lightning.schedules import Weight, weight_at
from moa_lightning.types import Columns, RewardTable

# Names become parts of metric keys (rewards/NAME/mean), of command-line flags (objectives.NAME.weight=2), and headings
# in spreadsheets and model cards, where a name such as '=1+1' or '<b>' would be more than text.
_NAME = re.compile(r"\w[\w-]*")
_TAKEN_NAMES = ("step", "epoch", "run", "combiner", "steps", "non_dominated")
_TAKEN_ENDS = (
    "std_error",
    "raw",
    "value",
    "mean",
    "interval",
    "threshold",
    "outcome",
)  # endings of the columns that tables add for an objective
_TAKEN_COLUMNS = ("prompts", "completions", "self")


class RewardPanel:
    """Named objectives that score the same responses.

    A response that an objective cannot score (None, NaN, or an infinite number) is NaN in the table for that objective
    only: it counts for all the others.

    Args:
        objectives: by name, in the order of all tables.

    Raises:
        UserError: no objectives, none that is trained, or a name that cannot be part of a metric key or is already the
            name of a column.
    """

    def __init__(self, objectives: Mapping[str, Objective]) -> None:
        for name in objectives:
            _check_name(name, objectives)
        if not objectives:
            raise UserError("there are no objectives; name at least one under 'objectives', each with a reward")
        if all(objective.eval_only for objective in objectives.values()):
            raise UserError(
                f"every objective is eval_only ({', '.join(objectives)}); at least one must be trained: remove its "
                "eval_only"
            )
        self.objectives = dict(objectives)
        self._warned: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all objectives, in order."""
        return tuple(self.objectives)

    @property
    def trained(self) -> tuple[bool, ...]:
        """Whether each objective is trained; False for eval-only ones."""
        return tuple(not objective.eval_only for objective in self.objectives.values())

    @property
    def trained_names(self) -> tuple[str, ...]:
        """Names of the trained objectives, in order."""
        return tuple(name for name, objective in self.objectives.items() if not objective.eval_only)

    @property
    def weights_N(self) -> Tensor:
        """Weights of the trained objectives at the start of the run, float32, not normalised."""
        return self.weights_at(0.0)

    @property
    def weights(self) -> dict[str, Weight]:
        """Weights of the trained objectives as configured: numbers or schedules."""
        return {name: self.objectives[name].weight for name in self.trained_names}

    def weights_at(self, progress: float) -> Tensor:
        """Weights of the trained objectives at this progress of the run (0 to 1), float32, not normalised."""
        return torch.tensor([weight_at(weight, progress) for weight in self.weights.values()], dtype=torch.float32)

    def check(self, columns: set[str]) -> None:
        """Refuse objectives that cannot work on data with these columns, before any model is loaded.

        Args:
            columns: names of the data's columns besides the prompt.

        Raises:
            UserError: one line, with the objective's name.
        """
        for column in _TAKEN_COLUMNS:
            if column in columns:
                raise UserError(
                    f"the data has a column '{column}', but rewards get an argument of that name already; "
                    "rename the column"
                )
        self._each(lambda reward: reward.check(columns))

    def setup(self, device: torch.device) -> None:
        """Load the rewards' models onto the device. May be called again."""
        self._each(lambda reward: reward.setup(device))

    def shard(self, shard_model: ShardModel) -> None:
        """Load the rewards' models and shard them, before :meth:`setup`."""
        self._each(lambda reward: reward.shard(shard_model))

    def _each(self, call: Callable[[Reward], None]) -> None:
        for name, objective in self.objectives.items():
            try:
                call(objective.reward)
            except UserError as error:
                raise UserError(f"objective '{name}': {error}") from error

    def score(self, prompts: list[str], completions: list[str], columns: Columns) -> RewardTable:
        """Score B responses under every objective, including eval-only ones.

        Args:
            prompts: one per response.
            completions: one per response.
            columns: the data's other columns, one entry per response; each reward gets all of them by keyword.

        Returns:
            The table, on the CPU. Numbers too large for float32 count as infinite, and so as missing.

        Raises:
            RewardError: a reward raised an exception, which is its cause.
            UserError: a reward returned the wrong number of scores, or something that is not a number.

        Warns once for each objective, on the main process, when it leaves responses out.
        """
        assert len(prompts) == len(completions), "one prompt per completion"
        assert all(len(values) == len(prompts) for values in columns.values()), "one entry per response"
        # The dtype is explicit, because bf16-true sets the default dtype to bfloat16.
        raw_BN = torch.empty(len(prompts), len(self.objectives), dtype=torch.float32)
        value_BN = torch.empty_like(raw_BN)
        for i, (name, objective) in enumerate(self.objectives.items()):
            raw_B = torch.tensor(_scores(name, objective.reward, prompts, completions, columns), dtype=torch.float64)
            raw_BN[:, i] = _finite_or_nan(raw_B)
            value_BN[:, i] = _finite_or_nan(objective.value(raw_BN[:, i]))
            self._warn_once(name, raw_B, value_BN[:, i])
        transforms = tuple(objective.transform for objective in self.objectives.values())
        return RewardTable(self.names, self.trained, raw_BN, value_BN, transforms)

    def _warn_once(self, name: str, raw_B: Tensor, value_B: Tensor) -> None:
        missing = int(value_B.isnan().sum())
        if missing == 0 or name in self._warned:
            return
        self._warned.add(name)
        infinite = missing - int(raw_B.isnan().sum())
        detail = f" ({infinite} of them infinite)" if infinite else ""
        rank_zero_warn(
            f"objective '{name}' did not score {missing} of {len(value_B)} responses{detail}; they are left out of "
            "this objective only. Shown once: the metrics count them from here on"
        )


def _check_name(name: str, names: Iterable[str]) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"'{name}' cannot name an objective: names become metric keys and columns; write one word of letters, "
            "digits, '_' and '-'"
        )
    if name in _TAKEN_NAMES:
        raise UserError(f"'{name}' cannot name an objective: tables have a column of that name already; rename it")
    for other in names:
        if any(name.startswith(f"{other}_") and name.endswith(f"_{end}") for end in _TAKEN_ENDS):
            raise UserError(
                f"'{name}' cannot name an objective beside '{other}': tables call a column of '{other}' so; rename one"
            )


def _scores(name: str, reward: Reward, prompts: list[str], completions: list[str], columns: Columns) -> list[float]:
    """Call a reward; returns floats, NaN for None."""
    try:
        # Copies: a reward that changes its arguments in place must not affect the next one.
        answer: Any = reward.score(list(prompts), list(completions), **{k: list(v) for k, v in columns.items()})
        scores = list(answer) if isinstance(answer, Iterable) else None  # a generator runs here
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a reward that exits must not end the run as if it had succeeded
        reason = " ".join(str(error).split())
        raise RewardError(
            f"objective '{name}': {reward.title} raised {type(error).__name__}{f': {reason}' if reason else ''}"
        ) from error
    if scores is None:
        raise UserError(
            f"objective '{name}': {reward.title} returned {type(answer).__name__} instead of a list of {len(prompts)} "
            "numbers, one per completion"
        )
    if len(scores) != len(completions):
        raise UserError(
            f"objective '{name}': {reward.title} returned {len(scores)} scores for {len(completions)} completions; "
            "return one per completion, None where it has no opinion"
        )
    return [_number(name, reward, row, score) for row, score in enumerate(scores)]


def _number(name: str, reward: Reward, row: int, score: Any) -> float:
    if score is None:
        return math.nan
    try:
        if isinstance(score, str | bytes):  # float() would accept "1.5", and "nan" silently
            raise TypeError
        return float(score)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            f"objective '{name}': {reward.title} returned {str(score)[:40]!r} ({type(score).__name__}) for completion "
            f"{row}; return a number, or None where it has no opinion"
        ) from None


def _finite_or_nan(values_B: Tensor) -> Tensor:
    """Convert to float32, with NaN in place of infinities."""
    values_B = values_B.float()
    return values_B.where(values_B.isfinite(), math.nan)
