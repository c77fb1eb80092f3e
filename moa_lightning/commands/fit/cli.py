"""LightningCLI for ``moa fit | validate | test | predict``."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from moa_lightning import combiners, data, losses, models, rewards, sources
from moa_lightning.callbacks import (
    Constraints,
    MetricsBeforeCheckpoints,
    MetricsFile,
    ObjectiveMetrics,
    ObjectiveProgressBar,
    ParetoFront,
    PredictionWriter,
    RunFiles,
    SampleTable,
    Throughput,
)
from moa_lightning.callbacks.constraints import BEST
from moa_lightning.commands import usage
from moa_lightning.commands.errors import OneLineErrors, UsageError, check_config_files, name_objective
from moa_lightning.commands.fit.monitors import check_monitors
from moa_lightning.commands.fit.resume_settings import settle
from moa_lightning.commands.fit.run_config import RunConfig
from moa_lightning.commands.fit.seeds import seed_run
from moa_lightning.commands.fit.settings import check_nulls, check_settings, count_in_epochs
from moa_lightning.commands.fit.summary import print_summary
from moa_lightning.commands.start_folder import (
    RunPlace,
    free_folder,
    is_run,
    place_of,
    refuse_foreign,
    refuse_no_checkpoint,
    refuse_other_run,
    refuse_unwritable,
    run_in_progress,
    run_of,
    settings_of,
)
from moa_lightning.errors import UserError
from moa_lightning.module import AlignmentModule
from moa_lightning.schedules import WeightSchedule
from moa_lightning.training.agreement import flat
from moa_lightning.training.checkpoints import AtomicCheckpointIO, require_valid, settings_in
from moa_lightning.training.preemption import Preemption
from moa_lightning.training.run_checkpoint import RunCheckpoint
from moa_lightning.training.run_lock import refuse_if_held
from moa_lightning.utils.console import launched_as
from moa_lightning.utils.masking import masked, masked_arguments, masked_settings

WandbMode = Literal["online", "offline", "off"]
_CHECKPOINTS_THAT_LIGHTNING_FINDS = ("hpc", "registry")


class AlignmentParser(OneLineErrors, LightningArgumentParser):
    """The parser of one command."""

    def nameable(self) -> Sequence[type]:
        """Every base class of a setting."""
        from torchjd.aggregation import Weighting

        return (
            combiners.Combiner,
            combiners.DualUpdate,
            sources.Source,
            sources.AdvantageEstimator,
            losses.PolicyLoss,
            losses.KLPenalty,
            models.Reference,
            models.LoRA,
            rewards.Reward,
            rewards.Objective,
            WeightSchedule,  # before Weighting: a key "weight" is in both names
            Weighting,
            data.PromptData,
            data.PreferenceFormat,
            torch.optim.Optimizer,
            torch.optim.lr_scheduler.LRScheduler,
            Callback,
            Logger,
        )


class AlignmentCLI(LightningCLI):
    """The commands that need a policy."""

    @classmethod
    def run_command(cls, args: list[str]) -> "AlignmentCLI":
        """Parse and run; ``args`` starts with the command."""
        check_config_files(args)
        return cls(
            AlignmentModule,
            data.PromptData,
            args=args,
            subclass_mode_data=True,
            parser_class=AlignmentParser,
            parser_kwargs={"allow_abbrev": False, **{name: {"usage": usage(name)} for name in cls.subcommands()}},
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},  # the run folder is a new one, or that of the resumed run
            seed_everything_default=0,
            trainer_defaults={
                "num_sanity_val_steps": -1,  # the evaluation of the policy as it was
                "check_val_every_n_epoch": None,
                "log_every_n_steps": 1,
                "default_root_dir": "runs/run",
                "enable_model_summary": False,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Tracking, and the defaults of the module's parts as classes, so that single fields can be set."""
        parser.add_argument("--wandb", type=WandbMode, default="off", help="Weights & Biases: online, offline or off.")
        parser.add_argument("--wandb_project", type=str, default="moa-lightning", help="Weights & Biases project.")
        parser.add_lightning_class_args(ParetoFront, "pareto_front")
        parser.add_lightning_class_args(Constraints, "constraints")
        parser.add_lightning_class_args(SampleTable, "sample_table")
        parser.add_lightning_class_args(RunFiles, "run_files")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.set_defaults(
            {
                "model.combiner": {"class_path": "moa_lightning.combiners.PAMA"},
                "model.source": {"class_path": "moa_lightning.sources.Rollout"},
                "model.kl": {"class_path": "moa_lightning.losses.RewardKL"},
                "model.optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-5}},
                "checkpoint.filename": "step-{step}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.save_last": True,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the given arguments, whatever the process was started with."""
        assert isinstance(args, list)
        try:
            self.config = parser.parse_args(args)
        except UsageError as error:
            raise UsageError(name_objective(str(error), args)) from error
        check_config_files(args, {*vars(self.config[self.config.subcommand]), "config"})

    def _parse_ckpt_path(self) -> None:
        """Leave the command line alone: a checkpoint does not override it."""

    def _set_seed(self) -> None:
        """Leave it to :meth:`before_instantiate_classes`, which knows the run that is resumed."""

    def before_instantiate_classes(self) -> None:
        """Give the run a folder of its own, or that of the checkpoint it resumes from; evaluations get one inside it.

        Each process decides this for itself: nothing is written there before all have met.

        Raises:
            UserError: the checkpoint does not exist.
        """
        config = self.config[self.subcommand]
        for name, kind in {"model": AlignmentModule, "data": Any, "trainer": Any}.items():
            check_nulls(config.get(name), kind, name)
        check_settings(config)
        count_in_epochs(config)
        if secrets := masked_settings(config):
            raise UsageError(
                f"{secrets[0]} is masked in this record of a run; give it as --{secrets[0]}=..."
                + (f" (so are {', '.join(secrets[1:])})" if secrets[1:] else "")
            )
        given = RunPlace(Path(config.trainer.default_root_dir), config.checkpoint.dirpath)
        place = place_of(given, [Path(str(file)) for file in config.get("config") or []])
        if place != given:
            rank_zero_only(print)(f"the run of {given.root} lies in {place.root} now")
        root, checkpoint = place.root, config.get("ckpt_path")
        last = checkpoint == "last"
        if config.get("weights_only") is None:
            config.weights_only = True  # checkpoints hold tensors and plain containers: nothing in them can run code
        if last:
            config.ckpt_path = checkpoint = self._newest(place)
        elif checkpoint == "best":
            config.ckpt_path = checkpoint = self._best(place)
        elif checkpoint not in (None, *_CHECKPOINTS_THAT_LIGHTNING_FINDS):
            place = self._place_of(Path(checkpoint), place)
            root = place.root
        folder = root
        if self.subcommand == "fit" and not checkpoint and place.dirpath and any(place.checkpoints.glob("*.ckpt")):
            raise UserError(
                f"checkpoint.dirpath {place.dirpath} holds checkpoints of another run; give another one, or resume "
                "that run with --ckpt_path=last"
            )
        if self.subcommand == "fit" and not checkpoint and not last:
            folder = free_folder(root)
            if folder != root:
                why = "holds a run already" if is_run(root) else "is not empty"
                rank_zero_only(print)(f"{root} {why}; this one goes to {folder}")
        elif self.subcommand in {"validate", "test"}:
            folder = free_folder(root / str(self.subcommand))  # else the run's own front and summary would be lost
            if checkpoint and launched_as() == 0 and (line := run_in_progress(Path(checkpoint), root, folder)):
                print(line)
        if self.subcommand == "fit":
            if not (checkpoint and Path(checkpoint).absolute().is_relative_to(folder.absolute())):
                refuse_foreign(folder)
            if launched_as() == 0:
                refuse_unwritable(folder)
                refuse_if_held(folder)
        config.trainer.default_root_dir = str(folder)
        config.checkpoint.dirpath = place.dirpath
        if self.subcommand == "fit" and checkpoint and Path(checkpoint).exists():
            self._settle(Path(checkpoint), root)
        seed_run(config, root / "config.yaml" if self.subcommand == "fit" and config.get("ckpt_path") else None)

    def _place_of(self, checkpoint: Path, place: RunPlace) -> RunPlace:
        """Where a run continues, or is evaluated, from a checkpoint that is named by its path: in its own folder."""
        refuse_no_checkpoint(checkpoint)
        require_valid(checkpoint)
        run = run_of(checkpoint)
        if run is None:
            if self.subcommand == "fit":
                refuse_other_run(checkpoint, place.root)
            return place
        if run.resolve() == place.root.resolve():
            return place
        if self.subcommand == "fit":
            rank_zero_only(print)(
                f"resumed: in {run}, the folder of the checkpoint's run; trainer.default_root_dir {place.root} is not "
                "used"
            )
        return place.moved_to(run)

    def _best(self, place: RunPlace) -> str:
        """What ``ckpt_path: best`` means: the evaluation that met the run's thresholds best.

        Lightning's own meaning needs the process that trained.
        """
        best = place.checkpoints / BEST
        if not best.exists():
            raise UserError(
                f"ckpt_path: 'best' finds no {best}: runs with thresholds keep one, once an evaluation was ranked; "
                "give a path, or 'last'"
            )
        require_valid(best)
        return str(best)

    def _newest(self, place: RunPlace) -> str | None:
        """What ``ckpt_path: last`` means: the newest valid checkpoint of the run folder, or a start in it."""
        folder, found = place.checkpoints, place.newest()
        if found is None and self.subcommand != "fit":
            raise UserError(f"ckpt_path: 'last' finds no valid checkpoint in {folder}; give a path")
        if found is None and any(folder.glob("*.ckpt")):  # a start would write over what may be all there is of a run
            raise UserError(
                f"ckpt_path: 'last' finds no valid checkpoint in {folder}, only broken ones; remove them to start over"
            )
        verb = "resumes from" if self.subcommand == "fit" else "loads"
        how = f"{verb} {found}" if found else f"starts in {place.root}: there is no checkpoint yet"
        rank_zero_only(print)(f"ckpt_path=last: {how}")
        return None if found is None else str(found)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer, with tracking added to the user's loggers and callbacks."""
        config = self.config_init[self.subcommand]
        root = config.trainer.default_root_dir
        given = config.trainer.get("logger")
        loggers: list[Any] = [MetricsFile(root)]  # the first one decides where Lightning puts config and checkpoints
        if given not in (None, True, False):
            loggers += list(given) if isinstance(given, list) else [given]
        if config.wandb != "off":
            # Absolute: wandb's service may be one that was started in another folder. What it records of the machine
            # holds the command line, and so any secret there.
            folder = str(Path(root).absolute())
            loggers.append(
                WandbLogger(
                    project=config.wandb_project,
                    save_dir=folder,
                    offline=config.wandb == "offline",
                    settings={"x_disable_meta": True} if masked_arguments(sys.argv) != sys.argv else None,
                )
            )
        plugins = config.trainer.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        try:
            trainer: Trainer = super().instantiate_trainer(logger=loggers, plugins=plugins, **kwargs)
        except UserError:
            raise
        except Exception as error:  # Lightning's own check of its flags, such as an accelerator that is not here
            raise UsageError(f"trainer: {' '.join(str(error).split()) or type(error).__name__}") from error
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        observers: list[Callback] = [ObjectiveMetrics(), Throughput(), MetricsBeforeCheckpoints()]
        if config.get("enable_progress_bar") in (None, True):
            observers.append(ObjectiveProgressBar())
        trainer: Trainer = super()._instantiate_trainer(config, [*observers, *callbacks, Preemption()])
        return trainer

    def instantiate_classes(self) -> None:
        """Build module, data and Trainer."""
        try:
            self.config_init = self.parser.instantiate(self.config)  # the name that Lightning calls is deprecated
        except MisconfigurationException as error:  # of a callback, such as a monitor without a mode
            raise UsageError(f"callbacks: {error}") from error
        self.datamodule = self._get(self.config_init, "data")
        if self.datamodule.one_thread and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
        self.model = self._get(self.config_init, "model")
        self.trainer = self.instantiate_trainer()
        if self.subcommand == "fit":
            check_monitors(self.trainer, self.model)
        resolved = self._resolved()
        self.model.record = masked(resolved)
        if self.trainer.world_size > 1:
            self.model.settings = flat(resolved)

    def _resolved(self) -> dict[str, Any]:
        """All settings of the command as plain data, nested."""
        whole: dict[str, Any] = json.loads(self.parser.dump(self.config, skip_none=False, format="json"))
        resolved: dict[str, Any] = whole[str(self.subcommand)]
        return resolved

    def _settle(self, checkpoint: Path, root: Path) -> None:
        """Report what a resumed run changes, and keep what it cannot."""
        before = settings_in(checkpoint) or settings_of(root)  # an earlier version left it to config.yaml
        if not before:
            rank_zero_only(print)(
                "resumed: the checkpoint does not say under which settings it was written; changes are not reported"
            )
        for line in settle(before, masked(self._resolved()), self.config[self.subcommand]):
            rank_zero_only(print)(line)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; what Lightning finds wrong with a flag only now, such as a monitor that nobody logs, is the user's."""
        try:
            super()._run_subcommand(subcommand)
        except MisconfigurationException as error:
            raise UsageError(f"trainer: {' '.join(str(error).split())}") from error

    def after_predict(self) -> None:
        """Say where the responses are."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # set, not declared
        writer = next(callback for callback in callbacks if isinstance(callback, PredictionWriter))
        if self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero:
            print(f"responses written to {', '.join(map(str, writer.files(self.trainer)))}")

    def after_fit(self) -> None:
        """Evaluate the final policy, unless the last evaluation was of it already; print the summary."""
        if self.trainer.global_step and self.model.evaluated_at != self.trainer.global_step:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        if self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero:
            print_summary(Path(self.trainer.default_root_dir))
        self._release()

    def after_validate(self) -> None:
        """Leave the folder of the evaluation to others."""
        self._release()

    def after_test(self) -> None:
        """Leave the folder of the evaluation to others."""
        self._release()

    def _release(self) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # set, not declared
            if isinstance(callback, RunConfig):
                callback.release()
