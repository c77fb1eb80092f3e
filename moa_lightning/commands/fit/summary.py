"""The summary of a finished run: each objective before and after, and where its files are."""

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moa_lightning.commands.run_summary import verdict
from moa_lightning.functional.verdict import threshold_verdict

FILES = {
    "front.png": "the Pareto front of the run, as a picture",
    "front.csv": "the same as numbers",
    "samples.jsonl": "prompts, responses and their scores at each evaluation",
    "metrics.csv": "every metric at every step",
    "policy": "the aligned policy, in Hugging Face format",
    "config.yaml": "the record of the run: moa fit --config it to run it again",
}


def print_summary(root: Path) -> None:
    """Print what a run in this folder reached; nothing where no evaluation was made."""
    if not (root / "summary.json").is_file():
        return
    summary = json.loads((root / "summary.json").read_text(encoding="utf-8"))
    console = Console(markup=False, emoji=False)  # names and folders are text, '[x]' and ':x:' in them too
    console.print()
    console.print(before_and_after(summary))
    if summary["hypervolume"] is not None:
        volume = summary["hypervolume"]
        reference = ", ".join(f"{name} {value:g}" for name, value in volume["reference"].items())
        console.print(f"hypervolume {volume['start']:.3f} -> {volume['end']:.3f} (reference point {reference})")
        if volume["end"] == 0:
            console.print(
                "  it is 0 because no evaluation is better than the reference point in every objective; set "
                "--pareto_front.reference, in values, to a point worse than all of them"
            )
    for name, numbers in summary["objectives"].items():
        if numbers.get("transform"):
            console.print(
                f"{name}: value = {numbers['transform']}; raw mean {numbers['raw_start']:.3f} -> "
                f"{numbers['raw_end']:.3f}"
            )
    for name, threshold in summary.get("training_thresholds", {}).items():
        value = summary.get("values", {}).get(name)
        console.print(
            f"{name}: threshold {threshold:.3g} on the win probability among the responses to a prompt"
            + (f"; {value:.3g} in the last batch" if value is not None else "")
        )
    for line in thresholds_held(summary):
        console.print(line)
    speed = summary["tokens_per_second"]
    console.print(
        f"{summary['steps']} steps in {summary['seconds']:.0f} s"
        + (f", {speed:.0f} tokens/s" if speed is not None else "")
        + "\n"
    )
    for name, what in FILES.items():
        if (root / name).exists():
            console.print(Text.assemble(f"  {root / name}  ", (what, "dim")), soft_wrap=True)


def before_and_after(summary: dict[str, Any]) -> Table:
    """Each objective's mean value before and after, the difference in standard errors, and what thresholds are met."""
    thresholds = summary.get("thresholds", {})
    table = Table(box=box.SIMPLE_HEAD, title=f"{summary['combiner']}: means on held-out prompts")
    for heading in ("objective", "before", "after", "change", "change / s.e.", *(["threshold"] if thresholds else [])):
        table.add_column(heading, justify="left" if heading == "objective" else "right")
    for name, numbers in summary["objectives"].items():
        change = numbers["end"] - numbers["start"]
        errors = [numbers.get(key) or 0.0 for key in ("std_error", "start_std_error")]
        error = sum(e**2 for e in errors) ** 0.5
        cells = [
            name,
            f"{numbers['start']:.3f}",
            f"{numbers['end']:.3f}",
            f"{change:+.3f}",
            f"{change / error:+.1f}" if error > 0 else "-",
        ]
        told = f"{thresholds[name]:.3g} {verdict(summary, name)}" if name in thresholds else ""
        table.add_row(*cells, *([told] if thresholds else []))
    return table


def thresholds_held(summary: dict[str, Any]) -> list[str]:
    """A line on each threshold: how long it held, and how far its multiplier moved; and one on the best checkpoint."""
    lines = []
    for name, share in summary.get("thresholds_held", {}).items():
        held = _share_of_last(share, summary["thresholds_held_of"])
        line = f"{name}: threshold held (within the 95 % interval counts) in {held}"
        if (moved := summary.get("duals_range", {}).get(name)) is not None:
            line += f"; multiplier from {moved[0]:.3g} to {moved[1]:.3g} in the last quarter"
        lines.append(line)
    if best := summary.get("best"):
        reached = "" if best["feasible"] else "do not "
        which = " that evaluations can judge" if summary.get("training_thresholds") else ""
        lines.append(
            f"{'best' if best['feasible'] else 'nearest'}: step {best['step']}, held-out means {reached}reach all "
            f"thresholds{which} ({_means_and_verdicts(best)}); moa export RUN DIR --checkpoint=best"
        )
    return lines


def _share_of_last(share: float, number: int) -> str:
    """How many of the last evaluations, in words.

    >>> _share_of_last(1.0, 1), _share_of_last(0.5, 4), _share_of_last(0.0, 3)
    ('the last evaluation', '50% of the last 4 evaluations', 'none of the last 3 evaluations')
    """
    if number == 1 and share == 1:
        return "the last evaluation"
    quantity = {0.0: "none", 1.0: "all"}.get(share, f"{share:.0%}")
    return f"{quantity} of the last {number} evaluations" if number > 1 else f"{quantity} of the last evaluation"


def _means_and_verdicts(best: dict[str, Any]) -> str:
    """The primary mean, and that of each threshold with its verdict: reached is not met within the 95 % interval."""
    thresholds = best.get("thresholds", {})  # a summary of an old run has none
    found = [] if best.get("primary_objective") in thresholds else [_primary(best)]
    for name, threshold in thresholds.items():
        mean = best["means"][name]
        told = threshold_verdict(mean, best["std_errors"][name], threshold)
        found.append(f"{name} {mean:.3f}, threshold {threshold:.3g}: {told}")
    return "; ".join(found)


def _primary(best: dict[str, Any]) -> str:
    return f"{best.get('primary_objective', 'primary objective')} {best['primary']:.3f}"
