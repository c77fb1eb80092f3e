"""What the commands print: our own lines, not those of the libraries below."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")

_NOT_FOR_USERS = (
    # Names that are deprecated one library further down.
    "`isinstance.treespec, LeafSpec.` is deprecated",
    "`is_gradient_checkpointing` is deprecated",
    # Advice on data loading workers: prompts and tokens are in memory already.
    ".*does not have many workers.*",
    # The frozen reference and adapters' base models are in evaluation mode on purpose.
    "Found .* in eval mode at the start of training",
    # A run that goes on does so in its own folder.
    "Checkpoint directory .* exists and is not empty",
)


def launched_as() -> int:
    """This process's rank as its launcher names it, before the processes have met; 0 where there is one."""
    # SLURM names a rank also where it started a single shell, so it is asked last.
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def is_main_process(rank: int) -> bool:
    """Whether a process prints: the first one does, all do with ``MOA_ALL_RANKS=1``."""
    return rank == 0 or os.environ.get("MOA_ALL_RANKS", "0") not in {"", "0"}


def without_progress_bars() -> None:
    """No progress bars of transformers, datasets and the hub in this process."""
    import datasets
    import huggingface_hub
    import transformers

    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]  # it is there


def quiet_libraries(with_models: bool = True) -> None:
    """Silence start-up chatter of Lightning, transformers and datasets; their warnings and errors still show.

    Of several processes, only the main one prints more than errors.

    Args:
        with_models: whether the command loads models, and so transformers.
    """
    # By their full names: Lightning sets the levels of the packages above when it is imported.
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
    """Whether bars are drawn: on the main process, on a terminal, and not in CI, which keeps every line of a log."""
    return launched_as() == 0 and sys.stderr.isatty() and not os.environ.get("CI")


def progress(items: Iterable[Item], what: str, unit: str) -> Iterable[Item]:
    """The items, with a bar on stderr while they are gone through.

    Args:
        items: with a length, so that the bar knows how much is left.
        what: is being done.
        unit: of the items, in the singular.
    """
    from tqdm import tqdm

    bar: Iterable[Item] = tqdm(
        items, desc=what, unit=f" {unit}", leave=False, disable=not shows_progress(), dynamic_ncols=True
    )
    return bar


@contextmanager
def library_bars() -> Iterator[None]:
    """Within it transformers shows its bars for weights that are read and written, where bars are drawn at all."""
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
    """Within it torch computes on one thread, unless ``OMP_NUM_THREADS`` says otherwise.

    A model of the embedded task's size is no faster on several, and many times slower where they wait for each other
    on busy cores.
    """
    import torch

    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
