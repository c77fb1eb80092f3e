"""Checks that all processes have the same code, settings, policy and data, before any weights are loaded."""

import hashlib
import json
import os
import platform
import re
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moa_lightning import __version__
from moa_lightning.distributed import all_objects, is_distributed, rank
from moa_lightning.errors import UserError
from moa_lightning.models.loading import load_config
from moa_lightning.utils.console import is_main_process, without_progress_bars
from moa_lightning.utils.lightning_private import set_default_root_dir
from moa_lightning.utils.masking import masked

Facts = Mapping[str, str]
"""What must be equal on all processes, by its name in messages."""

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = ("torch", "lightning", "transformers", "tokenizers", "peft", "torchjd")
_VARIABLES = (  # they change results, or must be equal for the processes to communicate
    "PL_GLOBAL_SEED",
    "PYTHONHASHSEED",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "NCCL_ALGO",
    "NCCL_PROTO",
)
_OF_A_PROCESS = ("config", "trainer.default_root_dir")  # paths may differ between nodes; rank 0 decides the run folder
_OF_A_MODULE = ("combiner", "source", "loss", "kl", "reference", "seed", "value_learning_rate")
_OF_A_TRAINER = (
    "max_steps",
    "max_epochs",
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "val_check_interval",
)
_OF_DATA = ("batch_size", "val_batch_size", "seed")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_OF_A_POLICY = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py"}
_SMALL = 32 * 2**20  # bytes; up to this size the content of a file is compared, above it only the size
_LONGEST = 80  # characters of a value in a message


class SharedRefusal(UserError):
    """An error that every process raises with the same message, so that printing it once is enough."""

    shared = True


@contextmanager
def in_agreement(module: Any, stage: str) -> Iterator[None]:
    """Context manager: sets up a module; an error on one process, or a difference between them, is raised on all.

    In a single process it does nothing.

    Args:
        module: the module, attached to its Trainer. It has its tokenizer when the block ends.
        stage: the Trainer's.

    Raises:
        SharedRefusal: on every process, the same line: the process (rank and host) and its error, or its value and
            that of the others.
    """
    if not is_distributed():
        yield
        return
    if not is_main_process(rank()):
        without_progress_bars()
    error: Exception | None = None
    mine: Facts = {}
    try:
        yield
        mine = facts(module, stage)
    except Exception as caught:  # noqa: BLE001 (it is raised below, when the others know of it)
        error = caught
    host, said = socket.gethostname(), None if error is None else _line(error)
    everyone = all_objects((host, said, mine, module.trainer.default_root_dir))
    if error is not None and not isinstance(error, UserError | OSError):
        raise error  # a bug: keep its traceback
    hosts, lines, answers, folders = zip(*everyone, strict=True)
    refusal = failure(hosts, lines) or difference(hosts, answers)
    if refusal is not None:
        raise SharedRefusal(refusal) from error
    # Each process chose a free folder by itself, and may have chosen another one than rank 0.
    set_default_root_dir(module.trainer, folders[0])


def failure(hosts: Sequence[str], lines: Sequence[str | None]) -> str | None:
    """One line for the processes that failed, with their ranks; ``None`` if there are none.

    >>> failure(["a", "b"], [None, "file 'x' does not exist"])
    "rank 1 on host b: file 'x' does not exist"
    """
    failed = [number for number, line in enumerate(lines) if line is not None]
    if not failed:
        return None
    first = str(lines[failed[0]])
    alike = [number for number in failed if lines[number] == first]
    return first if len(alike) == len(lines) else f"{_who(alike, hosts)}: {first}"


def difference(hosts: Sequence[str], answers: Sequence[Facts]) -> str | None:
    """One line for the processes that differ from the majority, or from rank 0 if there is no majority.

    >>> difference(["a", "a", "b"], [{"seed": "1"}, {"seed": "1"}, {"seed": "2"}])
    'rank 2 on host b differs from the others in seed: 2 there, 1 elsewhere; start all with the same command and files'
    """
    names = dict.fromkeys(name for answer in answers for name in answer)
    odd: dict[str, tuple[list[int], str, str]] = {}
    for name in names:
        values = [answer.get(name, "nothing") for answer in answers]
        commonest, count = Counter(values).most_common(1)[0]
        usual = commonest if 2 * count > len(values) else values[0]
        strange = [number for number, value in enumerate(values) if value != usual]
        if strange:
            theirs = values[strange[0]]
            odd[name] = [number for number in strange if values[number] == theirs], theirs, usual
    if not odd:
        return None
    name, (ranks, theirs, usual) = next(iter(odd.items()))
    differs = "differ" if len(ranks) > 1 else "differs"
    others = [other for other in odd if other != name]
    more = f" (so do {len(others)} more, such as {others[0]})" if len(others) > 1 else ""
    more = f" (so does {others[0]})" if len(others) == 1 else more
    return (
        f"{_who(ranks, hosts)} {differs} from the others in {name}: {_short(theirs)} there, {_short(usual)} "
        f"elsewhere{more}; start all with the same command and files"
    )


def facts(module: Any, stage: str) -> dict[str, str]:
    """What must be equal on all processes: versions, settings, environment, policy and data, in this order."""
    data = getattr(module.trainer, "datamodule", None)
    found = _versions()
    given = {name: value for name, value in module.settings.items() if name not in _OF_A_PROCESS}
    found |= given or _settings(module, data)
    found |= {f"environment variable {name}": os.environ.get(name, "nothing") for name in _VARIABLES}
    found |= {f"policy {name}": value for name, value in _policy(module).items()}
    if data is not None:
        found |= {f"data {name} rows": fingerprint(rows) for name, rows in data.rows_to_check(stage).items()}
    return found


def flat(value: Any, name: str = "") -> dict[str, str]:
    """Flatten a config of plain data to dotted keys.

    >>> flat({"data": {"seed": 1, "files": ["a", "b"]}})
    {'data.seed': '1', 'data.files.0': 'a', 'data.files.1': 'b'}
    """
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if parts is None or not value:
        return {name: str(masked(value, name.rpartition(".")[2]))}
    found: dict[str, str] = {}
    for key, part in parts:
        found |= flat(part, f"{name}.{key}" if name else str(key))
    return found


def fingerprint(rows: Iterable[Mapping[str, Any]]) -> str:
    """The number of rows, and a digest that depends on their order but not on that of the columns."""
    digest, count = hashlib.blake2b(digest_size=6), 0
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=_plain).encode())
        digest.update(b"\n")
        count += 1
    return f"{count} with digest {digest.hexdigest()}"


def _settings(module: Any, data: Any) -> dict[str, str]:
    """Settings of a run that was started from Python, read from its objects."""
    found = {f"model.{name}": _plain(getattr(module, name)) for name in _OF_A_MODULE}
    found |= {f"model.objectives.{name}": _plain(objective) for name, objective in module.panel.objectives.items()}
    found |= {f"trainer.{name}": _plain(getattr(module.trainer, name)) for name in _OF_A_TRAINER}
    return found | {f"data.{name}": _plain(getattr(data, name)) for name in _OF_DATA if data is not None}


def _versions() -> dict[str, str]:
    found = {"the version of python": platform.python_version()}
    found |= {f"the version of {name}": version(name) for name in _LIBRARIES}
    found["the version of moa-lightning"] = __version__  # also for a source tree that is not installed
    found["the version of torch"] = torch.__version__  # includes the CUDA version of the build
    if torch.cuda.is_available():
        found["the version of CUDA"] = str(torch.version.cuda)
        found["the version of NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    source = hashlib.blake2b(digest_size=6)
    for path in sorted(_PACKAGE.rglob("*.py")) + sorted((_PACKAGE / "callbacks").rglob("*.py")):
        source.update(path.read_bytes())
    found["the source files of moa_lightning"] = f"digest {source.hexdigest()}"
    return found


def _policy(module: Any) -> dict[str, str]:
    config = json.dumps(load_config(module.policy_config).to_dict(), sort_keys=True, default=str)
    vocabulary = json.dumps(module.tokenizer.get_vocab(), sort_keys=True)
    folder = Path(module.policy_config.path).expanduser()
    files = sorted(path for path in folder.glob("*") if path.is_file() and path.suffix in _OF_A_POLICY)
    names = ", ".join(path.name for path in files)
    return {
        "config": f"digest {_digest(config.encode())}",
        "vocabulary": f"{len(module.tokenizer)} tokens with digest {_digest(vocabulary.encode())}",
        "settings": _plain(masked(asdict(module.policy_config))),
        "files": names,
        **{f"file {path.name}": _content(path) for path in files},
    }


def _content(path: Path) -> str:
    size = path.stat().st_size
    weights = path.suffix in {".safetensors", ".bin"} or size > _SMALL
    return f"{size} bytes" if weights else f"{size} bytes with digest {_digest(path.read_bytes())}"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=6).hexdigest()


def _plain(value: object) -> str:
    """``repr`` of an object, without memory addresses."""
    return _ADDRESS.sub("", repr(value))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError | OSError) else f"{type(error).__name__}: {text}"


def _who(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    named = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    where = list(dict.fromkeys(hosts[number] for number in ranks))
    places = ", ".join(where[:4]) + (f" and {len(where) - 4} more" if len(where) > 4 else "")
    return f"rank{'s' * (len(ranks) > 1)} {named} on host{'s' * (len(where) > 1)} {places}"


def _short(value: str) -> str:
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}…"
