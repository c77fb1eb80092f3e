"""``moa demo``: train, report, draw."""

import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from moa_lightning.commands.demo.processes import Training, train
from moa_lightning.commands.demo.runs import CONFIG, INFORMATIVE, RUNS, SENTIMENT, Point, Reached, nearest, read
from moa_lightning.errors import UserError
from moa_lightning.utils.atomic_file import atomic_file, is_scratch

_RECORD = ".demo.json"
_MOST_JOBS = 4  # a run needs about 0.7 GB


def demo(output: str = "runs/demo", steps: int = 80, seed: int = 0, jobs: int | None = None) -> None:
    """Align a small policy in several ways, print what each was asked for and what came out, and draw it.

    A policy that writes film reviews is warm-started once. Then PAMA, fixed weights and a threshold trade sentiment
    against information, each in a run of its own, several at a time, on one thread each. The exact front of this task
    is known, so the table says how far from it each run ends. The picture is ``front.png`` in ``output``.

    The same command again keeps finished runs and resumes an interrupted one. Other settings get a new folder.

    Args:
        output: folder of the runs and the picture.
        steps: updates of each run.
        seed: of each run.
        jobs: runs at a time; ``None`` is one for each core, at most 4.

    Raises:
        UserError: a run failed; the last lines of its log are printed before.
    """
    if steps < 4:
        raise UserError(f"--steps must be at least 4, so that each run is evaluated four times; got {steps}")
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    console = Console(markup=False, emoji=False, highlight=False)
    root = claim(Path(output), steps, seed)
    flags = (
        f"--config={CONFIG}",
        f"--seed_everything={seed}",
        f"--trainer.max_steps={steps}",
        f"--trainer.val_check_interval={steps // 4}",
    )
    try:
        warm_started()
        runs = [Training(root / asked.name, asked.words, (*flags, *asked.flags), steps) for asked in RUNS]
        train(runs, min(os.cpu_count() or 1, _MOST_JOBS) if jobs is None else jobs, console)
    except KeyboardInterrupt:
        console.print(f"stopped; what is in {root} is kept, and the same command resumes the runs")
        raise SystemExit(130) from None
    report([read(asked, root / asked.name) for asked in RUNS], root, console)


def claim(root: Path, steps: int, seed: int) -> Path:
    """The folder of a demo with these settings: ``root`` or the first of ``root-2``, ``root-3``, … that fits.

    A folder fits that is empty, or in which a demo with the same settings was begun.
    """
    from moa_lightning import __version__

    settings = {"version": __version__, "steps": steps, "seed": seed}
    candidate, number = root, 1
    while _is_used(candidate):
        if _record(candidate) == settings:
            return candidate
        number += 1
        candidate = root.with_name(f"{root.name}-{number}")
    candidate.mkdir(parents=True, exist_ok=True)
    with atomic_file(candidate / _RECORD) as scratch:
        scratch.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    return candidate


def _record(root: Path) -> object:
    """The settings of the demo that was begun there; ``None`` where none was, or its record cannot be read."""
    try:
        return json.loads((root / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_used(root: Path) -> bool:
    """Whether anything is there, but for the record of a demo that was killed while it wrote it."""
    if not root.is_dir():
        return root.exists()
    return any(not is_scratch(file, root / _RECORD) for file in root.iterdir())


def warm_started() -> None:
    """Build the policy that all runs start from, unless it is there: two runs must not build it at once."""
    import yaml

    from moa_lightning.data.reviews import warm_start
    from moa_lightning.utils.console import one_thread

    with one_thread():
        warm_start(yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["model"]["policy"]["path"])


def report(reached: Sequence[Reached], root: Path, console: Console) -> None:
    """Print the table, what can be seen in it, and where everything is; draw the picture."""
    from moa_lightning.commands.demo.picture import draw

    console.print(table(reached))
    draw(reached, root / "front.png")
    console.print(f"to the front: the distance from {SENTIMENT} = 1 - {INFORMATIVE}^2, which no policy exceeds.\n")
    for line in remarks(reached):
        console.print(line)
    console.print(
        f"\nThe picture is {root / 'front.png'}. Next, any other combiner, and the runs side by side:\n"
        f"  moa fit --config configs/demo.yaml --model.combiner=MGDAUB --trainer.default_root_dir={root}/mgda-ub\n"
        f"  moa compare --runs='{root}/*'",
        soft_wrap=True,
    )


def table(reached: Sequence[Reached]) -> Table:
    """Where all runs start, and what each was asked for and reached."""
    columns = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))  # 80 columns hold it
    for heading in ("run", "asked for"):
        columns.add_column(heading, no_wrap=True)
    for heading in (f"{SENTIMENT}\n± s.e.", f"{INFORMATIVE}\n± s.e.", "to the\nfront", "met?"):
        columns.add_column(heading, justify="right", no_wrap=True)
    columns.add_row("start", "", *_cells(reached[0].path[0]), "")
    for run in reached:
        columns.add_row(run.asked.name, run.asked.words, *_cells(run.end), run.verdict)
    return columns


def remarks(reached: Sequence[Reached]) -> list[str]:
    """What the numbers show, kind by kind."""
    from moa_lightning.data.reviews import front

    lines = []
    for run in reached:
        if run.asked.best is None:
            near = nearest(run, reached)
            lines.append(
                f"{run.asked.name}: nothing steers it along the front. It ends {run.end.distance:.2f} from it, and "
                f"{near.asked.name}, which ends nearest to it, {near.end.distance:.2f}. With Noon it learns only from "
                "tokens that are better than average for both objectives."
            )
        if run.asked.threshold is not None:
            lines.append(
                f"{run.asked.name}: asked for {run.asked.words} it has {run.end.informative:.2f}, and "
                f"{front(run.asked.threshold) - run.end.sentiment:.2f} less {SENTIMENT} than the best policy there."
            )
    weighted = sorted((run for run in reached if run.asked.weight is not None), key=lambda run: run.asked.weight or 0)
    if len(weighted) > 1:
        before, after = max(pairwise(weighted), key=lambda pair: abs(pair[1].end.informative - pair[0].end.informative))
        lines.append(
            f"weights: between {before.asked.name} and {after.asked.name} {INFORMATIVE} jumps from "
            f"{before.end.informative:.2f} to {after.end.informative:.2f}; a threshold asks for what lies between."
        )
    return lines


def _cells(point: Point) -> tuple[str, str, str]:
    return (
        f"{point.sentiment:.3f} ± {point.sentiment_error:.3f}",
        f"{point.informative:.3f} ± {point.informative_error:.3f}",
        f"{point.distance:.3f}",
    )
