"""Console output: silences libraries, and shows progress bars where they are wanted."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")

_WIDER_THAN_ANY_TABLE = 100_000

_NOT_FOR_USERS = (
    # Deprecations inside libraries.
    "`isinstance.treespec, LeafSpec.` is deprecated",
    "`is_gradient_checkpointing` is deprecated",
    # Advice on data loading workers: prompts and tokens are in memory already.
    ".*does not have many workers.*",
    # The frozen reference and the base models of adapters are in evaluation mode on purpose.
    "Found .* in eval mode at the start of training",
    # A resumed run writes into its own folder.
    "Checkpoint directory .* exists and is not empty",
)


def launched_as() -> int:
    """This process's rank from its launcher's environment, before a process group exists; 0 in a single process."""
    # SLURM sets a rank even for a single shell, so its variable comes last.
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def is_main_process(rank: int) -> bool:
    """Whether a process prints: rank 0 does, and all do with ``MOA_ALL_RANKS=1``."""
    return rank == 0 or os.environ.get("MOA_ALL_RANKS", "0") not in {"", "0"}


def without_progress_bars() -> None:
    """Disable the progress bars of transformers, datasets and huggingface_hub in this process."""
    import datasets
    import huggingface_hub
    import transformers

    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]  # exported lazily


def quiet_libraries(with_models: bool = True) -> None:
    """Silence start-up messages of Lightning, transformers and datasets; their warnings and errors still show.

    Processes other than the main one print only errors.

    Args:
        with_models: whether the command loads models, and so transformers.
    """
    # By their full names, because Lightning sets the levels of their parent packages on import.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message=message)

    others = not is_main_process(launched_as())
    if others:
        logging.getLogger("lightning.fabric.utilities.distributed").setLevel(logging.WARNING)
        warnings.simplefilter("ignore")
    if not with_models:
        return
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if others:
        without_progress_bars()


def shows_progress() -> bool:
    """Whether to draw progress bars: on the main process, in a terminal, and not in CI, whose logs keep every line."""
    return launched_as() == 0 and sys.stderr.isatty() and not os.environ.get("CI")


def progress(items: Iterable[Item], what: str, unit: str) -> Iterable[Item]:
    """Iterate over items with a progress bar on stderr.

    Args:
        items: with a length, so that the bar can show the total.
        what: description of the work.
        unit: name of one item.
    """
    from tqdm import tqdm

    bar: Iterable[Item] = tqdm(
        items, desc=what, unit=f" {unit}", leave=False, disable=not shows_progress(), dynamic_ncols=True
    )
    return bar


def table_console() -> "Console":
    """A console for tables: as wide as the terminal, and in a pipe or a file as wide as the table needs."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDER_THAN_ANY_TABLE  # else rich takes 80 columns for granted
    return Console(markup=False, emoji=False, highlight=False, width=width)


@contextmanager
def library_bars() -> Iterator[None]:
    """Context manager: transformers shows progress bars for loading and saving weights, if bars are drawn at all."""
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
    from transformers.utils import logging as library

    switches: dict[bool, Any] = {True: library.enable_progress_bar, False: library.disable_progress_bar}
    before = bool(library.is_progress_bar_enabled())
    switches[shows_progress() and not HF_HUB_DISABLE_PROGRESS_BARS]()
    try:
        yield
    finally:
        switches[before]()


@contextmanager
def one_thread() -> Iterator[None]:
    """Context manager: torch uses a single thread, unless ``OMP_NUM_THREADS`` is set.

    A model as small as the embedded task's is not faster with several threads, and many times slower on busy cores.
    """
    import torch

    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
