"""Loading a policy's config, tokenizer and model, with errors that say what to do."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from moa_lightning.chat import check_template
from moa_lightning.errors import UserError
from moa_lightning.models.config import PolicyConfig
from moa_lightning.models.skeleton import Skeleton, UnsuitedError, skeleton
from moa_lightning.utils.pretrained import open_pretrained, open_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_config(policy: PolicyConfig) -> "PretrainedConfig":
    """Load the config of the model, or of an adapter's base model. It is cheap: mistakes show before weights load."""
    from transformers import AutoConfig

    if not policy.is_adapter:
        config: PretrainedConfig = _open(policy, AutoConfig, "model config")
        _check_sizes(config, policy.path)
        return config
    base = _base_of(policy)
    try:
        config = open_pretrained(AutoConfig, base, "model config", trust_remote_code=policy.trust_remote_code)
    except UserError as error:
        raise UserError(f"policy.path: the adapter in '{policy.path}' is for the base model {error}") from error
    _check_sizes(config, base)
    return config


def _check_sizes(config: "PretrainedConfig", path: str) -> None:
    """Refuse a damaged config, from which transformers would build a model without layers."""
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
        size = getattr(config.get_text_config(), name, 1)
        if isinstance(size, int) and size < 1:
            own = getattr(config, "attribute_map", {}).get(name, name)
            raise UserError(f"policy.path: the config.json of '{path}' has {own} {size}; it must be at least 1")


def load_tokenizer(policy: PolicyConfig) -> "PreTrainedTokenizerBase":
    """Load the policy's tokenizer. It pads on the left and has a padding token."""
    try:
        tokenizer: PreTrainedTokenizerBase = open_tokenizer(policy.path, **policy.hub_arguments())
    except UserError as error:
        raise UserError(f"policy.path: {error}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {policy.path} has no eos_token; responses could never end. Set one there")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if policy.chat_template is not None:
        tokenizer.chat_template = policy.chat_template
        check_template(tokenizer)
    return tokenizer


def load_model(policy: PolicyConfig) -> "PreTrainedModel":
    """Load the causal language model, with a PEFT adapter if the config asks for one or the folder holds one."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    check_quantization(policy)
    arguments: dict[str, Any] = {"dtype": policy.dtype, **policy.options}
    if policy.attn_implementation is not None:
        arguments["attn_implementation"] = policy.attn_implementation
    if policy.quantization is not None:
        arguments["quantization_config"] = BitsAndBytesConfig(**policy.quantization)
    model: Any
    if policy.is_adapter:
        base = _base_of(policy)
        arguments["trust_remote_code"] = policy.trust_remote_code
        try:
            model = open_pretrained(AutoModelForCausalLM, base, "causal language model", **arguments)
        except UserError as error:
            raise UserError(f"policy.path: the adapter in '{policy.path}' is for the base model {error}") from error
    else:
        model = _open(policy, AutoModelForCausalLM, "causal language model", **arguments)
    _ready(model, policy)
    return _with_adapter(model, policy)


def load_skeleton(policy: PolicyConfig) -> "tuple[PreTrainedModel, Skeleton]":
    """Build the model of :func:`load_model` on the meta device. An adapter has real weights.

    Returns:
        The model with its adapter, and the skeleton that fills the model's weights.

    Raises:
        UnsuitedError: this model cannot be read shard by shard; use :func:`load_model`.
    """
    from transformers import AutoModelForCausalLM

    check_quantization(policy)
    if policy.quantization is not None:
        raise UnsuitedError("it is quantised while it is loaded")
    if policy.options:
        raise UnsuitedError(f"policy.options ({', '.join(policy.options)}) are for from_pretrained")
    if policy.lora is not None and (policy.lora.modules_to_save or policy.lora.options):
        raise UnsuitedError("its adapter may start from the model's weights (policy.lora.modules_to_save or options)")
    adapter: Any = None
    if policy.is_adapter:
        from peft import PeftConfig

        adapter = _open(policy, PeftConfig, "PEFT adapter")
        if adapter.modules_to_save or getattr(adapter, "use_dora", False):
            raise UnsuitedError("its adapter changes whole layers (modules_to_save, DoRA)")
    arguments: dict[str, Any] = {"trust_remote_code": policy.trust_remote_code}
    if policy.attn_implementation is not None:
        arguments["attn_implementation"] = policy.attn_implementation
    path, revision = (_base_of(policy), None) if policy.is_adapter else (policy.path, policy.revision)
    meta_model = skeleton(AutoModelForCausalLM, path, load_config(policy), policy.dtype, revision, **arguments)
    _ready(meta_model.model, policy)
    with meta_model.placeholder_weights():
        model = _with_adapter(meta_model.model, policy)
    if (
        any(parameter.is_meta and parameter.requires_grad for parameter in model.parameters())
        and model is not meta_model.model
    ):
        raise UnsuitedError("its adapter trains weights of the model itself")
    return model, meta_model


def check_quantization(policy: PolicyConfig) -> None:
    """Refuse quantised weights without an adapter.

    Raises:
        UserError: says what to set.
    """
    if policy.quantization is not None and policy.lora is None and not policy.is_adapter:
        raise UserError("policy.quantization needs policy.lora: quantised weights cannot be trained themselves")


def _ready(model: Any, policy: PolicyConfig) -> None:
    # Before the adapter is added: it keeps its own dropout, and must not be frozen with the quantised weights.
    if policy.disable_dropout:
        disable_dropout(model)
    if policy.quantization is not None:
        from peft import prepare_model_for_kbit_training

        prepare_model_for_kbit_training(model, use_gradient_checkpointing=policy.gradient_checkpointing)
    elif policy.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()


def _with_adapter(model: Any, policy: PolicyConfig) -> "PreTrainedModel":
    if policy.is_adapter:
        model = _open_adapter(model, policy)
    elif policy.lora is not None:
        model = _add_adapter(model, policy)
    return model  # type: ignore[no-any-return]  # a PeftModel forwards attributes to the model inside it


def disable_dropout(model: Any) -> None:
    """Set every dropout of a module to 0, in place: dropout layers, and the numbers that attention layers hold."""
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        for name, value in vars(layer).items():
            if "dropout" in name and isinstance(value, float):
                setattr(layer, name, 0.0)


def _add_adapter(model: "PreTrainedModel", policy: PolicyConfig) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    assert policy.lora is not None
    lora = policy.lora
    options = dict(lora.options)
    # GPT-2's layers hold their weights transposed. Without this option peft guesses it and warns.
    options.setdefault("fan_in_fan_out", any(isinstance(layer, Conv1D) for layer in model.modules()))
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        task_type="CAUSAL_LM",
        **options,
    )
    _check_saved_modules(model, lora.modules_to_save or ())
    with _without_peft_noise():
        try:
            return get_peft_model(model, config)
        except Exception as error:  # names of layers that the model does not have, or options of the wrong type
            if not isinstance(error, ValueError) and not lora.options:
                raise
            reason = " ".join(str(error).split())
            raise UserError(f"policy.lora does not fit {type(model).__name__}: {reason}") from error


def _check_saved_modules(model: "PreTrainedModel", names: Sequence[str]) -> None:
    """Refuse ``modules_to_save`` that the model does not have: peft ignores them silently."""
    layers = [name for name, _ in model.named_modules() if name]
    for wanted in names:
        if not any(name.endswith(wanted) for name in layers):  # how peft compares them
            near = get_close_matches(wanted, {name.rpartition(".")[2] for name in layers}, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"policy.lora.modules_to_save: {type(model).__name__} has no layer '{wanted}'{hint}")


def _base_of(policy: PolicyConfig) -> str:
    """The base model that an adapter was trained on, by folder or hub id."""
    from peft import PeftConfig

    config: Any = _open(policy, PeftConfig, "PEFT adapter")
    if config.is_prompt_learning:
        raise UserError(
            f"policy.path: '{policy.path}' holds a {config.peft_type.value} adapter, which puts tokens before the "
            "prompt; only adapters of layers (LoRA and its relatives) can be trained"
        )
    return policy.base or str(config.base_model_name_or_path)


def _open_adapter(model: "PreTrainedModel", policy: PolicyConfig) -> Any:
    from peft import PeftModel

    with _without_peft_noise():
        try:
            return PeftModel.from_pretrained(model, str(Path(policy.path).expanduser()), is_trainable=True)
        except Exception as error:  # a broken file makes peft raise anything, over several lines
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"policy.path: '{policy.path}' does not open as a PEFT adapter: {reason}") from error


@contextmanager
def _without_peft_noise() -> Iterator[None]:
    # peft 0.21 uses a name that transformers 5.23 deprecates. Users cannot act on that warning.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def _open(policy: PolicyConfig, auto_class: Any, what: str, **arguments: Any) -> Any:
    try:
        return open_pretrained(auto_class, policy.path, what, **policy.hub_arguments(), **arguments)
    except UserError as error:
        raise UserError(f"policy.path: {error}") from error
