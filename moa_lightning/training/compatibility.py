"""Checks that combiner, source, loss, KL control, data and strategy fit together, before anything is loaded."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn import Parameter
from torch.optim import Optimizer

from moa_lightning.combiners import Combiner
from moa_lightning.errors import UserError
from moa_lightning.losses import (
    ClippedSurrogate,
    KLPenalty,
    PairwiseLogistic,
    PolicyLoss,
    RewardKL,
    WeightedLikelihood,
)
from moa_lightning.losses.kl import penalty_reaches_score
from moa_lightning.rewards import RewardPanel
from moa_lightning.signals import SIGNALS_OF_LOSSES, GradientPlace, Signal
from moa_lightning.sources import Source
from moa_lightning.training.strategies import FSDP2Strategy

# Scores are among them: their baseline is the mean over a prompt's responses.
_COMPARING = frozenset({Signal.WINS, Signal.GROUPS, Signal.SCORES})


def fitting_loss(combiner: Combiner) -> PolicyLoss:
    """The default loss for a combiner's score.

    Raises:
        UserError: a custom combiner does not declare ``needs``.
    """
    if not hasattr(combiner, "needs"):
        raise UserError(
            f"combiner {_name(combiner)} does not say what it reads; give it a line such as: "
            "needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ADVANTAGES})"
        )
    if Signal.PAIRS in combiner.needs:
        return PairwiseLogistic()
    if combiner.gives_weights and Signal.ADVANTAGES not in combiner.needs:
        return WeightedLikelihood()
    return ClippedSurrogate()


def check_compatible(combiner: Combiner, source: Source, loss: PolicyLoss, kl: KLPenalty, panel: RewardPanel) -> None:
    """Refuse components that cannot work together, and warn of settings that would have no effect.

    Raises:
        UserError: one line that says what to choose instead.
    """
    _check_needs(combiner, source, loss)
    if not loss.takes_advantages and not combiner.gives_weights:
        raise UserError(
            f"loss {_name(loss)} needs weights of at least 0, and the score of {_name(combiner)} is an advantage of "
            "either sign; use loss ClippedSurrogate with it"
        )
    for name, objective in panel.objectives.items():
        if objective.reward.of_data_alone and not source.reads_candidates:
            raise UserError(
                f"objective '{name}': {_name(objective.reward)} knows the responses of the data alone, not new ones; "
                "use source PreferenceRows, or a reward that can score any response"
            )
    if Signal.KL_PENALTY in combiner.needs and not kl.reward_coefficient(kl.init()) > 0:
        raise UserError(
            f"{_name(combiner)} needs a KL penalty in the rewards: its coefficient is the beta of the problem that it "
            "solves; use kl RewardKL with init_kl_coef above 0"
        )
    _warn_of_penalty(combiner, source, panel)
    has_effect = penalty_reaches_score(combiner, source.provides)
    # The default is not the user's choice, so it needs no warning.
    if not has_effect and kl != RewardKL() and kl.reward_coefficient(kl.init()) > 0:
        rank_zero_warn(
            f"kl {_name(kl)} has no effect: it penalises the rewards of rollouts, and {_name(combiner)} "
            f"on {_name(source)} reads none of them; use LossKL, or leave it out"
        )


def _warn_of_penalty(combiner: Combiner, source: Source, panel: RewardPanel) -> None:
    """Warn of objectives whose values are win probabilities, from which no penalty is subtracted."""
    wins = [name for name in panel.trained_names if panel.objectives[name].reward.gives_wins]
    if source.penalises and wins and combiner.needs & {Signal.WINS, Signal.SCORES, Signal.ADVANTAGES} == {Signal.WINS}:
        rank_zero_warn(
            f"source.missing_eos_penalty has no effect on {', '.join(map(repr, wins))}: {_name(combiner)} reads win "
            "probabilities alone, and these rewards give theirs; set it to null, or let the reward itself give "
            "truncated responses less"
        )


def check_optimizer(make: Callable[[Any], Optimizer] | None) -> None:
    """Refuse invalid settings of the optimiser, and a learning rate that is not finite.

    It creates the optimiser for a single dummy weight. Otherwise torch would raise after the models are loaded.

    Raises:
        UserError: one line with the optimiser's own message.
    """
    if make is None:
        return
    try:
        made = make([Parameter(torch.zeros(1, 1))])
    except ValueError as error:
        if str(error).startswith("Invalid "):  # as torch's own messages do; others may only refuse the dummy weight
            raise UserError(f"model.optimizer: {error}") from error
        return
    for group in made.param_groups:
        if not math.isfinite(float(group.get("lr", 0.0))):
            raise UserError(f"model.optimizer: lr must be a finite number, got {group['lr']}")


def check_minibatches(combiner: Combiner, loss: PolicyLoss, source: Source, batch_size: int) -> None:
    """Refuse minibatches that would separate responses to a prompt that are compared with each other.

    Raises:
        UserError: one line with both numbers.
    """
    if _COMPARING & (combiner.needs | loss.needs) and batch_size % source.minibatches:
        comparing = combiner if _COMPARING & combiner.needs else loss
        raise UserError(
            f"{_name(comparing)} compares the responses to a prompt, so they must stay in one minibatch: "
            f"source.num_mini_batches {source.minibatches} must divide data.batch_size {batch_size}"
        )


def check_columns(data: Any, source: Source, panel: RewardPanel) -> None:
    """Refuse data without a column that the source or a reward reads. Without data nothing is checked.

    Raises:
        UserError: one line with the column.
    """
    if data is not None:
        source.check(data.columns)
        panel.check(data.columns - {"responses"} if source.reads_candidates else data.columns)


def check_strategy(combiner: Combiner, strategy: Strategy) -> None:
    """Refuse a strategy that cannot shard a policy, or with which the combiner's gradients cannot be computed.

    Raises:
        UserError: one line that says what to choose instead.
    """
    at, sharded = combiner.gradients_at, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
    if isinstance(strategy, sharded) and not isinstance(strategy, FSDP2Strategy):
        raise UserError(
            f"strategy {_name(strategy)} does not know how to shard a policy; use strategy FSDP2Strategy "
            "(configs/trainer/fsdp.yaml), or ddp"
        )
    if Signal.GRAMIAN in combiner.needs and at is not GradientPlace.REPRESENTATION and isinstance(strategy, sharded):
        raise UserError(
            f"{_name(combiner)} takes gradients at {at}, which {_name(strategy)} shards; use combiner.at "
            "representation, or strategy ddp"
        )


FORMAT = 1
"""Version of this package's part of a checkpoint. Version 0 had no number, and no classes of KL, loss and source."""

_FIELDS = ("objectives", "combiner", "combiner_state", "kl_state", "reference_class", "reference")
_SIGNED = {"duals": 0.0, "weights": 0.0, "kl_coefficient": 0.0, "log_weights": -math.inf}  # smallest valid values


def check_checkpoint(
    checkpoint: Mapping[str, Any], objectives: Sequence[str], combiner: Combiner, components: Mapping[str, object]
) -> dict[str, Any]:
    """Return this package's part of a checkpoint, after checking its format, objectives and classes.

    Args:
        checkpoint: all of its content.
        objectives: names of the trained objectives of this run.
        combiner: of this run.
        components: reference, KL control, loss and source of this run, by name.

    Raises:
        UserError: one line with what differs.
    """
    saved, version = checkpoint.get("moa"), checkpoint.get("moa_format", 0)
    if saved is None:
        raise UserError("this checkpoint was not written by moa_lightning; give one from a run's folder")
    if version not in range(FORMAT + 1):
        raise UserError(
            f"the checkpoint has format {version}, and this version of moa_lightning reads 0 to {FORMAT}; resume it "
            "with the version that wrote it"
        )
    if missing := [name for name in _FIELDS if name not in saved]:
        raise UserError(f"the checkpoint lacks {', '.join(missing)}; give another one from the run's folder")
    if list(saved["objectives"]) != list(objectives):
        raise UserError(
            f"the checkpoint was trained on the objectives {', '.join(saved['objectives'])}, this run on "
            f"{', '.join(objectives)}; use the run's own config.yaml"
        )
    if saved["combiner"] != _name(combiner):
        raise UserError(
            f"the checkpoint was trained with {saved['combiner']}, this run uses {_name(combiner)}; use the run's own "
            "config.yaml, or start from its exported policy"
        )
    classes = {"reference": saved["reference_class"], **saved.get("classes", {})}
    for name, component in components.items():
        if classes.get(name, _name(component)) != _name(component):
            raise UserError(
                f"the checkpoint was trained with {name} {classes[name]}, this run uses {_name(component)}; use the "
                "run's own config.yaml"
            )
    return dict(saved)


def check_state(of: str, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a state from a checkpoint that lacks entries or has invalid values.

    Args:
        of: name of the class whose state it is, for the message.
        saved: state from the checkpoint.
        expected: initial state of this run.

    Raises:
        UserError: one line with the entry that is missing, or the multiplier, weight or coefficient that is NaN or
            negative.
    """
    if missing := sorted(expected.keys() - saved.keys()):
        raise UserError(
            f"the checkpoint's state of {of} lacks {', '.join(missing)}: it was written with other settings or by "
            "another version; use the run's own config.yaml"
        )
    for name, least in _SIGNED.items():
        if name not in saved or name not in expected:
            continue
        there = torch.as_tensor(saved[name]).double().flatten()
        begun = torch.as_tensor(expected[name]).double().flatten()
        known = begun.isfinite() if begun.shape == there.shape else torch.ones_like(there, dtype=torch.bool)
        bad = there[known & ~(there.isfinite() & (there >= least))]
        if len(bad):
            raise UserError(
                f"the checkpoint's state of {of} is invalid: {name} holds {float(bad[0]):g}; use an earlier checkpoint"
            )


def check_weights(saved: Mapping[str, Any], trained: set[str], known: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights differ from the trained weights of this run in name or shape.

    Args:
        saved: tensors of the checkpoint, or their shapes, by name.
        trained: names of the trained weights of this run.
        known: all tensors of this run by name.

    Raises:
        UserError: one line with the number of weights that differ, and one of them.
    """
    missing, unknown = sorted(trained - saved.keys()), sorted(saved.keys() - known.keys())
    if missing or unknown:
        raise UserError(
            f"the checkpoint is of another model: {len(missing)} weights missing, {len(unknown)} unknown, such as "
            f"{(missing + unknown)[0]}; use the run's own config.yaml"
        )
    other = sorted(name for name in saved if _shape(saved[name]) != _shape(known[name]))
    if other:
        raise UserError(
            f"the checkpoint is of another model: {len(other)} weights have another shape, such as {other[0]}: "
            f"{_shape(saved[other[0]])} there, {_shape(known[other[0]])} here; use the run's own config.yaml"
        )


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(getattr(tensor, "shape", tensor))


def _check_needs(combiner: Combiner, source: Source, loss: PolicyLoss) -> None:
    for taker, wanted, giver, kind in (
        (combiner, combiner.needs - SIGNALS_OF_LOSSES, source, "combiner or source"),
        (combiner, combiner.needs & SIGNALS_OF_LOSSES, loss, "combiner or loss"),
        (loss, loss.needs, source, "loss or source"),
    ):
        lacking = sorted(wanted - giver.provides)
        if lacking:
            fitting = f": {', '.join(_losses_with(lacking))}" if giver is loss else ""
            raise UserError(
                f"{_name(taker)} needs {', '.join(lacking)}, which {_name(giver)} does not provide; choose another "
                f"{kind}{fitting}"
            )


def _losses_with(signals: Sequence[Signal]) -> list[str]:
    known = (PairwiseLogistic, WeightedLikelihood, ClippedSurrogate)
    return [kind.__name__ for kind in known if kind.provides >= {*signals}]


def _name(component: object) -> str:
    return type(component).__name__
