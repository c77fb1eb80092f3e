"""``moa export``: a run's policy as a plain Hugging Face folder."""

import re
import shutil
from pathlib import Path
from typing import Literal

from moa_lightning.errors import UserError

_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]B", re.IGNORECASE)
_ROOM = 1.02  # of the weights' own size: tokenizer, card, index


def export(
    run: str,
    output: str,
    merge: bool = True,
    checkpoint: str | None = None,
    base: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    max_shard_size: str = "50GB",
    value_heads: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a run's policy so that plain transformers, peft and vLLM open it.

    The folder holds the weights as safetensors, the tokenizer with its chat template, generation_config.json with the
    run's sampling, a model card (README.md) with the objectives' numbers, the same for programs (moa.json), and the
    run's config.yaml. It appears when it is whole. Also written: moa export RUN OUTPUT.

    Args:
        run: folder of a run, or a policy folder itself.
        output: folder to write.
        merge: fold an adapter into its base model; otherwise the adapter alone is written.
        checkpoint: take the policy from this checkpoint: a path, 'last' for the newest, or 'best' for the one that
            reached all thresholds with the highest primary objective. Without, from policy/, and where a run was
            stopped before it wrote one, from the newest checkpoint.
        base: folder or hub id of the base model, where it is no longer what the run's config or the adapter names.
        dtype: of the weights; auto is that of the run, and any other rounds them.
        max_shard_size: size of a weight file, such as 5GB; larger models become several, with an index. An adapter is
            one file.
        value_heads: write the critics' heads as well: for training on, not for answering.
        overwrite: replace output if it holds something already.

    Raises:
        UserError: there is no policy in run, its base model is gone, the checkpoint is of another one, or output is
            in use or has no room.
    """
    from moa_lightning.commands.export.policy_folder import Export
    from moa_lightning.commands.export.run_folder import RunFolder, read_checkpoint
    from moa_lightning.utils.atomic_folder import atomic_folder, refuse_used

    refuse_used(output, overwrite)
    if not _SIZE.fullmatch(max_shard_size):
        raise UserError(f"max_shard_size must be a number with KB, MB, GB or TB, such as 5GB; got '{max_shard_size}'")
    folder = RunFolder.open(run)
    path = folder.checkpoint(checkpoint or "last") if checkpoint or folder.policy is None else None
    if path is not None and checkpoint is None:
        print(f"{run} holds no policy/: the run did not end. This is its newest checkpoint, {path.name}")
    saved = read_checkpoint(path) if path is not None else None
    done = Export(folder, saved, base, dtype)
    done.load(merge)
    for line in done.notes:
        print(line)
    _check_room(output, done.size())
    with atomic_folder(output, overwrite) as target:
        done.write(target, Path(output).name, max_shard_size, value_heads)
    print(f"policy written to {output}")


def _check_room(output: str, size: int) -> None:
    """Refuse a disk that is full already, before an hour is spent on writing."""
    there = next(folder for folder in Path(output).expanduser().absolute().parents if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < size * _ROOM:
        raise UserError(
            f"'{output}' needs {size * _ROOM / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB left; choose another "
            "folder, or a smaller --dtype"
        )
