"""Models on the meta device, and reading their shards from files: no process ever holds such a model unsharded."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moa_lightning.distributed.shards import fill_shard
from moa_lightning.errors import UserError
from moa_lightning.utils.console import progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class UnsuitedError(Exception):
    """A model cannot be read shard by shard; the message says why."""


# Why not HuggingFaceStorageReader of torch.distributed.checkpoint (read in torch 2.13): it finds a tensor by one name.
# Files hold tied weights once, and a base model without the prefix of its head or with it; `_name_in` looks names up,
# and a weight that no file holds is found before memory is taken. That reader also opens every safetensors
# file of a folder, such as an adapter's beside the model. With the names known, a read is a slice of a file.
class WeightFiles:
    """The safetensors files of a checkpoint, opened when they are first read.

    Args:
        path: folder or hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        UnsuitedError: there are none, or one is missing or damaged.
    """

    def __init__(self, path: str, revision: str | None = None) -> None:
        from transformers.utils.hub import cached_file

        def found(name: str) -> Path | None:
            try:
                file = cached_file(
                    str(Path(path).expanduser()) if Path(path).is_dir() else path, name, revision=revision
                )
            except OSError:
                return None
            return None if file is None else Path(file)

        one, index = found(_ONE_FILE), None
        if one is None:
            index = found(_INDEX)
        if one is not None:
            self._files = dict.fromkeys(_opened(one).keys(), one)
        elif index is not None:
            names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: found(name) for name in set(names.values())}
            if missing := sorted(name for name, file in files.items() if file is None):
                raise UnsuitedError(f"{missing[0]} is missing")
            self._files = {key: file for key, name in names.items() if (file := files[name]) is not None}
        else:
            raise UnsuitedError("its weights are not in safetensors files")
        self._opened: dict[Path, Any] = {}

    def __contains__(self, key: str) -> bool:
        """Whether the files hold a tensor of this name."""
        return key in self._files

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._slice(key).get_shape())

    def rows(self, key: str, first: int, last: int) -> Tensor:
        """The rows first <= i < last of a tensor; nothing else of it is read."""
        rows: Tensor = self._slice(key)[first:last]
        return rows

    def tensor(self, key: str) -> Tensor:
        """All rows of a tensor."""
        tensor: Tensor = self._open(key).get_tensor(key)
        return tensor

    def close(self) -> None:
        """Close the files."""
        self._opened.clear()

    def _slice(self, key: str) -> Any:
        return self._open(key).get_slice(key)

    def _open(self, key: str) -> Any:
        file = self._files[key]
        if file not in self._opened:
            self._opened[file] = _opened(file)
        return self._opened[file]


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UnsuitedError(f"{file.name} does not open: {error}") from error


@dataclass
class Skeleton:
    """A model whose parameters are on the meta device, with the name of each parameter in its files.

    It identifies a parameter by the module that holds it: that object stays the same when adapters wrap it and when it
    is sharded.

    Args:
        model: the model; its buffers are real.
        places: module, attribute and name in the files. The places of tied weights share one name.
        files: the files to read.
    """

    model: "PreTrainedModel"
    places: list[tuple[nn.Module, str, str]]
    files: WeightFiles

    @contextmanager
    def placeholder_weights(self) -> Iterator[None]:
        """Context manager: parameters appear to be on the CPU, but take no memory.

        Adapters that are created in it get the device and the random numbers that they would get with real weights.
        """
        self._replace(lambda parameter: torch.empty((), dtype=parameter.dtype).expand(parameter.shape))
        try:
            yield
        finally:
            self._replace(lambda parameter: torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))

    def _replace(self, make: Callable[[Tensor], Tensor]) -> None:
        made: dict[int, nn.Parameter] = {}
        for module, attribute, _ in self.places:
            old = module._parameters[attribute]
            assert old is not None
            if id(old) not in made:
                made[id(old)] = nn.Parameter(make(old), requires_grad=old.requires_grad)
            module._parameters[attribute] = made[id(old)]

    @torch.no_grad()
    def fill(self, what: str) -> None:
        """Read this process's shards from the files. The model has been sharded, and its shards have memory.

        Args:
            what: name of the model, for the progress bar and the error.

        Raises:
            UserError: a file is gone or truncated.
        """
        try:
            self._read(what)
        except (UnsuitedError, SafetensorError, OSError) as error:
            raise UserError(f"the weights of the {what} cannot be read: {' '.join(str(error).split())}") from error
        finally:
            self.files.close()

    def _read(self, what: str) -> None:
        read: set[int] = set()
        for module, attribute, key in progress(self.places, f"loading {what}", "tensor"):
            parameter = module._parameters[attribute]
            assert parameter is not None and not parameter.is_meta
            if id(parameter) in read:
                continue
            read.add(id(parameter))
            fill_shard(parameter, partial(self.files.rows, key), partial(self.files.tensor, key))


def skeleton(
    auto_class: Any, path: str, config: "PretrainedConfig", dtype: str, revision: str | None = None, **arguments: Any
) -> Skeleton:
    """Build the model that ``auto_class.from_pretrained(path)`` gives, without its weights.

    Args:
        auto_class: one of transformers' ``AutoModelFor…`` classes.
        path: folder or hub id.
        config: the model's.
        dtype: of the weights; ``auto`` is the config's.
        revision: branch, tag or commit on the hub.
        arguments: for ``from_config``.

    Raises:
        UnsuitedError: the files do not hold the model's weights as they are, or transformers changes them while
            loading.
    """
    from transformers import GenerationConfig
    from transformers.conversion_mapping import get_model_conversion_mapping

    wanted = config.dtype if dtype == "auto" else getattr(torch, dtype)
    if wanted is None:
        raise UnsuitedError("its config does not say the dtype of its weights")
    with _parameters_on_meta():
        model = auto_class.from_config(config, dtype=wanted, **arguments)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsuitedError("it is quantised")
    if wanted != torch.float32 and (model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict):
        raise UnsuitedError("some of its layers stay in float32")
    if get_model_conversion_mapping(model, add_legacy=False):
        raise UnsuitedError("transformers rearranges its weights when it loads them")
    files = WeightFiles(path, revision)
    places = _places(model, files)
    for key, buffer in model.state_dict(keep_vars=True).items():  # persistent ones are in the files as well
        if not isinstance(buffer, nn.Parameter):
            name = _name_in(files, key, model)
            if name is None or files.shape(name) != tuple(buffer.shape):
                raise UnsuitedError(f"its files do not hold {key}")
            buffer.copy_(files.tensor(name))
    if model.can_generate():
        with suppress(OSError):  # without the file, the one that from_config made stays
            folder = Path(path).expanduser()
            where = str(folder) if folder.is_dir() else path
            model.generation_config = GenerationConfig.from_pretrained(where, revision=revision or "main")
    return Skeleton(model.eval(), places, files)


def _places(model: "PreTrainedModel", files: WeightFiles) -> list[tuple[nn.Module, str, str]]:
    names: dict[int, str] = {}
    found = [
        (module, attribute, parameter, f"{prefix}.{attribute}" if prefix else attribute)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for attribute, parameter in module._parameters.items()
        if parameter is not None
    ]
    for _, _, parameter, key in found:
        name = _name_in(files, key, model)
        if name is not None and files.shape(name) == tuple(parameter.shape):
            names.setdefault(id(parameter), name)  # the files hold tied weights once
    for _, _, parameter, key in found:
        if id(parameter) not in names:
            raise UnsuitedError(f"its files do not hold {key}, or with another shape")
    return [(module, attribute, names[id(parameter)]) for module, attribute, parameter, _ in found]


def _name_in(files: WeightFiles, key: str, model: "PreTrainedModel") -> str | None:
    """Name of a weight in the files. They may lack the prefix of the model inside the head, or add it."""
    prefix = f"{model.base_model_prefix}."
    return next((name for name in (key, key.removeprefix(prefix), prefix + key) if name in files), None)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Context manager: new modules have parameters on the meta device. Buffers stay real: files lack some of them."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied one stays the same object
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = without_memory  # type: ignore[assignment,method-assign]  # restored below
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]  # restored
