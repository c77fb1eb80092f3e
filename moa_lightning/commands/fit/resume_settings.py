"""What becomes of each setting that was changed for a resumed run: taken, kept or refused, and reported at start."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from moa_lightning.commands.errors import UsageError


class Verdict(StrEnum):
    """What a resumed run does with a setting that differs from the checkpoint's."""

    TAKEN = "taken"  # the new value counts from here on
    KEPT = "kept"  # the checkpoint's value counts, and config.yaml records it
    REFUSED = "refused"  # the run does not start
    PLACE = "not compared"  # where files are, and what is resumed


@dataclass(frozen=True)
class Rule:
    """What becomes of the settings of some names.

    Args:
        pattern: of dotted names; ``*`` is any part of a name.
        verdict: what becomes of them.
        why: in a few words.
    """

    pattern: str
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Change:
    """A setting that differs."""

    name: str
    before: Any
    now: Any
    rule: Rule


_OF_A_REWARD = "value heads and multipliers are of that reward"
_IN_A_UNIT = "value heads, multipliers and the front are in that unit"
_IN_A_BATCH = "the checkpoint holds a place in a collected batch"

RULES = (  # the first one that fits counts
    Rule("config", Verdict.PLACE, "names files"),
    Rule("ckpt_path", Verdict.PLACE, "says what is resumed"),
    Rule("weights_only", Verdict.PLACE, "how the checkpoint is opened"),
    Rule("trainer.default_root_dir", Verdict.PLACE, "a run may be moved"),
    Rule("checkpoint.dirpath", Verdict.PLACE, "a run may be moved"),
    Rule("predictions.path", Verdict.PLACE, "names a file"),
    Rule("seed_everything", Verdict.KEPT, "random streams continue from the checkpoint"),
    Rule("model.seed", Verdict.KEPT, "evaluations of one run draw alike"),
    Rule("data.init_args.seed", Verdict.KEPT, "the checkpoint holds a place in the order of the prompts"),
    Rule("data.init_args.val_size", Verdict.KEPT, "held-out rows stay held out"),
    Rule("data.init_args.warm_start_seed", Verdict.KEPT, "it made the policy that the run started from"),
    Rule("model.kl.init_args.init_kl_coef", Verdict.KEPT, "the coefficient continues from the checkpoint's"),
    Rule("model.lr_scheduler.init_args.*", Verdict.KEPT, "the schedule continues from the checkpoint's"),
    Rule("lr_scheduler.init_args.*", Verdict.KEPT, "the schedule continues from the checkpoint's"),
    Rule("model.objectives.*.reward.class_path", Verdict.REFUSED, _OF_A_REWARD),
    Rule(
        "model.objectives.*.reward.init_args.function",
        Verdict.REFUSED,
        "value heads and multipliers are of that reward",
    ),
    Rule("model.objectives.*.reward.*", Verdict.TAKEN, "such as where a model is, or how it is called"),
    Rule("model.objectives.*.scale", Verdict.REFUSED, _IN_A_UNIT),
    Rule("model.objectives.*.shift", Verdict.REFUSED, _IN_A_UNIT),
    Rule("model.objectives.*.clip", Verdict.REFUSED, _IN_A_UNIT),
    Rule("model.objectives.*.eval_only", Verdict.REFUSED, "there is a value head for each trained objective"),
    Rule("model.objectives.*.weight*", Verdict.TAKEN, "weights that a combiner has learnt stay"),
    Rule("model.objectives.*", Verdict.TAKEN, "a field of an objective of your own"),
    Rule("model.policy.lora*", Verdict.REFUSED, "the checkpoint holds that adapter"),
    Rule("model.policy.quantization", Verdict.REFUSED, "the adapter was trained on those weights"),
    Rule("model.policy.revision", Verdict.REFUSED, "the checkpoint was trained on those weights"),
    Rule("model.policy.*", Verdict.TAKEN, "the trained weights are the checkpoint's; its files may have moved"),
    Rule("model.source.init_args.num_iterations", Verdict.REFUSED, _IN_A_BATCH),
    Rule("model.source.init_args.num_mini_batches", Verdict.REFUSED, _IN_A_BATCH),
    Rule("model.*.class_path", Verdict.REFUSED, "its memory is in the checkpoint"),
    Rule("data.class_path", Verdict.REFUSED, "the checkpoint holds a place in that data"),
    Rule("optimizer.class_path", Verdict.REFUSED, "its memory is in the checkpoint"),
    Rule("lr_scheduler.class_path", Verdict.REFUSED, "its memory is in the checkpoint"),
    Rule("model.lr_scheduler", Verdict.REFUSED, "the checkpoint continues the schedule that it was written under"),
    Rule("lr_scheduler", Verdict.REFUSED, "the checkpoint continues the schedule that it was written under"),
    Rule("model.optimizer.init_args.*", Verdict.TAKEN, "what the optimiser remembers stays"),
    Rule("optimizer*", Verdict.TAKEN, "what the optimiser remembers stays"),
    Rule("model.silent_batches", Verdict.TAKEN, "counted from here on"),
    Rule("model.value_learning_rate", Verdict.TAKEN, "what the optimiser remembers stays"),
    Rule("model.combiner*", Verdict.TAKEN, "what the combiner has learnt stays"),
    Rule("model.source*", Verdict.TAKEN, "a batch in flight is used up first"),
    Rule("model.loss*", Verdict.TAKEN, "from the next update on; another class is refused"),
    Rule("model.kl*", Verdict.TAKEN, "from the next batch on; another class is refused"),
    Rule("model.reference*", Verdict.TAKEN, "from the next batch on; another class is refused"),
    Rule("data.*", Verdict.TAKEN, "from the next batch on"),
    Rule("trainer.*", Verdict.TAKEN, "the Trainer's own"),
    Rule("checkpoint.*", Verdict.TAKEN, "for checkpoints to come"),
    Rule("pareto_front.*", Verdict.TAKEN, "all points are measured from it again"),
    Rule("constraints.*", Verdict.TAKEN, "for evaluations to come"),
    Rule("sample_table.*", Verdict.TAKEN, "for evaluations to come"),
    Rule("run_files.*", Verdict.TAKEN, "at the end"),
    Rule("wandb*", Verdict.TAKEN, "tracking only"),
)


_WITH_DEFAULTS = ("model.combiner", "model.source", "model.loss", "model.kl", "model.reference", "model.optimizer")


def rule_of(name: str) -> Rule | None:
    """The rule for a setting; ``None`` for one that nobody thought of, which is taken and reported too.

    >>> rule_of("model.kl.init_args.init_kl_coef").verdict.value
    'kept'
    """
    return next((rule for rule in RULES if fnmatchcase(name, rule.pattern)), None)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Settings that differ; of a piece of another class, only that. Those that one side does not know are left out.

    Args:
        before: the settings under which a checkpoint was written, nested.
        now: those of the run that resumes it.
    """
    unknown = Rule("*", Verdict.TAKEN, "")
    differing = _differing("", before, now)
    found = [Change(name, there, here, rule_of(name) or unknown) for name, there, here in differing]
    return [change for change in found if change.rule.verdict != Verdict.PLACE]


def settle(before: Mapping[str, Any], now: Mapping[str, Any], config: Any) -> list[str]:
    """Write into the config of a resumed run what is kept of the checkpoint's, and report each change in one line.

    Args:
        before: the settings under which the checkpoint was written, nested.
        now: the run's.
        config: the parser's, of the command; changed in place.

    Raises:
        UsageError: one line with a setting that is refused, and the names of the others.
    """
    found = changes(before, now)
    refused = [change for change in found if change.rule.verdict == Verdict.REFUSED]
    if refused:
        first, others = refused[0], ", ".join(change.name for change in refused[1:])
        raise UsageError(
            f"{first.name} is {_shown(first.now)}, and the checkpoint was written with {_shown(first.before)}: "
            f"{first.rule.why}; use the run's own config.yaml, or start from its exported policy"
            + (f" (so for {others})" if others else "")
        )
    lines = []
    for change in found:
        if change.rule.verdict == Verdict.TAKEN:
            lines.append(f"resumed: {change.name} {_shown(change.now)} is taken ({_shown(change.before)} before)")
            continue
        config[change.name] = change.before
        follows = change.now is None and change.name.endswith(".seed")
        given = now.get("seed_everything") if follows else change.now
        if given != change.before:
            kept = f"{_shown(change.before)} is kept: {change.rule.why}"
            lines.append(f"resumed: {change.name} {_shown(given)} is not used, {kept}")
    return lines


def table() -> str:
    """The rules as a Markdown table, for the documentation."""
    rows = [f"| `{rule.pattern}` | {rule.verdict} | {rule.why} |" for rule in RULES]
    return "\n".join(["| setting | when it differs | why |", "| --- | --- | --- |", *rows])


def _differing(name: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        if before != now:
            # Where one side leaves a piece to the default, the other may name that very class: the checkpoint says
            # which classes it was written with, and the module compares those.
            one_default = None in (before, now) and name in _WITH_DEFAULTS
            if not one_default:
                yield name, _class(before), _class(now)
        return
    if before.get("class_path") != now.get("class_path"):
        yield f"{name}.class_path", before.get("class_path"), now.get("class_path")
        return
    for key in (key for key in now if key in before):
        yield from _differing(f"{name}.{key}" if name else key, before[key], now[key])


def _class(value: Any) -> Any:
    return value["class_path"] if isinstance(value, Mapping) and "class_path" in value else value


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
