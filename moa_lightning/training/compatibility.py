"""Which pieces go together: checked before anything is loaded."""

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

# Scores are compared too: their baseline is the mean over a prompt's responses.
_COMPARING = frozenset({Signal.WINS, Signal.GROUPS, Signal.SCORES})


def fitting_loss(combiner: Combiner) -> PolicyLoss:
    """The loss that goes with a combiner's score, for a user who names none.

    Raises:
        UserError: the combiner is one of the user's that does not say what it reads.
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
    """Refuse pieces that cannot work together, and warn of one that would have no effect.

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
    heard = penalty_reaches_score(combiner, source.provides)
    # The default is no choice of the user, so there is nothing to tell.
    if not heard and kl != RewardKL() and kl.reward_coefficient(kl.init()) > 0:
        rank_zero_warn(
            f"kl {_name(kl)} has no effect: it penalises the rewards of rollouts, and {_name(combiner)} "
            f"on {_name(source)} reads none of them; use LossKL, or leave it out"
        )


def _warn_of_penalty(combiner: Combiner, source: Source, panel: RewardPanel) -> None:
    """Warn of objectives whose values are win probabilities, which no penalty is taken off."""
    wins = [name for name in panel.trained_names if panel.objectives[name].reward.gives_wins]
    if source.penalises and wins and combiner.needs & {Signal.WINS, Signal.SCORES, Signal.ADVANTAGES} == {Signal.WINS}:
        rank_zero_warn(
            f"source.missing_eos_penalty has no effect on {', '.join(map(repr, wins))}: {_name(combiner)} reads win "
            "probabilities alone, and these rewards give theirs; set it to null, or let the reward itself give "
            "truncated responses less"
        )


def check_optimizer(make: Callable[[Any], Optimizer] | None) -> None:
    """Refuse settings that the optimiser does not take, and a learning rate that is not finite.

    It is made for one weight, which is then thrown away: else torch would say so after the models are loaded.

    Raises:
        UserError: one line with the optimiser's own words.
    """
    if make is None:
        return
    try:
        made = make([Parameter(torch.zeros(1, 1))])
    except ValueError as error:
        if str(error).startswith("Invalid "):  # how torch's own begin; others may refuse this weight alone
            raise UserError(f"model.optimizer: {error}") from error
        return
    for group in made.param_groups:
        if not math.isfinite(float(group.get("lr", 0.0))):
            raise UserError(f"model.optimizer: lr must be a finite number, got {group['lr']}")


def check_minibatches(combiner: Combiner, loss: PolicyLoss, source: Source, batch_size: int) -> None:
    """Refuse minibatches that would part the responses to a prompt where these are compared.

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
    """Refuse data without a column that the source or a reward reads; without data there is nothing to check.

    Raises:
        UserError: one line with the column.
    """
    if data is not None:
        source.check(data.columns)
        panel.check(data.columns - {"responses"} if source.reads_candidates else data.columns)


def check_strategy(combiner: Combiner, strategy: Strategy) -> None:
    """Refuse a strategy under which the combiner's gradients cannot be had.

    Raises:
        UserError: one line that says where to take them instead.
    """
    at, sharded = combiner.gradients_at, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
    if isinstance(strategy, sharded) and not isinstance(strategy, FSDP2Strategy):
        raise UserError(
            f"strategy {_name(strategy)} does not know how a policy is cut into pieces; use strategy FSDP2Strategy "
            "(configs/trainer/fsdp.yaml), or ddp"
        )
    if Signal.GRAMIAN in combiner.needs and at is not GradientPlace.REPRESENTATION and isinstance(strategy, sharded):
        raise UserError(
            f"{_name(combiner)} takes gradients at {at}, which {_name(strategy)} keeps in pieces; use combiner.at "
            "representation, or strategy ddp"
        )


FORMAT = 1
"""Of what a checkpoint holds of ours. 0 had no number, and did not say the classes of KL control, loss and source."""

_FIELDS = ("objectives", "combiner", "combiner_state", "kl_state", "reference_class", "reference")
_SIGNED = {"duals": 0.0, "weights": 0.0, "kl_coefficient": 0.0, "log_weights": -math.inf}  # least sensible values


def check_checkpoint(
    checkpoint: Mapping[str, Any], objectives: Sequence[str], combiner: Combiner, pieces: Mapping[str, object]
) -> dict[str, Any]:
    """What a checkpoint holds of ours, if it is of a known format, these objectives and these classes.

    Args:
        checkpoint: all of it.
        objectives: the trained ones.
        combiner: of this run.
        pieces: reference, KL control, loss and source of this run, by those names.

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
    for name, piece in pieces.items():
        if classes.get(name, _name(piece)) != _name(piece):
            raise UserError(
                f"the checkpoint was trained with {name} {classes[name]}, this run uses {_name(piece)}; use the run's "
                "own config.yaml"
            )
    return dict(saved)


def check_state(of: str, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a checkpoint's memory that is another one's, or that makes no sense.

    Args:
        of: whose memory it is, for the message.
        saved: the checkpoint's.
        expected: as this run would begin with it.

    Raises:
        UserError: one line with the entry: one is missing, a multiplier, weight or coefficient is NaN or negative.
    """
    if missing := sorted(expected.keys() - saved.keys()):
        raise UserError(
            f"the checkpoint's memory of {of} lacks {', '.join(missing)}: it was written under other settings or by "
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
                f"the checkpoint's memory of {of} makes no sense: {name} holds {float(bad[0]):g}; give an earlier "
                "checkpoint"
            )


def check_weights(saved: Mapping[str, Any], trained: set[str], known: Mapping[str, Any]) -> None:
    """Refuse a checkpoint's weights that are not those that are trained, by their names and shapes.

    Args:
        saved: tensors of the checkpoint by name, or their shapes.
        trained: names of those that are trained here.
        known: all tensors here.

    Raises:
        UserError: one line with how many differ, and one of them.
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


def _name(piece: object) -> str:
    return type(piece).__name__
