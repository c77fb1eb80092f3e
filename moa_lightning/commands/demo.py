"""``moa demo``: the embedded task from warm start to table."""

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from moa_lightning.console import one_thread

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def demo(args: list[str]) -> None:
    """Warm-start the embedded policy, align it, print before and after; ``args`` are further options of ``moa fit``."""
    from moa_lightning.commands.lightning import AlignmentCLI

    console = Console()
    console.print(
        "[bold]moa demo[/bold]: a small policy writes film reviews; PAMA aligns it to two objectives that pull apart, "
        "sentiment and length.\n"
    )
    with one_thread():
        cli = AlignmentCLI.run_command(["fit", "--config", str(CONFIGS / "demo.yaml"), *args])
    root = Path(cli.trainer.default_root_dir)
    summary = json.loads((root / "summary.json").read_text(encoding="utf-8"))
    console.print()
    console.print(before_and_after(summary))
    volume = summary["hypervolume"]
    reference = ", ".join(f"{name} {value:g}" for name, value in volume["reference"].items())
    console.print(
        f"hypervolume {volume['start']:.3f} -> {volume['end']:.3f} (reference point {reference}); {summary['steps']} "
        f"steps in {summary['seconds']:.0f} s, {summary['tokens_per_second']:.0f} tokens/s\n"
    )
    for name, what in {
        "front.png": "the Pareto front of the run, as a picture",
        "front.csv": "the same as numbers",
        "samples.jsonl": "prompts, responses and their scores at each evaluation",
        "metrics.csv": "every metric at every step",
        "policy": "the aligned policy, in Hugging Face format",
        "config.yaml": "the record of the run: moa fit --config it to run it again",
    }.items():
        console.print(f"  {root / name}  [dim]{what}[/dim]", soft_wrap=True)


def before_and_after(summary: dict[str, Any]) -> Table:
    """Each objective's mean before and after, with the difference in standard errors."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{summary['combiner']}: mean reward on held-out prompts")
    for heading in ("objective", "before", "after", "change", "standard errors"):
        table.add_column(heading, justify="left" if heading == "objective" else "right")
    for name, numbers in summary["objectives"].items():
        change = numbers["end"] - numbers["start"]
        error = (numbers["std_error"] ** 2 + numbers.get("start_std_error", 0.0) ** 2) ** 0.5
        table.add_row(
            name,
            f"{numbers['start']:.3f}",
            f"{numbers['end']:.3f}",
            f"{change:+.3f}",
            f"{change / error:+.1f}" if error > 0 else "-",
        )
    return table
