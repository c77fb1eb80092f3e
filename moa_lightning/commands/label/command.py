"""``moa label``: preference labels that are missing, from rewards by Bradley and Terry's model."""

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from moa_lightning.commands.errors import OneLineErrors
from moa_lightning.commands.label.comparisons import Comparisons, ComparisonTable, Renderer
from moa_lightning.commands.label.output_file import PreferenceFile, Tally, has_label, write_rows
from moa_lightning.data import PreferenceFormat
from moa_lightning.data.preference_formats import Comparison, Wins, from_scores
from moa_lightning.errors import UserError
from moa_lightning.rewards import ClassifierOutput, LengthUnit, Objective, Reward, RewardPanel, ScoredText


class LabelParser(OneLineErrors):
    """The parser of ``moa label``."""

    def nameable(self) -> Sequence[type]:
        """Every base class of a setting."""
        return (PreferenceFormat, Reward, Objective, ClassifierOutput, ScoredText, LengthUnit)


def label(
    output: str,
    data: Comparisons,
    objectives: dict[str, Objective],
    win_scale: float = 1.0,
    overwrite: bool = False,
    tokenizer: str | None = None,
    batch_size: int = 32,
    accelerator: str = "auto",
) -> None:
    """Fill in the preference labels that rows lack, from rewards, and write all rows to a file.

    Each objective scores the responses of the rows that have no label of its name. Response i beats response j with
    probability ``sigmoid((s_i - s_j) / win_scale)`` (Bradley & Terry 1952), where s is the objective's value,
    ``clip(scale * raw + shift)``; its ``weight`` and ``eval_only`` change nothing. Responses without a score are not
    compared, and a label without any comparison stays null. Reward functions get the data's other columns, as in
    ``moa fit``, the same for each response of a row.

    The file has the layout that data class ``Preferences`` reads. It grows batch by batch: the same command resumes
    where an interrupted one stopped, with the settings of the first call.

    Args:
        output: JSONL file to write; the rows that it holds already are kept.
        data: what to label.
        objectives: rewards, each under the name of the label that it fills.
        win_scale: difference in value at which the better response wins 73 % of the time; for one objective alone,
            use its ``scale``.
        overwrite: replace labels that are there too; without, they stay as they are.
        tokenizer: folder or hub id of the policy, whose chat template makes text of prompts that are chat messages.
        batch_size: rows that are scored at a time.
        accelerator: Lightning's, for the rewards' models.

    Raises:
        UserError: in one line, what is wrong with an argument, with a row, or with what ``output`` holds.
    """
    if not (win_scale > 0 and math.isfinite(win_scale)) or batch_size < 1:
        raise UserError(f"win_scale must be above 0 and batch_size at least 1, got {win_scale:g} and {batch_size}")
    target, device, panels = _target(output, data.path), _device(accelerator), _panels(objectives)
    table = ComparisonTable(data, Renderer(tokenizer))
    for panel in panels.values():
        panel.check(table.columns)
    if table.left_out:
        total = len(table) + table.left_out
        print(f"{table.left_out} of {total} rows of '{data.path}' are left out; the first: {table.first_bad}")
    tally = Tally(tuple(panels), overwrite)
    file = PreferenceFile(target, f"'{data.path}'")
    part = file.verify(len(table), table.comparison, tally.add)
    if part.rows == len(table):
        print(f"{output} is finished already: nothing was done")
    elif part.rows:
        print(f"{output} holds {part.rows} of {len(table)} rows; resuming from there")
    if part.rows < len(table):
        scorer = Scorer(panels, device, win_scale, overwrite)
        with _stopping_quietly(output), file.resume(part) as opened, _progress(part.rows, len(table)) as advance:
            for pairs in _labelled(table, scorer, part.rows, batch_size):
                write_rows(opened, [filled for _, filled in pairs])
                for given, filled in pairs:
                    tally.add(given, filled)
                advance(len(pairs))
    print("\n".join([*tally.lines(), f"{len(table)} rows in {output}"]))


def _labelled(
    table: ComparisonTable, scorer: "Scorer", first: int, batch_size: int
) -> Iterator[list[tuple[Comparison, Comparison]]]:
    """The rows from the first one on, batch by batch, each as it is and with its labels filled in."""
    # Batches start where they do without an interruption: rewards see the same ones, and answer the same.
    for start in range(first // batch_size * batch_size, len(table), batch_size):
        rows = range(start, min(start + batch_size, len(table)))
        given = [table.comparison(i) for i in rows]
        filled = scorer.fill(given, [table.render(c.prompt) for c in given], [table.others(i) for i in rows])
        yield list(zip(given, filled, strict=True))[max(first - start, 0) :]


class Scorer:
    """Fills the labels that comparisons lack.

    Args:
        panels: one for each label.
        device: for the rewards' models, which are loaded when the first response is scored.
        win_scale: of Bradley and Terry's model.
        overwrite: fill the labels that are there too.
    """

    def __init__(
        self, panels: Mapping[str, RewardPanel], device: torch.device, win_scale: float, overwrite: bool
    ) -> None:
        self.panels, self.device, self.win_scale, self.overwrite = panels, device, win_scale, overwrite

    def fill(
        self, given: Sequence[Comparison], prompts: Sequence[str], others: Sequence[Mapping[str, Any]]
    ) -> list[Comparison]:
        """The comparisons with labels for every objective; null where a reward has no opinion.

        Args:
            given: comparisons.
            prompts: of each, as text.
            others: of each, the row's other columns.
        """
        filled = [replace(comparison, wins=dict(comparison.wins)) for comparison in given]
        for name, panel in self.panels.items():
            asked = [i for i, c in enumerate(given) if self.overwrite or not has_label(c.wins.get(name))]
            scores = iter(self._scores(panel, given, prompts, others, asked))
            for i in asked:
                wins = bradley_terry([next(scores) for _ in given[i].responses], name, self.win_scale)
                filled[i].wins[name] = wins if has_label(wins) else given[i].wins.get(name)
        return filled

    def _scores(
        self,
        panel: RewardPanel,
        given: Sequence[Comparison],
        prompts: Sequence[str],
        others: Sequence[Mapping[str, Any]],
        asked: Sequence[int],
    ) -> list[float]:
        """The values of all responses of the rows that are asked about, one row after the other."""
        row_B = [i for i in asked for _ in given[i].responses]
        if not row_B:
            return []
        panel.setup(self.device)
        columns = {name: [others[i][name] for i in row_B] for name in others[0]}
        completions = [response for i in asked for response in given[i].responses]
        with warnings.catch_warnings():
            # How many responses have no score is what the last lines say, in labels.
            warnings.filterwarnings("ignore", message="objective '.*' did not score", category=UserWarning)
            values: list[float] = panel.score([prompts[i] for i in row_B], completions, columns).value_BN[:, 0].tolist()
        return values


def bradley_terry(scores: Sequence[float], name: str, scale: float) -> Wins:
    """``sigmoid((s_i - s_j) / scale)`` for each pair of scores; NaN where one of the two is missing.

    Example:
        >>> bradley_terry([3.0, math.nan, 3.0], "helpful", scale=1.0)
        [[0.5, nan, 0.5], [nan, 0.5, nan], [0.5, nan, 0.5]]
    """
    scored = [i for i, score in enumerate(scores) if math.isfinite(score)]
    wins = [[0.5 if i == j else math.nan for j in range(len(scores))] for i in range(len(scores))]
    for i, line in zip(scored, from_scores([scores[i] for i in scored], name, scale) or [], strict=True):
        for j, probability in zip(scored, line, strict=True):
            wins[i][j] = probability
    return wins


def _target(output: str, source: str) -> Path:
    target, given = Path(output).expanduser(), Path(source).expanduser()
    if target.suffix != ".jsonl":
        raise UserError(f"output must be a .jsonl file, got '{output}'")
    if target.is_dir():
        raise UserError(f"output '{output}' is a folder; give a .jsonl file")
    if target.resolve() == given.resolve() or (target.exists() and given.exists() and os.path.samefile(target, given)):
        raise UserError(f"output '{output}' is the data itself, which is never changed; give another file")
    return target


def _device(accelerator: str) -> torch.device:
    from lightning.fabric import Fabric

    try:
        return Fabric(accelerator=accelerator, devices=1).device
    except (ValueError, RuntimeError) as error:  # an unknown name, or one that this machine lacks
        raise UserError(f"accelerator: {error}") from error


def _panels(objectives: Mapping[str, Objective]) -> dict[str, RewardPanel]:
    if not objectives:
        raise UserError("there are no objectives; name at least one under 'objectives', each with a reward")
    for name, objective in objectives.items():
        if objective.reward.gives_wins:
            raise UserError(
                f"objective '{name}': {objective.reward.title} reads labels that are there already; leave it out, or "
                "give a reward that scores responses"
            )
    # One for each, so that an objective scores those rows alone that lack its own label.
    return {name: RewardPanel({name: replace(o, eval_only=False)}) for name, o in objectives.items()}


@contextmanager
def _progress(done: int, total: int) -> Iterator[Callable[[int], None]]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress("labelling", *columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("labelling", completed=done, total=total)
        yield lambda rows: progress.advance(task, rows)


@contextmanager
def _stopping_quietly(output: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped; what is in {output} is kept, and the same command resumes from there", file=sys.stderr)
        raise SystemExit(130) from None
