"""Combiners with a memory on rollouts, interrupted and gone on with: to the bit what it is without the break."""

import pytest
import torch
from lightning.pytorch import Callback
from torchjd.aggregation import PCGradWeighting

from moa_lightning.combiners import CAID, CTWA, PID, DynamicWeights, Gramian, Lagrangian, Tchebycheff
from moa_lightning.losses import ClippedSurrogate
from moa_lightning.rewards import Length, Objective
from moa_lightning.sources import GroupRelative, Rollout
from tests.end_to_end.test_matrix import Films, FunctionReward, goodness
from tests.helpers import pairs, tiny

MODES = {
    "DynamicWeights": lambda: DynamicWeights(
        lr=0.5, interval=2, growth_scale=0.1, reference={"good": -9.0, "short": -9.0}
    ),
    "DynamicWeights at the last layer": lambda: DynamicWeights(lr=0.5, interval=1, at="last_layer"),
    "CTWA": lambda: CTWA(lr=0.5, targets=1.0),
    "Lagrangian": lambda: Lagrangian(thresholds={"short": -0.1}, window=2, dual=PID(kp=1.0, ki=1.0)),
    "CAID": lambda: CAID(reference_batches=2, interval=1, window=2),
    "Tchebycheff": Tchebycheff,
    "PCGrad": lambda: Gramian(PCGradWeighting()),
}


class Recorder(Callback):
    """Losses, and what the combiner remembers after each step."""

    def __init__(self):
        self.losses, self.states = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.states.append({name: value.clone() for name, value in pl_module.combiner_state.items()})


def module(folder, mode):
    return pairs.module(
        folder,
        combiner=MODES[mode](),
        source=Rollout(max_new_tokens=6, num_generations=4, num_iterations=2, advantages=GroupRelative()),
        loss=ClippedSurrogate(),
        objectives={
            "good": Objective(FunctionReward(goodness)),
            "short": Objective(Length(divisor=8.0), scale=-1.0),
        },
    )


def run(folder, moa, steps, **options):
    recorder = Recorder()
    running = pairs.trainer(
        folder, max_steps=steps, callbacks=[recorder], val_check_interval=2, num_sanity_val_steps=-1
    )
    running.fit(moa, datamodule=Films(batch_size=4), **options)
    return running, recorder


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
def test_two_halves_are_the_whole(tmp_path, mode):
    folder = tiny.policy_folder(tmp_path / "policy", scale=1.0)
    whole = module(folder, mode)
    _, straight = run(tmp_path / "run", whole, 6)
    running, first = run(tmp_path / "run", module(folder, mode), 3)  # between the passes over a batch
    running.save_checkpoint(tmp_path / "half.ckpt")
    resumed = module(folder, mode)
    torch.manual_seed(99)
    _, second = run(tmp_path / "run", resumed, 6, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert first.losses + second.losses == straight.losses
    assert_same(first.states + second.states, straight.states)
    assert_same(dict(resumed.named_parameters()), dict(whole.named_parameters()))
    # What is compared has moved, in both halves.
    before, middle, end = (straight.states[i] for i in (0, 2, 5))
    assert any(not torch.equal(before[n].nan_to_num(9), middle[n].nan_to_num(9)) for n in before)
    assert any(not torch.equal(middle[n].nan_to_num(9), end[n].nan_to_num(9)) for n in before)


def test_a_combiner_hears_of_each_evaluation_once(tmp_path):
    folder = tiny.policy_folder(tmp_path / "policy", scale=1.0)
    heard = []

    class Listening(DynamicWeights):
        def observe_evaluation(self, values_N, state):
            heard.append(values_N.tolist())
            return super().observe_evaluation(values_N, state)

    moa = module(folder, "DynamicWeights")
    object.__setattr__(moa, "combiner", Listening(lr=0.0, growth_scale=1.0))
    moa.combiner_state = moa.combiner.init(moa.objective_names, torch.ones(2))
    means = []

    class Means(Callback):
        def on_validation_epoch_start(self, trainer, pl_module):
            self.values = []

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            self.values.append(outputs.rewards.value_BN)

        def on_validation_epoch_end(self, trainer, pl_module):
            means.append(torch.cat(self.values).mean(0).tolist())

    running = pairs.trainer(
        tmp_path / "run", max_steps=4, callbacks=[Means()], val_check_interval=2, num_sanity_val_steps=-1
    )
    running.fit(moa, datamodule=Films(batch_size=4))
    assert len(heard) == 3  # before the first step, after the second and after the fourth
    torch.testing.assert_close(heard, means, rtol=1e-5, atol=1e-6)
