"""Metrics of the objectives while training.

Legend: B responses, T tokens, N trained objectives.
"""

import math
from itertools import combinations
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moa_lightning.distributed import all_sum, world_size
from moa_lightning.types import Experience, Minibatch, RewardTable, StepOutput
from moa_lightning.utils.moments import moments


class ObjectiveMetrics(Callback):
    """Logs what each objective does in training: rewards, advantages, value losses, weights, correlations.

    On each collected batch, over all processes, responses that an objective could not score left out:
    ``rewards/<name>/mean`` and ``/std`` (raw scores, in the reward's own units), ``/standardized`` (mean in standard
    deviations from the first batch's mean), ``/missing`` (share without a score), ``values/<name>/mean`` and ``/std``
    (after scale, shift and clip, of objectives that have one), ``advantages/<name>/mean`` and ``/std``,
    ``correlation/<a>/<b>`` (Pearson), ``completions/mean_length`` and ``/truncated``, and what the source measured
    (``kl``, ``kl_coefficient``, ``prior_ess``, …).
    What the combiner reports of its memory, such as ``duals/<name>``, ``thresholds/<name>`` and ``values/<name>``.
    On each update: ``weights/<name>``, ``score/mean``, and the terms of the loss (``value_loss/<name>``, ``entropy``,
    ``clip_ratio``, …).
    """

    def __init__(self) -> None:
        self._origin: dict[str, tuple[float, float]] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Minibatch, batch_idx: int
    ) -> None:
        """Log this update, and the batch that was collected for it."""
        step: StepOutput = outputs["step"]
        mask_BT = step.minibatch.experience.mask_BT
        score_BT = step.score_BT if step.score_BT.ndim == 2 else step.score_BT.unsqueeze(1).expand(mask_BT.shape)
        terms = {name: value.float() for name, value in step.terms.items()}
        # As with the gradients, the mean of the processes' terms is the term of all rows; the rest are sums and counts.
        sums = all_sum(
            torch.stack([*terms.values(), score_BT.where(mask_BT, 0.0).sum().float(), mask_BT.sum().float()])
        )
        metrics = dict(zip(terms, (sums[:-2] / world_size()).tolist(), strict=True))
        metrics["score/mean"] = float(sums[-2] / sums[-1].clamp(min=1))
        metrics |= {f"weights/{n}": w for n, w in zip(step.names, step.weights_N.tolist(), strict=True)}
        if batch.collected is not None:
            metrics |= self._of_collected(batch.collected)
            metrics |= {
                f"{key}/{name}": value
                for key, values in combiner_report(pl_module).items()
                for name, value in values.items()
            }
        pl_module.log_dict(metrics, batch_size=len(batch.experience))  # the same on all processes

    def _of_collected(self, collected: Experience) -> dict[str, float]:
        rewards, responses = collected.rewards, collected.responses
        count_N, mean_N, std_N = moments(rewards.raw_BN.double())
        total = all_sum(torch.tensor(float(len(collected)), device=count_N.device))
        metrics: dict[str, float] = {}
        for name, count, mean, std in zip(
            rewards.names, count_N.tolist(), mean_N.tolist(), std_N.tolist(), strict=True
        ):
            if count:
                origin, spread = self._origin.setdefault(name, (mean, std))
                metrics[f"rewards/{name}/mean"], metrics[f"rewards/{name}/std"] = mean, std
                metrics[f"rewards/{name}/standardized"] = (mean - origin) / spread if spread > 0 else 0.0
            metrics[f"rewards/{name}/missing"] = 1 - count / float(total)
        metrics |= _of_values(rewards)
        present_BTN = collected.mask_BT.unsqueeze(-1) & collected.valid_BN.unsqueeze(1)
        advantages_BTN = collected.advantages_BTN.where(present_BTN, torch.nan)
        _, mean_N, std_N = moments(advantages_BTN.flatten(0, 1).double())
        for i, name in enumerate(rewards.trained_names):
            metrics[f"advantages/{name}/mean"] = float(mean_N[i])
            metrics[f"advantages/{name}/std"] = float(std_N[i])
        metrics |= _correlations(rewards.trained_names, rewards.trained_BN.double())
        truncated, tokens = all_sum(
            torch.stack([responses.truncated_B.double().sum(), responses.lengths_B.double().sum()])
        ).tolist()
        metrics["completions/truncated"] = truncated / float(total)
        metrics["completions/mean_length"] = tokens / float(total)
        measured = {"kl": collected.kl, "kl_coefficient": collected.kl_coefficient}
        return metrics | {name: value for name, value in measured.items() if value is not None} | collected.metrics

    def state_dict(self) -> dict[str, Any]:
        """Where standardised rewards count from."""
        return {"origin": {name: list(value) for name, value in self._origin.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from there."""
        self._origin = {name: (value[0], value[1]) for name, value in state_dict["origin"].items()}


def combiner_report(pl_module: LightningModule) -> dict[str, dict[str, float]]:
    """What the combiner reports, by objective; without what an objective does not have."""
    module: Any = pl_module
    found: dict[str, Any] = module.combiner.report(module.combiner_state)
    return {
        key: {name: v for name, v in zip(module.objective_names, values_N.tolist(), strict=True) if math.isfinite(v)}
        for key, values_N in found.items()
    }


def _of_values(rewards: RewardTable) -> dict[str, float]:
    """Mean and standard deviation of the values of objectives whose value is not the raw score."""
    metrics: dict[str, float] = {}
    count_N, mean_N, std_N = moments(rewards.value_BN.double())
    for i, name in enumerate(rewards.names):
        if count_N[i] and name in rewards.transform_by_name:
            metrics[f"values/{name}/mean"], metrics[f"values/{name}/std"] = float(mean_N[i]), float(std_N[i])
    return metrics


def _correlations(names: tuple[str, ...], values_BN: torch.Tensor) -> dict[str, float]:
    """Pearson correlation of each pair over the responses that both could score, over all processes."""
    metrics = {}
    for i, j in combinations(range(len(names)), 2):
        # Var[x + y] = Var[x] + Var[y] + 2 Cov[x, y]. torchmetrics' PearsonCorrCoef wants rows on every process.
        x_B, y_B = values_BN[:, i], values_BN[:, j]
        sum_B = x_B + y_B
        both_B3 = torch.stack([x_B, y_B, sum_B], dim=1).where(torch.isfinite(sum_B).unsqueeze(1), torch.nan)
        count_3, _, std_3 = moments(both_B3)
        x, y, total = std_3.tolist()
        if count_3[0] > 1 and x > 0 and y > 0:
            metrics[f"correlation/{names[i]}/{names[j]}"] = (total**2 - x**2 - y**2) / (2 * x * y)
    return metrics
