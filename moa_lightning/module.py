"""The LightningModule: one policy, N objectives, one combiner.

Legend: B sequences, T tokens, N trained objectives.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.optim import Optimizer

from moa_lightning.chat import end_tokens
from moa_lightning.combiners import PAMA, Combiner
from moa_lightning.distributed import all_sum
from moa_lightning.errors import UserError
from moa_lightning.losses import KLPenalty, PolicyLoss, RewardKL
from moa_lightning.losses.base import with_values_in_graph
from moa_lightning.models import AdapterOff, Encoder, FrozenCopy, Policy, PolicyConfig, Reference, ValueHeads
from moa_lightning.models.loading import load_config, load_tokenizer
from moa_lightning.rewards import Objective, RewardPanel
from moa_lightning.sources import Actors, ExperienceLoader, Rollout, Source
from moa_lightning.sources.prompt_loader import PromptLoader
from moa_lightning.training import compatibility
from moa_lightning.training.agreement import in_agreement
from moa_lightning.training.finite_updates import (
    naming_the_step,
    require_finite,
    require_finite_gradients,
    require_finite_weights,
)
from moa_lightning.training.resumption import OptimizerSettings, ResumedModule
from moa_lightning.training.scheduled_weights import ScheduledWeights
from moa_lightning.training.strategies import load, place
from moa_lightning.types import (
    Evaluation,
    Experience,
    Minibatch,
    PromptBatch,
    RewardTable,
    State,
    Statistics,
    StepOutput,
)
from moa_lightning.utils.moments import Moments
from moa_lightning.utils.random_state import run_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


class AlignmentModule(ResumedModule):
    """Aligns a policy to several objectives at once.

    Optimisation is automatic: the Trainer's flags for clipping, accumulation, precision and schedules apply unchanged.

    Args:
        policy: the model to align.
        objectives: what to align it to, by name; higher is better.
        combiner: combines N objectives into one update; ``None`` is ``PAMA()``.
        source: collects experience; ``None`` is ``Rollout()``.
        loss: computes a loss from the combined score; ``None`` is the combiner's default.
        kl: KL penalty towards the reference; ``None`` is ``RewardKL()``.
        reference: the reference policy; ``None`` is ``AdapterOff`` with an adapter, else ``FrozenCopy``.
        optimizer: creates an optimiser for parameters; ``None`` is AdamW with learning rate 1e-5.
        lr_scheduler: creates a schedule for the optimiser, stepped after each optimiser step.
        value_learning_rate: of the value heads; ``None`` is the optimiser's.
        silent_batches: stop if an objective has scored no response after this many batches of the run; 0 never stops.
        seed: of evaluations. All evaluations of a run use the same random numbers, so that they can be compared.
            ``None`` is the run's seed (``seed_everything``).
    """

    settings: Mapping[str, str] = {}  # of the command line by dotted key; equal on all processes
    record: Mapping[str, Any] = {}  # the same settings, nested and without secrets, for checkpoints

    def __init__(
        self,
        policy: PolicyConfig,
        objectives: dict[str, Objective],
        combiner: Combiner | None = None,
        source: Source | None = None,
        loss: PolicyLoss | None = None,
        kl: KLPenalty | None = None,
        reference: Reference | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        value_learning_rate: float | None = None,
        silent_batches: int = 10,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.policy_config = policy
        self.panel = RewardPanel(objectives)
        self.combiner = combiner or PAMA()
        self.source = source or Rollout()
        self.loss = loss or compatibility.fitting_loss(self.combiner)
        self.kl = kl or RewardKL()
        has_adapter = policy.lora is not None or policy.is_adapter
        self.reference = reference or (AdapterOff() if has_adapter else FrozenCopy())
        if value_learning_rate is not None and not 0 <= value_learning_rate < math.inf:
            raise UserError(f"value_learning_rate must be a finite number >= 0 (or null), got {value_learning_rate}")
        compatibility.check_optimizer(optimizer)
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        if silent_batches < 0:
            raise UserError(f"silent_batches must be at least 0, got {silent_batches}")
        self.value_learning_rate = value_learning_rate
        self.silent_batches = silent_batches
        self._batches = 0
        self.seed = seed
        self.strict_loading = False  # checkpoints do not hold frozen weights; check_weights checks the others

        self.reference.check(has_adapter)
        compatibility.check_compatible(self.combiner, self.source, self.loss, self.kl, self.panel)
        # The states of combiner and KL control are plain float32 tensors, because bf16-true would cast buffers.
        self.weights = ScheduledWeights(self.combiner, self.panel)
        self.combiner_state: State = self.weights.start()
        self.kl_state: State = self.kl.init()
        self.policy: Policy
        self.encoder: Encoder
        self.tokenizer: PreTrainedTokenizerBase
        self._evaluation = Moments(2 * len(self.panel.names))  # of an evaluation's values, then of its raw scores
        self._evaluated: RewardTable | None = None  # of its last batch, for names and transforms
        self._panel_device: torch.device | None = None
        self._scored_N = torch.zeros(len(self.objective_names), dtype=torch.bool)

    @property
    def objective_names(self) -> tuple[str, ...]:
        """Names of the trained objectives, in order."""
        return tuple(self.panel.trained_names)

    @property
    def evaluated_in_wins(self) -> frozenset[str]:
        """The trained objectives whose evaluations are win probabilities, the unit of some combiners' thresholds."""
        fixed = {name for name in self.objective_names if self.panel.objectives[name].reward.fixed_rivals}
        return frozenset(self.objective_names if self.source.reads_candidates else fixed)

    # Setup: cheap checks first, weights last.

    def setup(self, stage: str) -> None:
        """Load tokenizer and config, and check prompts and columns, before any weights are loaded."""
        with in_agreement(self, stage):
            compatibility.check_strategy(self.combiner, self.trainer.strategy)
            self.weights.check(self.trainer)
            data = getattr(self.trainer, "datamodule", None)
            compatibility.check_columns(data, self.source, self.panel)
            config = load_config(self.policy_config)
            self.tokenizer = load_tokenizer(self.policy_config)
            context = getattr(config.get_text_config(), "max_position_embeddings", None)
            self.encoder = self.source.encoder(self.tokenizer, tuple(end_tokens(self.tokenizer)), context)
            if data is not None:
                data.screen(stage, self.encoder.problem)

    def configure_model(self) -> None:
        """Load the policy, its value heads and its reference. Further calls, by some strategies, do nothing."""
        if "policy" in self._modules:
            return
        backbone, meta_model = load(self.policy_config, self.trainer.strategy)
        heads = None
        if self.source.needs_values:
            heads = ValueHeads(backbone.config.get_text_config().hidden_size, self.objective_names)
            heads.restore(Path(self.policy_config.path).expanduser())
        self.policy = Policy(backbone, self.tokenizer, heads)
        place(self.policy, self.reference, self.panel, self.trainer.strategy, meta_model)
        self.encoder = self.source.encoder(self.tokenizer, tuple(self.policy.end_ids), self.encoder.context_length)

    # Data: called by the datamodule.

    def experience_loader(self, rows: Sequence[Row], batch_size: int, seed: int) -> ExperienceLoader:
        """Create the loader of minibatches of experience, which is collected on these prompts.

        Raises:
            UserError: there are too few prompts, or the minibatches do not divide a batch evenly.
        """
        source = self.source
        compatibility.check_minibatches(self.combiner, self.loss, source, batch_size)
        counts = (source.responses_per_prompt, source.minibatches, source.updates_per_batch)
        return ExperienceLoader(rows, batch_size, self.collect, *counts, seed)

    def prompt_loader(self, rows: Sequence[Row], batch_size: int) -> Iterable[PromptBatch]:
        """Create the loader of batches of prompts for evaluation."""
        return PromptLoader(rows, batch_size, self.encoder.encode)

    def collect(self, rows: Sequence[Row], seed: int) -> Experience:
        """Collect experience with the current policy, and update the states of combiner and KL control."""
        self.reference.advance(self.policy, self.global_step)
        batch = self.encoder.encode(rows).to(self.device)
        with naming_the_step(self.trainer), torch.no_grad(), self.trainer.precision_plugin.forward_context():
            experience = self.source.collect(batch, self._actors(), seed)
        self._require_scores(experience)
        state = self.weights.advance(self.trainer, self.combiner_state)
        self.combiner_state = self.combiner.observe(experience, state)
        experience.metrics |= self.weights.report(state)
        if experience.kl is not None:
            self.kl_state = self.kl.observe(experience.kl, experience.sequences, self.kl_state)
        return experience

    def _require_scores(self, experience: Experience) -> None:
        """Stop if an objective has never scored a response on any process."""
        if self._batches >= self.silent_batches:
            return
        scored_N = experience.valid_BN.any(0) | experience.rewards.valid_BN.to(experience.valid_BN.device).any(0)
        self._scored_N = (all_sum(scored_N.float()) > 0).cpu() | self._scored_N
        self._batches += 1
        scored = self._scored_N.tolist()
        silent = [name for name, has in zip(self.objective_names, scored, strict=True) if not has]
        if silent and self._batches == self.silent_batches:
            raise UserError(
                f"objective {', '.join(silent)} scored none of the responses of the first {self._batches} batches "
                "(None, NaN or infinite each time), so nothing is trained on it; mend its reward, remove it, or raise "
                "--model.silent_batches"
            )

    def _actors(self) -> Actors:
        if self._panel_device != self.device:  # only known once the strategy has placed the module
            self.panel.setup(self.device)
            self._panel_device = self.device
        return Actors(self.policy, self.reference, self.panel, self.encoder, self.kl, self.kl_state)

    def training_step(self, batch: Minibatch, batch_idx: int) -> dict[str, Any]:
        """Run one update: forward pass, signals, combination, loss. It is the same for all sources and combiners."""
        started = time.perf_counter()
        experience = batch.experience
        responses = experience.responses
        output = self.policy(
            responses.input_ids_BL, responses.attention_mask_BL, responses.mask_BT, self.source.temperature
        )
        parameters = self.policy.parameters_at(self.combiner.gradients_at)
        signals = self.source.signals(experience, output, self.loss.clip_range, parameters)
        combined = self.combiner.combine(signals, self.combiner_state)
        if combined.state is not None:
            self.combiner_state = combined.state
        result = self.loss(combined, experience, output, self.kl)
        require_finite(result, experience, self.trainer)
        self.log("loss", result.loss.detach(), prog_bar=True, batch_size=len(experience), sync_dist=True)
        step = StepOutput(
            names=self.objective_names,
            weights_N=combined.mean_weights().detach(),
            score_BT=combined.score.detach(),
            terms=result.terms,
            minibatch=batch,
            seconds=time.perf_counter() - started,
        )
        return {"loss": with_values_in_graph(result.loss, output), "step": step}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Stop before a step with a gradient that is NaN or infinite."""
        require_finite_gradients(self, optimizer, self.trainer)

    def configure_optimizers(self) -> Any:
        """Create the optimiser for the trained parameters; value heads may have their own learning rate."""
        backbone, heads = self.policy.trainable()
        groups: list[dict[str, Any]] = [{"params": backbone}]
        if heads:
            own = {} if self.value_learning_rate is None else {"lr": self.value_learning_rate}
            groups.append({"params": heads, **own})
        try:
            optimizer = self.make_optimizer(groups) if self.make_optimizer else torch.optim.AdamW(groups, lr=1e-5)
        except (TypeError, ValueError) as error:  # such as betas out of range
            raise UserError(f"model.optimizer: {error}") from error
        self.optimizer_given = OptimizerSettings.of(optimizer)
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }

    # Evaluation.

    # Lightning passes any return value to the callbacks; its annotation allows only tensors and mappings.
    def validation_step(self, batch: PromptBatch, batch_idx: int) -> Evaluation:  # type: ignore[override]
        """Respond to prompts and score the responses.

        Logs each objective's mean raw score as ``val/rewards/<name>/mean`` and, if values differ from raw scores, its
        mean value as ``val/values/<name>/mean``. The step of an evaluation is the number of updates before it.
        """
        return self._evaluate(batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        """Start the statistics of this evaluation."""
        self._evaluation.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the evaluation at its step, and update the combiner's state once for each completely evaluated step."""
        self._log_evaluation("val")
        step = self.trainer.global_step
        if self.trainer.sanity_checking and self.trainer.num_sanity_val_steps != math.inf:
            return
        if self.evaluated_at != step:  # a resumed run may evaluate the same step again
            statistics = self.evaluation_statistics()
            means_N = torch.tensor([statistics[name].mean for name in self.objective_names])
            self.combiner_state = self.combiner.observe_evaluation(means_N, self.combiner_state)
        self.evaluated_at = step

    def evaluation_statistics(self) -> dict[str, Statistics]:
        """Statistics of the evaluation so far, of each objective by name. Every process calls it; callbacks may."""
        if self._evaluated is None:
            return {}
        return Statistics.by_name(self._evaluated, self._evaluation.compute())  # computed once, then cached

    def _log_evaluation(self, prefix: str) -> None:
        """Log an evaluation's means at the number of updates before it, including those of the sanity check."""
        statistics = self.evaluation_statistics()
        means = {f"{prefix}/rewards/{name}/mean": one.raw_mean for name, one in statistics.items()}
        means |= {f"{prefix}/values/{name}/mean": one.mean for name, one in statistics.items() if one.transform}
        if self.trainer.sanity_checking:  # Lightning discards what is logged then
            for logger in self.trainer.loggers:
                logger.log_metrics(means, self.steps_done)
        else:
            self.log_dict(means, batch_size=1, reduce_fx="max", sync_dist=True)  # the same on all processes
            # Lightning would use the index of the last update, which is one less. A metric of this name sets the step.
            self.log("step", float(self.steps_done), batch_size=1, reduce_fx="max", sync_dist=True)

    def on_validation_end(self) -> None:
        """Drop the logged step, so that the names of checkpoints between evaluations have their own step."""
        self.trainer.callback_metrics.pop("step", None)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> Evaluation:  # type: ignore[override]
        """Respond and score, like :meth:`validation_step`, with the prefix ``test/`` in the metrics."""
        return self._evaluate(batch, batch_idx)

    def on_test_epoch_start(self) -> None:
        """Start the statistics of this evaluation."""
        self._evaluation.reset()

    def on_test_epoch_end(self) -> None:
        """Log the test metrics at the number of updates of the weights."""
        self._log_evaluation("test")

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> Evaluation:
        """Respond to prompts and score the responses, without logging."""
        return self._respond(batch, batch_idx)

    def _evaluate(self, batch: PromptBatch, batch_idx: int) -> Evaluation:
        evaluation = self._respond(batch, batch_idx)
        self._evaluated = evaluation.rewards
        self._evaluation.update(torch.cat([evaluation.rewards.value_BN, evaluation.rewards.raw_BN], dim=1))
        return evaluation

    def _respond(self, batch: PromptBatch, batch_idx: int) -> Evaluation:
        with naming_the_step(self.trainer):
            return self.source.evaluate(batch, self._actors(), self._evaluation_seed(batch_idx)).counted(batch)

    def _evaluation_seed(self, batch_idx: int) -> int:
        return ((run_seed(self.seed) + 1) * 15_485_863 + batch_idx) % 2**62

    # Checkpoints: the trained weights, and the states of combiner and KL control.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop frozen weights, and add the states of combiner and KL control.

        Raises:
            NonFiniteError: a weight is NaN or infinite; nothing is written.
        """
        require_finite_weights(self, self.trainer)
        trained = self._trained_keys()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["moa"] = {
            "combiner": type(self.combiner).__name__,
            "objectives": list(self.objective_names),
            "combiner_state": self.combiner_state,
            "kl_state": self.kl_state,
            "reference_class": type(self.reference).__name__,
            "reference": self.reference.state_dict(),
            "evaluated_at": self.evaluated_at,
            "progress": self.weights.progress,
            "classes": {name: type(component).__name__ for name, component in self._components().items()},
            "optimizer": None if self.optimizer_given is None else self.optimizer_given.plain(),
            "settings": dict(self.record),
        }
        checkpoint["moa_format"] = compatibility.FORMAT

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other components or objectives, and restore the states.

        Raises:
            UserError: one line with what differs, is missing, or is invalid.
        """
        saved = compatibility.check_checkpoint(checkpoint, self.objective_names, self.combiner, self._components())
        compatibility.check_state(type(self.kl).__name__, saved["kl_state"], self.kl.init())
        fresh = self.weights.resume(saved.get("progress", 0.0), self.combiner_state)
        name = type(self.combiner).__name__
        try:
            state = self.combiner.resume(saved["combiner_state"], fresh)
        except KeyError as error:  # a combiner may accept that earlier checkpoints lack an entry; this one does not
            compatibility.check_state(name, {}, {str(error.args[0]): None})
            raise
        compatibility.check_state(name, state, fresh)
        self.combiner_state = state
        self.kl_state = saved["kl_state"]
        self.evaluated_at = saved.get("evaluated_at")
        self.loaded_step = int(checkpoint["global_step"])
        self.reference.load_state_dict(saved["reference"])
        self.optimizer_before = OptimizerSettings.of_checkpoint(checkpoint)

    def _components(self) -> dict[str, object]:
        return {"reference": self.reference, "kl": self.kl, "loss": self.loss, "source": self.source}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load trained weights. Checkpoints do not hold frozen ones, which stay as loaded from the policy's folder."""
        self.check_weights(state_dict)
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def check_weights(self, saved: Mapping[str, Any]) -> None:
        """Refuse a checkpoint whose weights differ from the trained ones in name or shape."""
        compatibility.check_weights(saved, self._trained_keys(), self.state_dict())

    def _trained_keys(self) -> set[str]:
        named = self.named_parameters(remove_duplicate=False)  # a tied weight has two names
        frozen = {name for name, parameter in named if not parameter.requires_grad}
        below = tuple(f"{name}." for name in frozen)  # prefixes of the scales of quantised weights
        return {key for key in self.state_dict() if key not in frozen and not key.startswith(below)}
