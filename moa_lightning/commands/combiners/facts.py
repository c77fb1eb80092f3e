"""What is known of a combiner, from its class, its docstring and its preset: nothing is written down twice."""

import inspect
import re
import sys
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

import moa_lightning.combiners as package
from moa_lightning.combiners import Combiner
from moa_lightning.signals import GradientPlace, Signal
from moa_lightning.types import State

PRESETS = Path(__file__).resolve().parents[2] / "configs" / "combiner"
SECTIONS = (
    "Formula",
    "Symbols",
    "Choose it when",
    "Cost",
    "Convergence",
    "Source",
    "Deviations",
    "Missing score",
    "Watch",
)
FAMILIES = {
    "Scores and advantages": "fixed weights, or none",
    "Gradients": "weights from the inner products of the objectives' gradients",
    "Adaptive weights": "weights that move during the run",
    "Constrained": "one objective as high as it goes, the others above thresholds",
}
_LABEL = re.compile(rf"\b({'|'.join(SECTIONS)}|Deviation): ")
_ARGUMENT = re.compile(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", re.MULTILINE)
_PASSES = {
    GradientPlace.REPRESENTATION: "one, through the head",
    GradientPlace.LAST_LAYER: "N, of the last block",
    GradientPlace.PARAMETERS: "N",
}


@dataclass(frozen=True)
class Setting:
    """One field of a combiner."""

    name: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Facts:
    """What a page or a row of the table shows."""

    name: str
    class_path: str  # as in YAML
    summary: str
    body: tuple[str, ...]  # paragraphs
    sections: dict[str, str]  # by SECTIONS, those that the docstring has
    settings: tuple[Setting, ...]
    needs: tuple[Signal, ...]
    combiner: Combiner | None  # with its default settings; None where it has settings without a default
    module: str  # dotted path of the file

    @property
    def mathematics(self) -> tuple[str, ...]:
        """Modules of the pure functions that its file uses."""
        used = {getattr(value, "__module__", "") for value in vars(sys.modules[self.module]).values()}
        return tuple(sorted(name for name in used if str(name).startswith("moa_lightning.functional.")))

    @property
    def test(self) -> str:
        """Path of its tests; empty for a combiner of the user's own."""
        stem = self.module.rpartition(".")[2]
        return f"tests/combiners/test_{stem}.py" if self.module.startswith(f"{package.__name__}.") else ""

    @cached_property
    def preset(self) -> str:
        """Its YAML: read when a page shows it, since the table does not."""
        for path in sorted(PRESETS.glob("*.yaml")):
            text = path.read_text(encoding="utf-8")
            if yaml.safe_load(text)["model"]["combiner"]["class_path"] == self.class_path:
                return text
        return f"model:\n  combiner:\n    class_path: {self.class_path}\n"

    @property
    def kl_penalty(self) -> str:
        """Where a KL penalty in the reward reaches what is trained on."""
        if Signal.ADVANTAGES in self.needs:
            return "counts in each advantage"
        penalised = self.combiner is None or self.combiner.takes_kl_penalty
        return "is taken off the combined score" if penalised else "does not count"

    @cached_property
    def state(self) -> State:
        """What it remembers, as it begins with two objectives."""
        return {} if self.combiner is None else self.combiner.init(("first", "second"), torch.ones(2))

    @property
    def remembered(self) -> tuple[str, ...]:
        """Names of the state, those first that are worth a curve."""
        if self.combiner is None:
            return ()
        shown = self.combiner.report(self.state)
        return (*(name for name in shown if name in self.state), *(name for name in self.state if name not in shown))

    @property
    def extra_passes(self) -> str:
        """Backward passes beside that of the update."""
        if Signal.GRAMIAN not in self.needs:
            return "none"
        return _PASSES[GradientPlace.REPRESENTATION if self.combiner is None else self.combiner.gradients_at]

    @property
    def family(self) -> str:
        """One of FAMILIES, by what it remembers and reads."""
        scores, gradients, adaptive, constrained = FAMILIES
        if "duals" in self.state:
            return constrained
        if "log_weights" in self.state:
            return adaptive
        return gradients if Signal.GRAMIAN in self.needs else scores


def every_combiner() -> list[Facts]:
    """Of the package's combiners, family by family."""
    found = [c for _, c in inspect.getmembers(package, inspect.isclass) if issubclass(c, Combiner)]
    known = [facts(c, c.__name__) for c in found if not inspect.isabstract(c)]
    return sorted(known, key=lambda f: list(FAMILIES).index(f.family))


def facts(combiner: type[Combiner], class_path: str) -> Facts:
    """Of one class.

    Args:
        combiner: the class.
        class_path: how it is named in YAML.
    """
    described, _, args = inspect.cleandoc(combiner.__doc__ or "").partition("\nArgs:\n")
    paragraphs = [_text(p) for p in described.split("\n\n") if p.strip()]
    summary, *rest = paragraphs or [""]
    told = [_LABEL.split(p) for p in rest]
    sections = {label: text.strip() for parts in told for label, text in zip(parts[1::2], parts[2::2], strict=True)}
    if "Deviation" in sections:
        sections["Deviations"] = sections.pop("Deviation")
    return Facts(
        name=combiner.__name__,
        class_path=class_path,
        summary=summary,
        body=tuple(parts[0].strip() for parts in told if parts[0].strip()),
        sections={name: sections[name] for name in SECTIONS if name in sections},
        settings=_settings(combiner, args),
        needs=tuple(sorted(combiner.needs)),
        combiner=_by_default(combiner),
        module=combiner.__module__,
    )


def _text(docstring: str) -> str:
    """One line of Markdown."""
    return " ".join(docstring.replace("``", "`").split())


def _by_default(combiner: type[Combiner]) -> Combiner | None:
    required = [p for p in inspect.signature(combiner).parameters.values() if p.default is p.empty]
    return None if required else combiner()


def _settings(combiner: type[Any], args: str) -> tuple[Setting, ...]:
    meanings = {name: _text(meaning) for name, meaning in _ARGUMENT.findall(args)}
    found = []
    for field in fields(combiner) if is_dataclass(combiner) else ():
        made = field.default_factory() if field.default_factory is not MISSING else field.default
        default = "required" if made is MISSING else "null" if made is None else str(made).lower()
        if field.default_factory is not MISSING:
            default = type(made).__name__
        found.append(Setting(field.name, default, meanings.get(field.name, "")))
    return tuple(found)
