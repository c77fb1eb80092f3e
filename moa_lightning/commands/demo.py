"""``moa demo``: the embedded task from warm start to table."""

from pathlib import Path

from rich.console import Console

from moa_lightning.commands.fit.summary import tell
from moa_lightning.utils.console import one_thread

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def demo(args: list[str]) -> None:
    """Warm-start the embedded policy, align it, print before and after; ``args`` are further options of ``moa fit``."""
    from moa_lightning.commands.fit.cli import AlignmentCLI

    console = Console()
    console.print(
        "[bold]moa demo[/bold]: a small policy writes film reviews; PAMA aligns it to two objectives that pull apart, "
        "sentiment and length.\n"
    )
    with one_thread():
        cli = AlignmentCLI.run_command(["fit", "--config", str(CONFIGS / "demo.yaml"), *args])
    if cli.trainer.progress_bar_callback is None:  # else moa fit has told already
        tell(Path(cli.trainer.default_root_dir))
