"""NaN and infinities reach no file: not by the gradient, the weights or the logits, in any precision."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file

from moa_lightning.combiners import GDPO, MGDAUB, PAMA, Lagrangian, Linear
from moa_lightning.commands.export.command import export
from moa_lightning.models import PolicyConfig
from moa_lightning.models.policy import FiniteLogits
from moa_lightning.module import AlignmentModule
from moa_lightning.rewards import Length, Objective
from moa_lightning.sources import GAE, Rollout
from moa_lightning.training.checkpoints import AtomicCheckpointIO, newest_valid
from moa_lightning.training.finite_updates import NonFiniteLossError
from moa_lightning.utils.non_finite import NonFiniteError, names_of_non_finite
from tests.end_to_end.test_payloads import written
from tests.test_module import folder, module, objectives, run  # noqa: F401  # folder is a fixture


class Break(Callback):
    """Puts a value into the gradient of a parameter, at a step."""

    def __init__(self, step: int, value: float, name: str = "wte") -> None:
        self.step, self.value, self.name = step, value, name

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == self.step:
            parameter = next(p for name, p in pl_module.named_parameters() if self.name in name and p.requires_grad)
            parameter.grad.view(-1)[-1] = self.value


def critics() -> Rollout:
    return Rollout(max_new_tokens=8, num_generations=2, advantages=GAE())


def by_step(root: Path, **options) -> dict:
    settings = {"every_n_train_steps": 1, "save_top_k": 1, "save_last": True, "filename": "{step}"}
    return {
        "callbacks": [ModelCheckpoint(root / "checkpoints", **{**settings, **options})],
        "enable_checkpointing": True,
        "plugins": [AtomicCheckpointIO()],
    }


def finite(file: Path) -> bool:
    return not names_of_non_finite(torch.load(file, weights_only=True)["state_dict"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])  # mixed ones: test_finite_combiners
@pytest.mark.parametrize("combiner", [Linear(), PAMA(), MGDAUB(), GDPO(), Lagrangian({"length": 0.5})], ids=str)
def test_a_gradient_that_is_not_finite_makes_no_step(tmp_path, folder, combiner, precision):  # noqa: F811
    """In the last step, where nothing would come after it to notice."""
    moa, root = module(folder, combiner=combiner), tmp_path / "run"
    options = by_step(root)
    options["callbacks"].append(Break(1, math.nan))
    with pytest.raises(NonFiniteError, match="the gradient is not finite at step 1: no single objective") as caught:
        run(tmp_path, moa, max_steps=2, precision=precision, **options)
    assert "\n" not in str(caught.value)
    assert not names_of_non_finite(dict(moa.named_parameters()))
    newest = newest_valid(root / "checkpoints")
    assert newest is not None
    assert torch.load(newest, weights_only=True)["global_step"] == 1
    assert finite(newest)
    assert finite(root / "non_finite.ckpt")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_objective_and_the_way_back_are_named(tmp_path, folder, value):  # noqa: F811
    moa, root = module(folder, source=critics()), tmp_path / "run"
    options = by_step(root, save_top_k=-1)
    options["callbacks"].append(Break(2, value, "value_heads"))
    with pytest.raises(NonFiniteError, match=r"step 2: objective length \(policy.value_heads.linear.weight\)") as error:
        run(tmp_path, moa, **options)
    assert str(error.value).endswith(
        f"Resume from the newest finite checkpoint before it with --ckpt_path={root}/checkpoints/step=1.ckpt"
    )


class Poison(Callback):
    """What an optimiser could do that steps too far."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            with torch.no_grad():
                for parameter in pl_module.policy.backbone.parameters():
                    parameter.fill_(self.value)


@pytest.mark.parametrize(
    "options",
    [{}, {"save_top_k": -1}, {"save_top_k": 1, "save_last": False}, {"save_on_exception": True}],
    ids=str,
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_weights_that_are_not_finite_are_not_written(tmp_path, folder, options, precision):  # noqa: F811
    moa, root = module(folder), tmp_path / "run"
    settings = by_step(root, **options)
    settings["callbacks"].insert(0, Poison(2, math.nan))
    with pytest.raises(
        NonFiniteError, match=r"the weights are not finite at step 2 \(policy.backbone.* more\): nothing"
    ):
        run(tmp_path, moa, precision=precision, **settings)
    files = sorted((root / "checkpoints").iterdir())
    assert files
    assert all(finite(file) for file in files)
    with pytest.raises(NonFiniteError, match=r"not written to .* its weights are not finite"):
        moa.policy.save_pretrained(tmp_path / "written")
    assert not (tmp_path / "written").exists()


def test_logits_that_are_not_finite_end_the_run_in_one_line(tmp_path, folder):  # noqa: F811
    """A learning rate far too high: transformers would speak of a probability tensor."""
    moa, root = module(folder, lr=1e30), tmp_path / "run"
    with pytest.raises(NonFiniteError, match=r"the policy's logits are not finite .* at step 1; the learning") as error:
        run(tmp_path, moa, val_check_interval=1, **by_step(root, every_n_train_steps=None))
    assert f"There is no checkpoint of an earlier step in {root}/checkpoints; start a new run" in str(error.value)


def test_what_no_token_can_be_drawn_from():
    watch = FiniteLogits()
    fine = torch.tensor([[1.0, -math.inf], [0.0, 2.0]])
    assert torch.equal(watch(torch.zeros(2, 1), fine), fine)
    assert not watch.failed
    for bad in ([math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]):
        watch = FiniteLogits()
        assert torch.equal(watch(torch.zeros(2, 1), torch.tensor([[1.0, 2.0], bad]))[1], torch.zeros(2))
        assert watch.failed
        watch(torch.zeros(2, 1), fine)
        assert watch.failed  # it is asked once, at the end


@pytest.mark.parametrize("rate", [math.nan, math.inf, -1.0])
def test_a_value_learning_rate_without_sense_is_refused(rate):
    with pytest.raises(ValueError, match=rf"value_learning_rate must be a finite number >= 0 \(or null\), got {rate}"):
        AlignmentModule(PolicyConfig("nowhere"), {"a": Objective(Length())}, value_learning_rate=rate)


def test_a_loss_names_the_way_back(tmp_path, folder):  # noqa: F811
    class Returns(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                batch.experience.returns_BTN[..., 1] = torch.nan

    options = by_step(tmp_path / "run", save_top_k=-1)
    options["callbacks"].append(Returns())
    with pytest.raises(NonFiniteLossError, match=r"objective length .* with --ckpt_path=.*step=1.ckpt"):
        run(tmp_path, module(folder, source=critics()), **options)


def test_what_an_earlier_version_wrote_is_left_out(tmp_path):
    for step, value in ((1, 0.0), (2, math.nan)):
        content = {"global_step": step, "state_dict": {"weight": torch.tensor([value]), "count": torch.tensor(3)}}
        torch.save(content, tmp_path / f"{step}.ckpt")
    with pytest.warns(UserWarning, match=r"2.ckpt is left out: its weights are not finite \(weight\)"):
        assert newest_valid(tmp_path) == tmp_path / "1.ckpt"


def test_a_sharded_one_is_left_out_too(tmp_path):
    """Its shards are looked at one by one. The optimiser's are not: from those a run recovers, or stops by itself."""
    for step, value in ((1, 0.0), (2, math.nan), (3, math.inf)):
        content = {
            "state_dict": {"policy.a": torch.ones(3, dtype=torch.bfloat16), "policy.b": torch.tensor([1.0, value])},
            "optimizer_0": {"state": {"policy.a": {"exp_avg": torch.full((3,), math.nan)}}},
        }
        written(tmp_path / f"{step}.ckpt", content)
        torch.save({"global_step": step}, tmp_path / f"{step}.ckpt" / "meta.pt")
    with pytest.warns(UserWarning, match=r"ckpt is left out: its weights are not finite \(policy.b\)") as told:
        assert newest_valid(tmp_path) == tmp_path / "1.ckpt"
    assert len(told) == 2


def test_a_policy_that_is_not_finite_is_not_exported(tmp_path, folder):  # noqa: F811
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.bias"][0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"not finite \(transformer.ln_f.bias\); export an earlier one"):
        export(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(NonFiniteError, match="the policy's logits are not finite: its weights are damaged"):
        run(tmp_path, module(folder, objectives=objectives()))
