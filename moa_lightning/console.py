"""What the commands print: our own lines, not those of the libraries below."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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
    # An evaluation of a checkpoint does so in a folder of its own.
    "The dirpath has changed from",
)


def quiet_libraries() -> None:
    """Silence start-up chatter of Lightning, transformers and datasets; their warnings and errors still show."""
    # By their full names: Lightning sets the levels of the packages above when it is imported.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message=message)

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


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
