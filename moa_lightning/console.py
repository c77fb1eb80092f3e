"""What the commands print: our own lines, not those of the libraries below."""

import logging
import warnings

_NOT_FOR_USERS = (
    # Names that are deprecated one library further down.
    "`isinstance.treespec, LeafSpec.` is deprecated",
    "`is_gradient_checkpointing` is deprecated",
    # Advice on data loading workers: prompts and tokens are in memory already.
    ".*does not have many workers.*",
    # The frozen reference and adapters' base models are in evaluation mode on purpose.
    "Found .* in eval mode at the start of training",
)


def quiet_libraries() -> None:
    """Silence start-up chatter of Lightning, transformers and datasets; their warnings and errors still show."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message=message)

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
