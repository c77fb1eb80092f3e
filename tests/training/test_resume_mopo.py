"""MOPO on preference rows, interrupted and gone on with: to the bit what it is without the break."""

import pytest
import torch
from lightning.pytorch import Callback

from moa_lightning.combiners import MOPO, PID, LogBarrier, Projected
from moa_lightning.losses import WeightedLikelihood
from moa_lightning.models import LaggedCopy
from tests.helpers import pairs, tiny

pytestmark = pytest.mark.filterwarnings("ignore:objective 'kind' did not score", "ignore:MOPO's labels")


class Recorder(Callback):
    """Losses, and what the combiner and the reference remember at each step."""

    def __init__(self):
        self.losses, self.states = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        state = {name: value.clone() for name, value in pl_module.combiner_state.items()}
        self.states.append({**state, "prior": batch.collected.log_prior_B})


MODES = {
    "fixed": {"thresholds": {"kind": 0.6, "short": 0.4}, "dual": Projected(lr=2.0), "dual_delay": 1},
    "adaptive": {"beta": 0.99, "refresh_interval": 2, "dual": Projected(lr=2.0)},
    "corrected": {"thresholds": {"kind": 0.6}, "dual": Projected(lr=2.0), "dual_values": "held_out"},
    "controller": {"thresholds": {"kind": 0.6}, "dual": PID(kp=1.0, ki=1.0, kd=1.0)},
    "robust barrier": {"thresholds": {"kind": 0.2}, "dual": LogBarrier(rate=0.3), "radius": 0.01, "patience": 3},
}


@pytest.fixture
def task(tmp_path):
    return tiny.policy_folder(tmp_path / "policy", scale=1.0), pairs.write(tmp_path / "data.jsonl")


def moa(folder, mode, lora):
    combiner = MOPO(primary="good", **MODES[mode])
    return pairs.module(
        folder, lora, combiner=combiner, loss=WeightedLikelihood(max_weight=3.0), reference=LaggedCopy(2)
    )


def run(task, tmp_path, module, steps, **options):
    recorder = Recorder()
    running = pairs.trainer(tmp_path / "run", max_steps=steps, callbacks=[recorder])
    running.fit(module, datamodule=pairs.data(task[1]), **options)
    return running, recorder


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("half", [5, 6])  # in the middle of an epoch and of an interval; where both begin anew
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_halves_are_the_whole(tmp_path, task, lora, mode, half):
    whole = moa(task[0], mode, lora)
    _, straight = run(task, tmp_path, whole, 2 * half)
    running, first = run(task, tmp_path, moa(task[0], mode, lora), half)
    running.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    resumed = moa(task[0], mode, lora)
    torch.manual_seed(99)
    _, second = run(task, tmp_path, resumed, 2 * half, ckpt_path=tmp_path / "half.ckpt", weights_only=True)

    assert first.losses + second.losses == straight.losses
    assert_same(first.states + second.states, straight.states)
    assert set(straight.states[-1]) >= {"duals", "thresholds", "values", "chi", "batches", "best", "stuck"}
    assert_same(dict(resumed.named_parameters()), dict(whole.named_parameters()))
    references = [one.reference.state_dict() for one in (resumed, whole)]
    assert_same(*references)

    # What is compared has moved, in both halves.
    assert int(straight.states[-1]["batches"]) == 2 * half
    duals = [state["duals"] for state in straight.states]
    assert not torch.equal(duals[0], duals[half - 1])
    assert not torch.equal(duals[half - 1], duals[-1])
    assert references[0]["lagged"] is not None
    assert not all(torch.equal(a, b) for a, b in zip(references[0]["lagged"], references[0]["next"], strict=True))
    assert straight.states[half - 1]["prior"] is not None  # the reference has been refreshed twice before the break
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["moa"]["reference"]
    assert not all(torch.equal(a, b) for a, b in zip(saved["lagged"], references[0]["lagged"], strict=True))
    assert torch.isfinite(torch.tensor(straight.losses)).all()
    if mode == "adaptive":
        assert not torch.equal(straight.states[0]["thresholds"][1:], straight.states[-1]["thresholds"][1:])
    if mode == "corrected":
        assert float(straight.states[half - 1]["gap"][1]) not in (0.0, float(straight.states[-1]["gap"][1]))
    if mode == "robust barrier":
        assert straight.states[-1]["chi"].isfinite().any()


def test_a_checkpoint_of_lora_holds_the_adapter_alone(tmp_path, task):
    running, _ = run(task, tmp_path, moa(task[0], "fixed", True), 5)
    running.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert saved["state_dict"]
    assert all("lora_" in name for name in saved["state_dict"])
    adapter = sum(weight.numel() for weight in saved["state_dict"].values())
    for name in ("lagged", "next"):
        assert sum(weight.numel() for weight in saved["moa"]["reference"][name]) == adapter


@pytest.mark.parametrize(
    "flags", [{"precision": "bf16-mixed"}, {"precision": "bf16-true"}, {"accumulate_grad_batches": 2}]
)
def test_the_lagged_reference_under_the_trainers_flags(tmp_path, task, flags):
    recorder = Recorder()
    module = moa(task[0], "fixed", False)
    running = pairs.trainer(tmp_path / "run", max_steps=5, callbacks=[recorder], **flags)
    running.fit(module, datamodule=pairs.data(task[1]))
    assert torch.isfinite(torch.tensor(recorder.losses)).all()
    assert recorder.states[0]["prior"] is None
    assert recorder.states[-1]["prior"].isfinite().all()
    assert recorder.states[-1]["duals"].dtype == torch.float32
    parameters = module.policy.trainable()[0]
    assert {w.dtype for w in module.reference.state_dict()["lagged"]} == {p.dtype for p in parameters}
