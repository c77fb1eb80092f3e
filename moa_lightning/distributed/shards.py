"""Sharded parameters, in memory and in checkpoints."""

import errno
import math
import pickle
import warnings
from collections.abc import Callable, Collection
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem as dcp_files
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from moa_lightning.distributed.collectives import rank
from moa_lightning.errors import UserError

_IN_METADATA = {
    *(
        (dcp_metadata.__name__, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    (dcp_files.__name__, "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
"""Module and name of every global, apart from dtypes, that the index of a sharded checkpoint may refer to."""


def reshard(module: nn.Module) -> bool:
    """Reshard all FSDP modules in place. Returns whether there are any."""
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in sharded:  # the root keeps its parameters unsharded after a forward pass
        part.reshard()
    return bool(sharded)


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Unsharded state dict of a module. If it is sharded, every rank calls this and rank 0 gets it, in CPU memory."""
    if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return module.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_model_state_dict(module, options=options))  # type: ignore[arg-type]  # they are tensors


def full_tensor_on_first(tensor: Tensor) -> Tensor | None:
    """The all-gathered tensor, in the CPU memory of rank 0; ``None`` on the other ranks.

    Every rank calls it. A tensor that is not sharded is returned as it is, on every rank.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    gathered = tensor.full_tensor()
    return gathered.cpu() if rank() == 0 else None


class ShardReader(FileSystemReader):
    """Reads a sharded checkpoint without executing code from it.

    PyTorch's own reader unpickles the index (``.metadata``) without restrictions, so a crafted file can run any code.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index.

        Raises:
            ForeignContentError: it refers to something that does not belong in a checkpoint.
            pickle.UnpicklingError: it is damaged.
        """
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            try:
                found = _MetadataUnpickler(file).load()
            except (AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError) as error:
                raise pickle.UnpicklingError(f".metadata is damaged: {error}") from error
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f".metadata holds {type(found).__name__}, not the index of a checkpoint")
        found.storage_meta = getattr(found, "storage_meta", None) or dcp_metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class ForeignContentError(pickle.UnpicklingError):
    """A checkpoint refers to something that does not belong in one. None of its code was run."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """A class of the index, or a dtype. Refuses anything else: a pickle runs code by calling what it finds here."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _IN_METADATA:
            return super().find_class(module, name)
        raise ForeignContentError(f".metadata names {module}.{name}")


class _PlainLoadPlanner(DefaultLoadPlanner):
    """Loads values other than tensors, such as a learning rate, as plain data. PyTorch's own planner unpickles them."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        """Load one value.

        Raises:
            ForeignContentError: it is more than plain data.
        """
        plain = BytesIO()
        try:
            torch.save(torch.load(value, weights_only=True), plain)
        except pickle.UnpicklingError as error:
            raise ForeignContentError(f"'{read_item.dest_index.fqn}' is more than plain data") from error
        plain.seek(0)
        super().load_bytes(read_item, plain)


def _load(content: dict[str, Any], folder: Path, no_dist: bool = False) -> None:
    """Fill these tensors and values from a sharded checkpoint; each process reads its shards. In place.

    Raises:
        UserError: on every process, if a shard does not hold what the index says.
    """
    try:
        load(content, storage_reader=ShardReader(folder), planner=_PlainLoadPlanner(), no_dist=no_dist)
    except CheckpointException as error:
        first = " ".join(str(next(iter(error.failures.values()))[0]).split())[:200]
        raise UserError(f"checkpoint {folder} cannot be used: {first}") from error


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Unsharded tensors of a sharded checkpoint whose names start with a prefix. The prefix is removed.

    Runs in one process. It reads nothing else: two thirds of a training checkpoint are optimiser state.
    """
    known = ShardReader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(found.size, dtype=found.properties.dtype)
        for name, found in known.items()
        if name.startswith(prefix) and isinstance(found, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended
        _load(tensors, folder, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def local_shard(tensor: Tensor) -> Tensor:
    """The local shard of a tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Move an unsharded tensor to the device, dtype and sharding of another tensor."""
    if isinstance(other, DTensor):
        return distribute_tensor(tensor.to(other.device, other.dtype), other.device_mesh, other.placements)
    return tensor.to(other)


def stored_shards(folder: Path) -> list[tuple[str, str, int, int]]:
    """Name, file, offset and length (in bytes) of each shard of a sharded checkpoint."""
    stored = ShardReader(folder).read_metadata().storage_data
    return [(index.fqn, shard.relative_path, shard.offset, shard.length) for index, shard in stored.items()]


def stored_shapes(folder: Path, part: str) -> dict[str, torch.Size]:
    """Names and unsharded shapes of the tensors in one part of a sharded checkpoint."""
    stored = ShardReader(folder).read_metadata().state_dict_metadata
    return {
        name.removeprefix(f"{part}."): tensor.size
        for name, tensor in stored.items()
        if name.startswith(f"{part}.") and isinstance(tensor, TensorStorageMetadata)
    }


def save_shards(content: dict[str, Any], folder: Path) -> None:
    """Write a sharded checkpoint; each rank writes its shards.

    Raises:
        OSError: on every process, if one of them cannot write.
    """
    try:
        save(content, checkpoint_id=folder)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        # torch.save hides the system's error when a disk is full.
        raise (first if isinstance(first, OSError) else OSError(errno.EIO, "only a part of it was written")) from error


def load_shards(folder: Path, module: nn.Module, key: str, names: Collection[str]) -> None:
    """Load the weights of these names from a sharded checkpoint into a module; each rank reads its shards. In place."""
    weights = {name: weight for name, weight in get_model_state_dict(module).items() if name in names}
    _load({key: weights}, folder)
    set_model_state_dict(module, weights, options=StateDictOptions(strict=False))


def load_optimizer_shards(folder: Path, module: nn.Module, optimizer: Optimizer, key: str) -> None:
    """Load the optimiser state of a module from a sharded checkpoint; each rank reads its shards. In place."""
    state = get_optimizer_state_dict(module, optimizer)
    _load({key: state}, folder)
    set_optimizer_state_dict(module, optimizer, optim_state_dict=state)


def local_rows(tensor: DTensor) -> tuple[int, int]:
    """Half-open range of rows in the local shard of a tensor that is sharded along its first dimension."""
    first, last = 0, tensor.shape[0]
    for i, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0
            each = math.ceil(tensor.shape[0] / tensor.device_mesh.size(i))
            first = min(tensor.device_mesh.get_local_rank(i) * each, last)
            last = min(first + each, last)
    assert last - first == tensor.to_local().shape[0], "the shard has another size than expected"
    return first, last


def fill_shard(tensor: Tensor, read: Callable[[int, int], Tensor], read_all: Callable[[], Tensor]) -> None:
    """Fill a tensor, or its local shard, in place.

    Args:
        tensor: sharded or not.
        read: returns the rows first <= i < last.
        read_all: returns all rows.
    """
    if not isinstance(tensor, DTensor):
        tensor.copy_(read_all())
        return
    first, last = local_rows(tensor)
    if last > first:
        tensor.to_local().copy_(read(first, last))
