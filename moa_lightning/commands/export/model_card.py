"""The model card of an exported policy: what it was aligned to, how, and how to load it."""

import html
import inspect
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from moa_lightning.commands.run_summary import verdict
from moa_lightning.errors import UserError
from moa_lightning.utils.import_path import import_dotted

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be, vLLM 0.11 and after


@dataclass(frozen=True)
class Exported:
    """What is known of an exported policy.

    Args:
        name: of the folder.
        base: what the run started from, by folder or hub id.
        adapter: ``adapter_config.json`` if the adapter was left as it is.
        dtype: of the weights.
        facts: as they go into ``moa.json``.
        settings: ``config.yaml``; empty without one.
        picture: the front lies beside the card.
    """

    name: str
    base: str | None
    adapter: Mapping[str, Any] | None
    dtype: str
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]
    picture: bool


def card(exported: Exported) -> str:
    """The text of ``README.md``, with a header that the Hugging Face hub reads."""
    combiner = exported.facts.get("combiner")
    kind = "adapter" if exported.adapter is not None else "finetune"
    base, licence = _base_and_licence(exported.base)
    header = ModelCardData(
        base_model=base,
        base_model_relation=kind if base else None,
        library_name="peft" if exported.adapter is not None else "transformers",
        license=licence,
        pipeline_tag="text-generation",
        tags=["multi-objective-alignment", "moa-lightning", *([str(combiner).lower()] if combiner else [])]
        + (["lora"] if exported.adapter is not None else []),
    )
    parts = [
        f"---\n{header.to_yaml()}\n---\n",
        f"# {plain(exported.name)}\n",
        *_objectives(exported),
        *_how(exported),
        *_use(exported),
    ]
    return "\n".join(parts)


def plain(text: str) -> str:
    r"""Text as it is, in Markdown that may stand in a table: no HTML, no column, no line of its own.

    >>> plain("a|<b>\nc")
    'a\\|&lt;b&gt; c'
    """
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def vllm_refuses(adapter: Mapping[str, Any]) -> list[str]:
    """What vLLM does not take in an adapter, or would leave out of it in silence."""
    problems = {
        "it is no LoRA adapter": adapter.get("peft_type") != "LORA",
        "it holds whole layers (modules_to_save)": bool(adapter.get("modules_to_save")),
        "it holds biases": adapter.get("bias", "none") != "none" or bool(adapter.get("lora_bias")),
        "it is a DoRA adapter": bool(adapter.get("use_dora")),
        f"its rank is above {_VLLM_RANKS[-1]}": int(adapter.get("r") or 0) > _VLLM_RANKS[-1],
        "it has ranks or scales of single layers": bool(adapter.get("rank_pattern") or adapter.get("alpha_pattern")),
    }
    return [problem for problem, found in problems.items() if found]


def spelled(node: Any, short: bool = False) -> str:
    """A part of a config in one line: classes by name, with their settings.

    Args:
        node: the part.
        short: leave out settings that have their default.

    Example:
        >>> init_args = {"granularity": "token", "noon": False}
        >>> spelled({"class_path": "moa_lightning.combiners.PAMA", "init_args": init_args}, short=True)
        'PAMA(noon=False)'
    """
    if isinstance(node, Mapping) and "class_path" in node:
        path = str(node["class_path"])
        defaults = _defaults(path) if short else {}
        given = {k: v for k, v in (node.get("init_args") or {}).items() if k not in defaults or v != defaults[k]}
        inside = ", ".join(f"{name}={spelled(value, short)}" for name, value in given.items() if value is not None)
        return f"{path.rpartition('.')[2]}({inside})" if inside else path.rpartition(".")[2]
    if isinstance(node, Mapping):
        return "{" + ", ".join(f"{name}: {spelled(value, short)}" for name, value in node.items()) + "}"
    if isinstance(node, Sequence) and not isinstance(node, str):
        return "[" + ", ".join(spelled(value, short) for value in node) + "]"
    return str(node)


def _objectives(exported: Exported) -> list[str]:
    facts, model = exported.facts, exported.settings.get("model", {})
    asked, numbers = model.get("objectives", {}), facts.get("objectives") or {}
    names = list(asked) or list(numbers)
    if not names:
        return []
    raw = ("transform", "raw_start", "raw_end") if any(found.get("transform") for found in numbers.values()) else ()
    rows = []
    for name in names:
        settings, found = asked.get(name, {}), numbers.get(name, {})
        weight = "evaluated only" if settings.get("eval_only") else spelled(settings.get("weight", ""))
        cells = [
            plain(spelled(settings.get("reward", ""), short=True)),
            plain(weight),
            *(_number(found.get(key)) for key in ("start", "end", "std_error")),
            *(plain(found.get(key) or "raw") if key == "transform" else _number(found.get(key)) for key in raw),
        ]
        rows.append(f"| {plain(name)} | {' | '.join(cells)} |")
    start = _named(exported.base) or "A language model"
    text = [
        f"{start} aligned to {len(names)} objectives at once: {plain(', '.join(names))}.\n",
        "## Objectives\n",
        "| objective | reward | weight | start | end | standard error |"
        + (" value is | raw start | raw end |" if raw else ""),
        "| --- | --- | --- | ---: | ---: | ---: |" + (" --- | ---: | ---: |" if raw else ""),
        *rows,
        "",
    ]
    if numbers:
        text.append(
            "Means on held-out prompts, before and after; the standard error is that of the end. Bigger is better.\n"
            if not raw
            else "Means of values on held-out prompts, before and after; the standard error is that of the end. A "
            "value is what was trained on and what thresholds are written in; `value is` says how it follows from the "
            "reward's raw score. Bigger values are better.\n"
        )
    else:
        text.append("There is no evaluation of this step.\n")
    if volume := facts.get("hypervolume"):
        reference = ", ".join(f"{plain(name)} {value:.4g}" for name, value in volume["reference"].items())
        text.append(
            f"Hypervolume {volume['start']:.4g} -> {volume['end']:.4g}, from the reference point {reference}.\n"
        )
    if exported.picture:
        text.append("![The evaluations of the run and its Pareto front](front.png)\n")
    return text


def _seeds(facts: Mapping[str, Any]) -> str | None:
    """The run's seed, and those of its data and its evaluations where they are others.

    >>> _seeds({"seed": 7, "data_seed": 7, "model_seed": 0})
    '7, evaluation 0'
    """
    seed = facts.get("seed")
    own = {"data": facts.get("data_seed"), "evaluation": facts.get("model_seed")}
    others = [f"{name} {value}" for name, value in own.items() if value not in (None, seed)]
    said = [] if seed is None else [str(seed)]
    return ", ".join([*said, *others]) or None


def _how(exported: Exported) -> list[str]:
    model, facts = exported.settings.get("model", {}), exported.facts
    adapts = (model.get("policy") or {}).get("lora")
    by_default = "the base model (adapter off)" if adapts else "a frozen copy of the policy as it was loaded"
    lines = {
        "combiner": spelled(model["combiner"]) if model.get("combiner") else facts.get("combiner"),
        "loss": spelled(model["loss"]) if model.get("loss") else None,
        "KL": spelled(model["kl"]) if model.get("kl") else None,
        "reference": (spelled(model["reference"]) if model.get("reference") else by_default) if model else None,
        "experience": spelled(model["source"]) if model.get("source") else None,
        "optimiser": spelled(model["optimizer"]) if model.get("optimizer") else None,
        "adapter": spelled({"class_path": "LoRA", "init_args": adapts}) if adapts else None,
        "weights at the end": spelled({k: _number(v) for k, v in facts["weights"].items()})
        if facts.get("weights")
        else None,
        "thresholds on held-out means": _thresholds(facts) if facts.get("thresholds") else None,
        "steps": _steps(facts),
        "seed": _seeds(facts),
    }
    listed = [f"- {name}: {plain(str(value))}" for name, value in lines.items() if value is not None]
    if not listed:
        return []
    files = "`moa.json` holds the numbers" + ("; `config.yaml` every setting of the run" if exported.settings else "")
    merging = facts.get("merge_change")
    rounding = (
        f" The adapter was folded into the weights, which rounds: a logit changed by {merging:.1e} of the largest."
        if merging is not None
        else ""
    )
    return ["## How\n", *listed, "", f"Trained with moa-lightning. {files}.{rounding}\n"]


def _use(exported: Exported) -> list[str]:
    name, folder = json.dumps(exported.name), shlex.quote(exported.name)
    loader = "AutoModelForCausalLM" if exported.adapter is None else "AutoPeftModelForCausalLM"
    library = "transformers" if exported.adapter is None else "peft"
    text = [
        "## Use\n",
        "```python",
        f"from {library} import {loader}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {loader}.from_pretrained({name}, dtype="{exported.dtype}")',
        f"tokenizer = AutoTokenizer.from_pretrained({name})",
        "```\n",
    ]
    if exported.adapter is None:
        return [*text, f"```bash\nvllm serve {folder}\n```\n", _SERVER_NOTE]
    if refused := vllm_refuses(exported.adapter):
        return [*text, f"vLLM does not serve this adapter: {'; '.join(refused)}. Merged (`moa export`), it does.\n"]
    rank = min(r for r in _VLLM_RANKS if r >= int(exported.adapter["r"]))
    base = exported.adapter["base_model_name_or_path"]
    base = shlex.quote(Path(base).name if Path(base).is_absolute() else base)
    command = f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules aligned={folder}"
    return [*text, f"```bash\n{command}\n```\n"]


_SERVER_NOTE = (
    "vLLM takes its defaults from `generation_config.json`, the longest answer (`max_new_tokens`) included; "
    "`--generation-config vllm` goes back to its own.\n"
)


def _base_and_licence(base: str | None) -> tuple[str | None, str | None]:
    """The hub id and the licence of a base model, as far as they are known here; nothing is fetched."""
    if base is None:
        return None, None
    folder, file = Path(base).expanduser(), None
    hub_id = None if folder.is_dir() or not _HUB_ID.fullmatch(base) else base
    if folder.is_dir():
        file = folder / "README.md"
    elif hub_id is not None:
        cached = try_to_load_from_cache(hub_id, "README.md")
        file = Path(cached) if isinstance(cached, str) else None
    if file is None or not file.is_file():
        return hub_id, None
    try:
        data = ModelCard.load(file).data
    except ValueError:  # a header that is no YAML
        return hub_id, None
    named = data.base_model if isinstance(data.base_model, str) else None
    return hub_id or named, data.license if isinstance(data.license, str) else None


def _named(base: str | None) -> str | None:
    return f"`{plain(Path(base).name if Path(base).is_dir() else base).replace('`', '')}`," if base else None


def _defaults(path: str) -> dict[str, Any]:
    """Default values of a class's settings; empty for what is not of this package: importing it would run its code."""
    if not path.startswith(f"{__name__.partition('.')[0]}."):
        return {}
    try:
        parameters = inspect.signature(import_dotted(path)).parameters.values()
    except (UserError, ValueError, TypeError):  # it is gone, or has no signature
        return {}
    return {p.name: list(p.default) if isinstance(p.default, tuple) else p.default for p in parameters}


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _thresholds(facts: Mapping[str, Any]) -> str:
    """Each threshold and whether the numbers above meet it."""
    told = {name: f"{_number(t)} {verdict(facts, name)}".rstrip() for name, t in facts["thresholds"].items()}
    return spelled(told)


def _steps(facts: Mapping[str, Any]) -> str | None:
    """Updates of these weights, and the step of the evaluation above where it is another one."""
    steps, evaluated = facts.get("steps"), facts.get("evaluated_at")
    if steps is None or evaluated in (None, steps):
        return None if steps is None else str(steps)
    return f"{steps} (the numbers above are of step {evaluated})"
