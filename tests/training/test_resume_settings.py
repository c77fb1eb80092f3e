"""A resumed run is honest: what is changed is taken or refused, and a state that is invalid is refused."""

import math

import pytest
import torch
from lightning.pytorch import Callback, seed_everything

from moa_lightning.combiners import Lagrangian, Linear
from moa_lightning.losses import LossKL, RewardKL
from moa_lightning.sources import GAE, Rollout
from tests.test_module import FilmPrompts, folder, module, trainer  # noqa: F401  # folder is a fixture


class Groups(Callback):
    """The optimiser's groups at the first step of a run."""

    groups: list[dict] | None = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.groups is None:
            self.groups = [{k: v for k, v in g.items() if k != "params"} for g in trainer.optimizers[0].param_groups]


def adamw(**options):
    return lambda parameters: torch.optim.AdamW(parameters, **options)


def half_after_two(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


def fit(tmp_path, moa, steps, **options):
    seed_everything(0, verbose=False)
    seen = Groups()
    running = trainer(tmp_path, max_steps=steps, val_check_interval=100, num_sanity_val_steps=0, callbacks=[seen])
    running.fit(moa, datamodule=FilmPrompts(batch_size=4), weights_only=True, **options)
    return running, seen.groups


def saved(tmp_path, folder, change=None, **options):  # noqa: F811
    path = tmp_path / "two.ckpt"
    running, _ = fit(tmp_path, module(folder, **options), 2)
    running.save_checkpoint(path)
    if change is not None:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
    return path


def resumed(tmp_path, folder, path, **options):  # noqa: F811
    return fit(tmp_path, module(folder, **options), 3, ckpt_path=path)


@pytest.mark.parametrize("scheduler", [None, half_after_two], ids=["constant", "scheduled"])
@pytest.mark.parametrize("old_format", [False, True])
def test_hyper_parameters_of_the_optimiser_are_taken(tmp_path, folder, scheduler, old_format):  # noqa: F811
    def as_before(content):
        if old_format:
            del content["moa_format"], content["moa"]["optimizer"], content["moa"]["classes"]

    common = {"source": Rollout(max_new_tokens=8, advantages=GAE()), "lr_scheduler": scheduler}
    first = {"optimizer": adamw(lr=1e-3, weight_decay=0.1), "value_learning_rate": 1e-2, **common}
    path = saved(tmp_path, folder, as_before, **first)
    factor = 0.5 if scheduler else 1.0  # after two steps
    _, unchanged = resumed(tmp_path, folder, path, **first)
    assert [group["lr"] for group in unchanged] == pytest.approx([1e-3 * factor, 1e-2 * factor])
    second = {"optimizer": adamw(lr=1e-4, weight_decay=0.0), "value_learning_rate": 2e-2, **common}
    running, changed = resumed(tmp_path, folder, path, **second)
    assert [group["lr"] for group in changed] == pytest.approx([1e-4 * factor, 2e-2 * factor])
    assert [group["weight_decay"] for group in changed] == [0.0, 0.0]
    if scheduler:
        assert running.lr_scheduler_configs[0].scheduler.base_lrs == [1e-4, 2e-2]


def test_other_classes_are_refused(tmp_path, folder):  # noqa: F811
    path = saved(tmp_path, folder, optimizer=adamw(lr=1e-3))
    for options, named in (
        (
            {"kl": LossKL(), "optimizer": adamw(lr=1e-3)},
            "trained with kl RewardKL, this run uses LossKL; use the run's",
        ),
        ({"optimizer": lambda p: torch.optim.SGD(p, lr=1e-3)}, "trained with optimizer AdamW, this run uses SGD"),
    ):
        with pytest.raises(ValueError, match=named):
            resumed(tmp_path, folder, path, **options)


def test_a_checkpoint_of_before_the_format_had_a_number(tmp_path, folder):  # noqa: F811
    def older(content):
        del content["moa_format"], content["moa"]["classes"], content["moa"]["optimizer"]

    path = saved(tmp_path, folder, older, kl=LossKL())
    resumed(tmp_path, folder, path, kl=LossKL())
    with pytest.raises(ValueError, match="the checkpoint's state of RewardKL lacks kl_coefficient: it was"):
        resumed(tmp_path, folder, path, kl=RewardKL())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda c: c.update(moa_format=9),
            "the checkpoint has format 9, and this version of moa_lightning reads",
        ),
        (lambda c: c["moa"].pop("kl_state"), "the checkpoint lacks kl_state; give another one"),
        (
            lambda c: c["moa"]["combiner_state"].pop("duals"),
            "the checkpoint's state of Lagrangian lacks duals: it was",
        ),
        (
            lambda c: c["moa"]["kl_state"]["kl_coefficient"].fill_(-3.0),
            "RewardKL is invalid: kl_coefficient holds -",
        ),
        (lambda c: c["moa"]["kl_state"]["kl_coefficient"].fill_(math.nan), "is invalid: kl_coefficient holds nan"),
        (lambda c: c["moa"]["combiner_state"]["duals"].fill_(math.nan), "Lagrangian is invalid: duals holds nan"),
        (lambda c: c["moa"]["combiner_state"]["duals"].fill_(-1.0), "Lagrangian is invalid: duals holds -1"),
        (lambda c: c.pop("moa"), "was not written by moa_lightning"),
    ],
    ids=["format", "field", "dual", "negative", "nan", "nan dual", "negative dual", "foreign"],
)
def test_what_makes_no_sense_is_refused(tmp_path, folder, change, says):  # noqa: F811
    path = saved(tmp_path, folder, change, combiner=Lagrangian({"length": 0.5}))
    with pytest.raises(ValueError, match=says):
        resumed(tmp_path, folder, path, combiner=Lagrangian({"length": 0.5}))


def test_weights_of_a_combiner(tmp_path, folder):  # noqa: F811
    path = saved(tmp_path, folder, lambda c: None, combiner=Linear())
    resumed(tmp_path, folder, path, combiner=Linear({"good": 3.0, "length": 1.0}))
