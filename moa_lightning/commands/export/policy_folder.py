"""Writing a policy in the layout that transformers, peft and vLLM read.

vLLM's is that of transformers, but for three things (its 0.11 and after): it reads every ``.safetensors`` in a folder
unless an index names the model's, takes no adapter with whole layers or biases, and takes what the generation config
says for the default of every request.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from moa_lightning import __version__
from moa_lightning.chat import end_tokens
from moa_lightning.commands.export.model_card import Exported, card
from moa_lightning.commands.export.run_folder import RunFolder, Saved
from moa_lightning.commands.run_summary import in_values
from moa_lightning.errors import UserError
from moa_lightning.models import PolicyConfig, ValueHeads
from moa_lightning.models.loading import load_model, load_tokenizer
from moa_lightning.models.policy import RECORD
from moa_lightning.models.value_heads import FILE_NAME
from moa_lightning.utils.console import library_bars, shows_progress
from moa_lightning.utils.masking import masked
from moa_lightning.utils.non_finite import NonFiniteError, names_of_non_finite, some

_ADAPTER, _ADAPTER_WEIGHTS, _MODEL = "adapter_config.json", "adapter_model.safetensors", "model.safetensors"
_EXACT = {torch.float32: 1e-3, torch.float64: 1e-3}  # largest relative change of a logit by merging; coarser below


class Export:
    """One policy on its way out of a run.

    Args:
        run: where it lies.
        saved: a checkpoint in place of ``policy/``.
        base: the base model in place of the one that is named there.
        dtype: of the weights; ``auto`` is the run's.
    """

    def __init__(self, run: RunFolder, saved: Saved | None, base: str | None, dtype: str) -> None:
        self.run, self.saved, self.base, self.dtype = run, saved, base, dtype
        recorded = saved.summary if saved is not None else run.summary() or run.record()
        self.facts, lacks = in_values(recorded, run.settings)
        if run.settings:
            self.facts = {**_seeds(run.settings), **self.facts}
        self.notes = [f"the run {lack}" for lack in lacks]  # for whoever asked
        self._model: Any = None  # an adapter that lies there already is left as it is
        self._config = self._policy_config()
        self._tokenizer: Any = None
        if saved is None and run.continued:
            self.notes.append(f"{run.policy} is of step {run.record()['steps']}; --checkpoint=last takes a later one")

    def load(self, merge: bool) -> None:
        """Open the model, unless an adapter is only copied, and merge its adapter if asked to.

        Raises:
            UserError: it or its base model does not open, the checkpoint is of another policy, or merging would
                change it.
        """
        self._tokenizer = self._found(load_tokenizer)
        if self.saved is None and self._config.is_adapter and not merge:
            assert self.run.policy is not None
            if bad := names_of_non_finite(load_file(self.run.policy / _ADAPTER_WEIGHTS)):
                raise NonFiniteError(
                    f"the adapter's weights are not finite ({some(bad)}); export an earlier one with --checkpoint=last"
                )
            return
        with library_bars():
            self._model = self._found(load_model).eval()
        if self.saved is not None:
            self._restore(self.saved)
        if bad := names_of_non_finite(dict(self._model.named_parameters())):
            raise NonFiniteError(
                f"the policy's weights are not finite ({some(bad)}); export an earlier one with --checkpoint=last"
            )
        if merge and hasattr(self._model, "peft_config"):
            self._model, change = merged(self._model)
            self.facts["merge_change"] = change
            self.notes.append(f"adapter merged: logits change by up to {change:.1e} of the largest, by rounding")
            if self.run.quantized:
                self.notes.append(
                    "the run's base model was quantised; the adapter is merged into the weights before that"
                )

    def size(self) -> int:
        """Bytes that the weights take as files."""
        if self._model is None:
            assert self.run.policy is not None
            return (self.run.policy / _ADAPTER_WEIGHTS).stat().st_size
        width = None if self.dtype == "auto" else getattr(torch, self.dtype).itemsize
        adapter = hasattr(self._model, "peft_config")
        parameters = [p for p in self._model.parameters() if p.requires_grad or not adapter]
        return sum(p.numel() * (width or p.element_size()) for p in parameters)

    def write(self, target: Path, name: str, max_shard_size: str, value_heads: bool) -> None:
        """Write everything.

        Args:
            target: folder.
            name: that it will have.
            max_shard_size: of a weight file.
            value_heads: write them too.
        """
        model, own = self._model, None
        if model is None:
            assert self.run.policy is not None
            copy_adapter(self.run.policy, target, self.dtype)
        else:
            own = (model.get_base_model() if hasattr(model, "peft_config") else model).generation_config
            write_model(model, target, self.dtype, max_shard_size)
        base, adapter = self._start(), None
        if (target / _ADAPTER).is_file():
            adapter = name_base(target, self.base)
            base = str(adapter["base_model_name_or_path"])
            own = own or _generation_of(base)
        self._tokenizer.save_pretrained(target)
        write_generation(target, own, self.run, self._tokenizer)
        heads = value_heads and write_heads(target, self.run.policy, self.saved)
        dtype = self.dtype if self.dtype != "auto" else str(getattr(model, "dtype", self.run.dtype)).split(".")[-1]
        self.facts |= {
            "format": "adapter" if adapter else "model",
            "base_model": base and shareable(base),
            "dtype": dtype,
            "value_heads": heads,
            "moa_lightning": __version__,
        }
        (target / RECORD).write_text(json.dumps(self.facts, indent=2) + "\n", encoding="utf-8")
        if picture := (self.saved is None and (self.run.folder / "front.png").is_file()):
            shutil.copy(self.run.folder / "front.png", target / "front.png")
        if self.run.settings:
            (target / "config.yaml").write_text(
                yaml.safe_dump(shareable(dict(self.run.settings)), sort_keys=False), encoding="utf-8"
            )
        text = card(Exported(name, base, adapter, dtype, self.facts, shareable(self.run.settings), picture))
        (target / "README.md").write_text(text, encoding="utf-8")

    def _policy_config(self) -> PolicyConfig:
        """Where the model and its tokenizer are opened."""
        if self.saved is not None:
            return self.run.policy_config(self.base)
        found = PolicyConfig(str(self.run.policy), dtype="auto")
        if found.is_adapter and self.run.settings:  # the base is read again, as the run read it
            found = replace(self.run.policy_config(None), path=found.path, lora=None, revision=None)
        return replace(found, base=self.base) if found.is_adapter else found

    def _start(self) -> str | None:
        """What the run started from."""
        path: str | None = self.base or self.run.settings.get("model", {}).get("policy", {}).get("path")
        return path

    def _found(self, load: Callable[[PolicyConfig], Any]) -> Any:
        try:
            return load(self._config)
        except UserError as error:
            moved = self.saved is not None or "for the base model" in str(error)
            hint = "; if what the run started from has moved, give it with --base=PATH" if moved else ""
            raise UserError(f"{error}{hint}") from error

    def _restore(self, saved: Saved) -> None:
        """Put the checkpoint's weights in place of those that the run started with."""
        own = self._model.state_dict()
        trained = {name for name, p in self._model.named_parameters(remove_duplicate=False) if p.requires_grad}
        weights = {k.removeprefix("backbone."): v for k, v in saved.weights.items() if k.startswith("backbone.")}
        problems = [
            *((name, "has no place in") for name in weights if name not in own),
            *((name, "is missing for") for name in trained if name not in weights),
            *((name, "has another shape than in") for name, v in weights.items() if own.get(name, v).shape != v.shape),
        ]
        if problems:
            name, problem = min(problems)
            raise UserError(
                f"the checkpoint is not of the policy that '{self.run.config}' describes: weight '{name}' {problem} "
                f"'{self._start()}'; give what the run started from with --base=PATH"
            )
        self._model.load_state_dict(weights, strict=False)


def shareable(settings: Any) -> Any:
    """A copy of settings for people elsewhere: no secrets, no arguments of the hub, of local paths the last part.

    >>> shareable({"policy": {"path": "/home/me/base", "options": {"token": "abc"}}, "seed": 1})
    {'policy': {'path': 'base', 'options': {}}, 'seed': 1}
    """
    if isinstance(settings, Mapping):
        of_hub = {"options"} if "path" in settings else set()
        return {key: {} if key in of_hub else shareable(value) for key, value in masked(settings).items()}
    if isinstance(settings, list):
        return [shareable(value) for value in settings]
    is_local = isinstance(settings, str) and "\n" not in settings and Path(settings).expanduser().is_absolute()
    return Path(settings).name if is_local else settings


def _seeds(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The seeds in ``config.yaml``, by their names in ``summary.json``."""
    data, model = settings.get("data") or {}, settings.get("model") or {}
    return {
        "seed": settings.get("seed_everything"),
        "data_seed": (data.get("init_args") or {}).get("seed"),
        "model_seed": model.get("seed"),
    }


def merged(model: Any) -> tuple[Any, float]:
    """The model with its adapter folded in, and the largest change of a logit that this made, relative to the largest.

    Raises:
        UserError: it would be another policy.
    """
    config, layers = (
        model.get_base_model().config,
        (
            model.get_base_model().get_input_embeddings(),
            model.get_base_model().get_output_embeddings(),
        ),
    )
    if getattr(config.get_text_config(), "tie_word_embeddings", False) and any(
        name.rpartition(".")[2] not in {"weight", "bias"} or "lora" in name
        for layer in layers
        for name, _ in layer.named_parameters()
        if "." in name
    ):
        raise UserError(
            "the adapter is on an embedding that is the output layer as well: merged, it would change both; export it "
            "with --merge=false"
        )
    before = _logits(model)
    result = model.merge_and_unload(progressbar=shows_progress())
    after = _logits(result)
    change = float((after - before).abs().max() / before.abs().max())
    if not change <= _EXACT.get(result.dtype, 0.1):
        raise UserError(
            f"merging this adapter changes the policy (a logit by {change:.1%}); export it with --merge=false"
        )
    return result, change


def write_model(model: Any, target: Path, dtype: str, max_shard_size: str) -> None:
    """Write a whole model, or a PEFT model's adapter."""
    if dtype != "auto":
        model.to(getattr(torch, dtype))
    with library_bars():
        if hasattr(model, "peft_config"):
            model.save_pretrained(target)
        else:
            model.save_pretrained(target, max_shard_size=max_shard_size)


def copy_adapter(source: Path, target: Path, dtype: str) -> None:
    """Write an adapter that lies there already, without its base model."""
    shutil.copy(source / _ADAPTER, target / _ADAPTER)
    if dtype == "auto":
        shutil.copy(source / _ADAPTER_WEIGHTS, target / _ADAPTER_WEIGHTS)
        return
    weights = {name: value.to(getattr(torch, dtype)) for name, value in load_file(source / _ADAPTER_WEIGHTS).items()}
    save_file(weights, target / _ADAPTER_WEIGHTS, metadata={"format": "pt"})


def name_base(target: Path, base: str | None) -> dict[str, Any]:
    """Let an adapter name its base model so that it is found from any folder; the adapter's config then."""
    config: dict[str, Any] = json.loads((target / _ADAPTER).read_text(encoding="utf-8"))
    named = base or str(config["base_model_name_or_path"])
    config["base_model_name_or_path"] = str(Path(named).absolute()) if Path(named).is_dir() else named
    (target / _ADAPTER).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return config


def write_generation(target: Path, own: GenerationConfig | None, run: RunFolder, tokenizer: Any) -> None:
    """Write ``generation_config.json``: how the run sampled, and what the base model says beside it.

    Args:
        target: folder.
        own: the base model's.
        run: with the source that sampled; one that does not sample changes nothing.
        tokenizer: with the tokens that end and pad; a base model's further end tokens stay.
    """
    source = run.settings.get("model", {}).get("source", {}).get("init_args", {})
    sampling = {name: source[name] for name in ("temperature", "top_k", "top_p", "max_new_tokens") if name in source}
    if "max_new_tokens" in sampling:
        sampling["do_sample"] = True
    own = own or GenerationConfig()
    several = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = list(dict.fromkeys(i for i in (*end_tokens(tokenizer), *several) if i is not None))
    ids = {"eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": tokenizer.pad_token_id}
    known = {k: v for k, v in own.to_diff_dict().items() if k not in {"_from_model_config", "transformers_version"}}
    GenerationConfig(**{**known, **sampling, **ids}).save_pretrained(target)


def _generation_of(base: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(base)
    except (OSError, ValueError):  # it has none, or is not here: an adapter is exported without it
        return None


def write_heads(target: Path, found: Path | None, saved: Saved | None) -> bool:
    """Write the value heads, if there are any; with an index of the model's weights, so that nobody takes these in."""
    if saved is not None:
        state: dict[str, Tensor] = {
            k.removeprefix("value_heads."): v for k, v in saved.weights.items() if k.startswith("value_heads.")
        }
        if not state:
            return False
        ValueHeads(next(iter(state.values())).shape[-1], saved.objectives).save(target, state)
    elif found is not None and (found / FILE_NAME).is_file():
        shutil.copy(found / FILE_NAME, target / FILE_NAME)
    else:
        return False
    if (target / _MODEL).is_file():
        with safe_open(target / _MODEL, framework="pt") as weights:
            names = list(weights.keys())
        index = {
            "metadata": {"total_size": (target / _MODEL).stat().st_size},
            "weight_map": dict.fromkeys(names, _MODEL),
        }
        (target / f"{_MODEL}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return True


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    text = model.config.get_text_config()
    count = min(16, int(getattr(text, "max_position_embeddings", None) or 16))
    ids_BL = torch.arange(2 * count).remainder(text.vocab_size).view(2, count)
    logits: Tensor = model(input_ids=ids_BL, use_cache=False).logits.float()
    return logits
