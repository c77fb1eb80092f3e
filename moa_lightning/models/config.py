"""Configuration of the policy: what to load, and how."""

from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from moa_lightning.errors import UserError


@dataclass
class LoRA:
    """A PEFT LoRA adapter; the names are peft's.

    Args:
        r: rank.
        lora_alpha: scaling numerator.
        lora_dropout: dropout on the adapter's input.
        target_modules: names of the layers to adapt, or ``all-linear``; ``None`` uses peft's choice for the model.
        modules_to_save: layers that are trained and saved in full, besides the adapter.
        options: any other field of ``peft.LoraConfig``.
    """

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse fields out of range."""
        for name in ("r", "lora_alpha"):
            if getattr(self, name) < 1:
                raise UserError(f"policy.lora.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"policy.lora.lora_dropout must lie in [0, 1), got {self.lora_dropout}")
        if self.options:
            self._check_options()

    def _check_options(self) -> None:
        from peft import LoraConfig  # a slow import that few runs need

        own = {field.name for field in fields(self)}
        known = {field.name for field in fields(LoraConfig) if field.init} - own - {"task_type"}
        for name in self.options:
            if name == "task_type":
                raise UserError("policy.lora.options holds 'task_type', which is always CAUSAL_LM here; remove it")
            if name in own:
                raise UserError(f"policy.lora.options holds '{name}', which is set elsewhere; use policy.lora.{name}")
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise UserError(f"policy.lora.options: peft.LoraConfig has no field '{name}'{hint}")
        try:
            LoraConfig(**self.options)
        except Exception as error:  # peft raises errors of any type for bad values
            raise UserError(f"policy.lora.options: {' '.join(str(error).split())}") from error


@dataclass
class PolicyConfig:
    """The policy: any causal language model that ``AutoModelForCausalLM`` loads.

    Args:
        path: folder or hub id. Value heads saved there for the same objectives are restored.
        lora: train this adapter instead of all weights; ``None`` is full fine-tuning. If the folder already holds an
            adapter, training continues with that adapter.
        base: base model (folder or hub id) for a folder that holds an adapter; ``None`` is the one that the adapter
            names.
        dtype: of the weights; ``auto`` is the checkpoint's.
        quantization: fields of ``transformers.BitsAndBytesConfig`` (such as ``load_in_4bit: true``); needs ``lora``.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        attn_implementation: passed to transformers (``sdpa``, ``flash_attention_2``, …).
        chat_template: Jinja text that replaces the tokenizer's template. Responses end with the template's end-of-turn
            token, or with the tokenizer's end token if it has none.
        disable_dropout: set every dropout of the loaded model to 0 (an adapter keeps its ``lora_dropout``), so that
            the policy's ratio to itself is exactly 1.
        trust_remote_code: run code that comes with the checkpoint.
        revision: branch, tag or commit on the hub.
        options: any other argument of ``from_pretrained``.
    """

    path: str
    lora: LoRA | None = None
    base: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    quantization: dict[str, Any] | None = None
    gradient_checkpointing: bool = False
    attn_implementation: str | None = None
    chat_template: str | None = None
    disable_dropout: bool = True
    trust_remote_code: bool = False
    revision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds a PEFT adapter."""
        return (Path(self.path) / "adapter_config.json").is_file()

    def hub_arguments(self) -> dict[str, Any]:
        """Arguments that all ``from_pretrained`` calls for this policy share."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
