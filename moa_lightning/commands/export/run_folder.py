"""A run's folder, read again: its settings, its numbers, its policy, its checkpoints."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from moa_lightning.callbacks import ParetoFront
from moa_lightning.callbacks.constraints import BEST
from moa_lightning.callbacks.run_files import saved_means, start_and_end
from moa_lightning.commands.start_folder import RunPlace
from moa_lightning.distributed.shards import read_tensors
from moa_lightning.errors import UserError
from moa_lightning.models import LoRA, PolicyConfig
from moa_lightning.models.policy import RECORD
from moa_lightning.training.checkpoints import META, newest_valid, require_valid

_PART_OF_POLICY = "policy."
_TRUE_PRECISION = {"bf16-true": "bfloat16", "16-true": "float16"}


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds of a policy."""

    weights: dict[str, Tensor]  # those that were trained, by their names in the policy
    objectives: list[str]
    summary: dict[str, Any]  # as in summary.json


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, or a folder in Hugging Face format alone.

    Args:
        folder: as it was given.
        policy: where the policy lies in Hugging Face format, if it does.
        settings: ``config.yaml``; empty without one.
        config: its file.
    """

    folder: Path
    policy: Path | None
    settings: Mapping[str, Any]
    config: Path | None

    @classmethod
    def open(cls, given: str) -> "RunFolder":
        """Read what there is.

        Raises:
            UserError: there is no such folder, or it holds neither a policy nor checkpoints.
        """
        folder = Path(given).expanduser()
        policy = next((path for path in (folder / "policy", folder) if _is_model(path)), None)
        root = folder.absolute().parent if policy == folder and folder.name == "policy" else folder
        config = root / "config.yaml"
        settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
        run = cls(root if settings else folder, policy, settings, config if settings else None)
        if policy is None and not any(run.checkpoints.glob("*.ckpt")):
            raise UserError(
                f"'{given}' holds no policy and no checkpoint; give the folder of a run, or a Hugging Face folder"
            )
        return run

    @property
    def checkpoints(self) -> Path:
        """Where the run keeps its checkpoints, also after its folder was moved."""
        recorded = (self.settings.get("trainer") or {}).get("default_root_dir") or self.folder
        place = RunPlace(Path(recorded), (self.settings.get("checkpoint") or {}).get("dirpath"))
        return place.moved_to(self.folder).checkpoints

    def checkpoint(self, asked: str) -> Path:
        """``last`` is the newest whole one, ``best`` the one of callback ``Constraints``; anything else is a path.

        A path counts from here, from the run's folder, or from its checkpoints.

        Raises:
            UserError: there is none, or it is not whole.
        """
        folder = self.checkpoints
        if asked == "last":
            if (newest := newest_valid(folder)) is None:
                raise UserError(f"there is no whole checkpoint in '{folder}'")
            return newest
        if asked == "best" and not (folder / BEST).exists():
            raise UserError(f"there is no {BEST} in '{folder}'; runs with thresholds keep one")
        asked = BEST if asked == "best" else asked
        for path in (Path(asked).expanduser(), self.folder / asked, folder / asked):
            if path.exists():
                require_valid(path)
                return path
        names = ", ".join(sorted(path.name for path in folder.glob("*.ckpt"))) or "none"
        raise UserError(f"checkpoint '{asked}' does not exist; in '{folder}' there is {names}")

    def policy_config(self, base: str | None) -> PolicyConfig:
        """How the run loaded its policy, for a machine that need not have its accelerator.

        Args:
            base: in place of the folder or hub id that the run started from.

        Raises:
            UserError: there is no record of it.
        """
        if "model" not in self.settings:
            raise UserError(
                f"'{self.folder}' has no config.yaml, which says what the checkpoint is of; export its policy/ instead"
            )
        given = dict(self.settings["model"]["policy"])
        if base is not None:
            given["base" if PolicyConfig(given["path"]).is_adapter else "path"] = base
        # Weights are the same without these; the adapter of a quantised model goes onto the model itself.
        given |= {"attn_implementation": None, "quantization": None, "gradient_checkpointing": False}
        given["options"] = {
            k: v for k, v in (given.get("options") or {}).items() if k not in {"device_map", "max_memory"}
        }
        given["lora"] = LoRA(**given["lora"]) if given.get("lora") else None
        try:
            return PolicyConfig(**{**given, "dtype": self.dtype})
        except TypeError as error:
            raise UserError(f"'{self.config}' does not say how the policy is built: {error}") from error

    @property
    def dtype(self) -> Any:
        """Of the weights in the run; ``auto`` without a record."""
        precision = str(self.settings.get("trainer", {}).get("precision"))
        loaded = self.settings.get("model", {}).get("policy", {}).get("dtype", "auto")
        return _TRUE_PRECISION.get(precision, loaded)

    @property
    def quantized(self) -> bool:
        """Whether the run's base model was."""
        return bool(self.settings.get("model", {}).get("policy", {}).get("quantization"))

    def record(self) -> dict[str, Any]:
        """What the policy's folder says of it; empty if it was written without."""
        return _json(self.policy / RECORD) if self.policy is not None else {}

    @property
    def continued(self) -> bool:
        """Whether the run continued after ``policy/`` was written, so that its summary is of a later step."""
        return bool(_json(self.folder / "summary.json").get("steps", 0) > self.record().get("steps", math.inf))

    def summary(self) -> dict[str, Any]:
        """``summary.json``, if it is of the policy in ``policy/``."""
        return {} if self.continued else _json(self.folder / "summary.json")


def read_checkpoint(path: Path) -> Saved:
    """The trained weights in a checkpoint, and the numbers of its last evaluation. A file, or a sharded folder.

    Raises:
        UserError: it is none of an alignment.
    """
    whole = torch.load(path / META if path.is_dir() else path, mmap=True, map_location="cpu", weights_only=True)
    state = read_tensors(path, "state_dict.") if path.is_dir() else whole["state_dict"]
    if "moa" not in whole:
        raise UserError(f"checkpoint '{path}' is none of moa fit")
    moa, callbacks = whole["moa"], whole.get("callbacks", {})
    evaluated = callbacks.get("RunFiles", {})
    first, last = saved_means(evaluated.get("first", {})), saved_means(evaluated.get("last", {}))
    summary = {
        "combiner": moa["combiner"],
        "steps": int(whole["global_step"]),
        "seconds": evaluated.get("seconds"),
        "objectives": start_and_end(first, last),
        "evaluated_at": moa.get("evaluated_at"),
        "hypervolume": _hypervolume(callbacks.get("ParetoFront")),
    }
    constraints = callbacks.get("Constraints") or {}  # an earlier version left the thresholds with its best evaluation
    thresholds = constraints.get("thresholds") or (constraints.get("best") or {}).get("thresholds")
    if thresholds:
        summary["thresholds"] = thresholds
    weights = {k.removeprefix(_PART_OF_POLICY): v for k, v in state.items() if k.startswith(_PART_OF_POLICY)}
    return Saved(weights, list(moa["objectives"]), summary)


def _hypervolume(state: dict[str, Any] | None) -> dict[str, Any] | None:
    if not state or not state["points"]:
        return None
    front = ParetoFront()
    front.load_state_dict(state)
    return {"start": front.hypervolume(1), "end": front.hypervolume(), "reference": front.reference}


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found
