"""Every combiner of the package in every mixed precision: a gradient that is not finite makes no step.

What is added to ``moa_lightning.combiners`` enters by itself.
"""

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from moa_lightning.training.checkpoints import AtomicCheckpointIO, newest_valid
from moa_lightning.training.compatibility import fitting_loss
from moa_lightning.utils.non_finite import NonFiniteError, names_of_non_finite
from tests.end_to_end.test_matrix import AT_ONCE, COMBINERS, lacking, module, settings
from tests.helpers import pairs, tiny
from tests.training.test_finite_updates import Break, finite

pytestmark = pytest.mark.filterwarnings("ignore:objective 'kind' did not score", "ignore:MOPO's labels")


def fit(tmp_path, combiner, *callbacks, **options):
    """Four steps with a checkpoint after each."""
    loss = type(fitting_loss(COMBINERS[combiner](**AT_ONCE.get(combiner, {})))).__name__
    source = "PreferenceRows" if lacking(combiner, "Rollout-4", loss) else "Rollout-4"
    moa = module(tiny.policy_folder(tmp_path / "policy", scale=1.0), combiner, source, loss)
    saving = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    running = pairs.trainer(
        tmp_path / "run",
        max_steps=4,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        gradient_clip_val=1.0,
        callbacks=[*callbacks, saving],
        plugins=[AtomicCheckpointIO(), *options.pop("plugins", [])],
        **options,
    )
    running.fit(moa, datamodule=settings(source)[1](tmp_path))
    return moa


def saved(tmp_path, step):
    return torch.load(tmp_path / "checkpoints" / f"step={step}.ckpt", weights_only=True)


def moved(tmp_path, step):
    """Whether the weights after a step differ from those before it."""
    before, after = (saved(tmp_path, s)["state_dict"] for s in (step - 1, step))
    return any(not torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("combiner", COMBINERS)
def test_in_bfloat16_the_run_stops_before_the_step(tmp_path, combiner):
    with pytest.raises(NonFiniteError, match="the gradient is not finite at step 3: no single objective"):
        fit(tmp_path, combiner, Break(3, math.nan), precision="bf16-mixed")
    assert newest_valid(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step=3.ckpt"
    assert moved(tmp_path, 3)
    assert finite(tmp_path / "run" / "non_finite.ckpt")


class Scaled(Callback):
    """The scale at each step, and whether the run looked at the gradient itself."""

    def __init__(self):
        self.scales = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.scales.append(trainer.precision_plugin.scaler.get_scale())


@pytest.mark.parametrize("combiner", COMBINERS)
def test_in_float16_torchs_scaler_leaves_the_step_out(tmp_path, combiner):
    """With ``GradScaler`` itself, which torch has for the CPU too; Lightning would take bfloat16 there."""
    scaled, scaler = Scaled(), torch.amp.GradScaler("cpu", init_scale=256.0)
    moa = fit(tmp_path, combiner, Break(2, math.inf), scaled, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaled.scales == [256.0, 256.0, 128.0, 128.0]
    assert [moved(tmp_path, step) for step in (2, 3, 4)] == [True, False, True]
    assert saved(tmp_path, 4)["MixedPrecision"]["scale"] == 128.0
    assert not names_of_non_finite(dict(moa.named_parameters()))
    assert all(finite(file) for file in (tmp_path / "checkpoints").glob("*.ckpt"))
