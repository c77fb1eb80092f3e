"""The module under a real Trainer: tiny policies, function rewards."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from moa_lightning.combiners import CAID, MGDAUB, PAMA, Lagrangian, Linear
from moa_lightning.data.base import PromptData, Stage
from moa_lightning.losses import ClippedSurrogate, LossKL, RewardKL
from moa_lightning.models import AdapterOff, FrozenCopy, LoRA, PolicyConfig
from moa_lightning.module import AlignmentModule
from moa_lightning.rewards import FunctionReward, Length, Objective
from moa_lightning.sources import GAE, GroupRelative, Rollout
from moa_lightning.training.finite_updates import NonFiniteLossError
from tests.helpers import tiny


def goodness(prompts: list[str], completions: list[str], **columns: object) -> list[float | None]:
    return [float(c.split().count("good") - c.split().count("bad")) for c in completions]


def mostly_silent(prompts: list[str], completions: list[str], **columns: object) -> list[float | None]:
    return [None if "good" in c.split() else float(len(c.split())) for c in completions]


def silent(prompts: list[str], completions: list[str], **columns: object) -> list[float | None]:
    return [None] * len(completions)


class FilmPrompts(PromptData):
    def rows(self, stage: Stage) -> Sequence[dict]:
        texts = ["the film was", "the plot", "very", "film was long and"] * (4 if stage == Stage.TRAIN else 1)
        return [{"prompt": text, "source": i} for i, text in enumerate(texts)]


@pytest.fixture
def folder(tmp_path):
    return tiny.policy_folder(tmp_path / "policy", scale=1.0)


def objectives(**extra):
    return {
        "good": Objective(FunctionReward(goodness)),
        "length": Objective(Length(divisor=8.0, low=0.0, high=2.0), scale=2.0),
        **extra,
    }


def module(folder, lora=False, lr=3e-3, **options):
    settings = {
        "source": Rollout(max_new_tokens=8, num_generations=4, advantages=GroupRelative()),
        "objectives": objectives(),
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=lr),
    }
    return AlignmentModule(PolicyConfig(str(folder), lora=LoRA(r=2) if lora else None), **{**settings, **options})


def trainer(tmp_path, **options):
    settings = {
        "default_root_dir": tmp_path / "run",
        "accelerator": "cpu",
        "max_steps": 4,
        "num_sanity_val_steps": -1,
        "check_val_every_n_epoch": None,
        "val_check_interval": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**settings, **options})


class Recorder(Callback):
    def __init__(self):
        self.losses, self.steps, self.evaluations = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.steps.append(outputs["step"])

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.evaluations.append((trainer.global_step, outputs))


def run(tmp_path, moa, data=None, **options):
    recorder = Recorder()
    seed_everything(0, verbose=False)
    running = trainer(tmp_path, callbacks=[recorder, *options.pop("callbacks", [])], **options)
    running.fit(moa, datamodule=data or FilmPrompts(batch_size=4))
    return recorder


@pytest.mark.parametrize("combiner", [Linear(), PAMA(), PAMA("batch", noon=False), MGDAUB()])
@pytest.mark.parametrize(
    "setting",
    [
        {"source": Rollout(max_new_tokens=8, num_generations=2)},
        {"source": Rollout(max_new_tokens=8, num_iterations=2, num_mini_batches=2, advantages=GAE(standardize=False))},
        {"lora": True, "kl": LossKL(0.1)},
    ],
    ids=["critics", "minibatches", "lora"],
)
def test_every_combiner_trains_and_moves_the_policy(tmp_path, folder, combiner, setting):
    moa = module(folder, combiner=combiner, **setting)
    recorder = run(tmp_path, moa)
    assert len(recorder.losses) == 4
    assert all(torch.isfinite(torch.tensor(recorder.losses)))
    assert [step for step, _ in recorder.evaluations] == [0, 2, 4]
    fresh = module(folder, **{k: v for k, v in setting.items() if k == "lora"})
    fresh.trainer = moa.trainer
    fresh.setup("fit")
    fresh.configure_model()
    moved = [
        not torch.equal(a, b)
        for (name, a), (_, b) in zip(
            moa.policy.backbone.named_parameters(), fresh.policy.backbone.named_parameters(), strict=True
        )
        if a.requires_grad and "lora_A" not in name
    ]
    assert sum(moved) / len(moved) > 0.9


def test_the_first_ratio_is_one(tmp_path, folder):
    """The sampled policy and the trained one agree before the first update: nothing is lost between the two passes."""
    for setting in ({}, {"lora": True}):
        recorder = run(tmp_path, module(folder, **setting))
        for step in recorder.steps:
            assert float(step.terms["clip_ratio"]) == 0
            assert abs(float(step.terms["approx_kl"])) < 1e-6


def test_reward_rises(tmp_path, folder):
    moa = module(folder, combiner=Linear(), kl=RewardKL(0.0, target=None), lr=1e-2)
    recorder = run(tmp_path, moa, FilmPrompts(batch_size=16), max_steps=40, val_check_interval=40)
    (_, first), *_, (_, last) = recorder.evaluations
    rewards = [torch.cat([e.rewards.value_BN.mean(0, keepdim=True)]) for e in (first, last)]
    assert (rewards[1] > rewards[0]).all(), rewards


def test_without_callbacks_the_loss_is_the_same_to_the_bit(tmp_path, folder):
    from moa_lightning.callbacks import (
        Constraints,
        ObjectiveMetrics,
        ObjectiveProgressBar,
        ParetoFront,
        RunFiles,
        SampleTable,
        Throughput,
    )

    def constrained():
        return module(folder, combiner=Lagrangian(thresholds={"length": 0.5}))

    with warnings.catch_warnings():
        bare = run(tmp_path / "bare", constrained(), enable_checkpointing=True)
    watchers = [ObjectiveMetrics(), ParetoFront(), SampleTable(), Throughput(), RunFiles(), Constraints()]
    watched = run(
        tmp_path,
        constrained(),
        callbacks=[*watchers, ObjectiveProgressBar()],
        enable_progress_bar=True,
        enable_checkpointing=True,
    )
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()
    assert bare.losses == watched.losses
    assert (tmp_path / "run" / "front.csv").is_file()


@pytest.mark.parametrize(
    "flags",
    [
        {"gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 2, "val_check_interval": 4},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
    ],
    ids=str,
)
@pytest.mark.parametrize("combiner", [Linear(), PAMA(), MGDAUB()])
def test_trainer_flags_work_unchanged(tmp_path, folder, flags, combiner):
    moa = module(folder, combiner=combiner, source=Rollout(max_new_tokens=8, num_mini_batches=2))
    recorder = run(tmp_path, moa, max_steps=2, **flags)
    assert len(recorder.losses) == 2 * flags.get("accumulate_grad_batches", 1)
    assert all(torch.isfinite(torch.tensor(recorder.losses)))


def test_accumulated_minibatches_equal_one_batch(tmp_path, folder):
    """The loss's divisor is that of the whole collected batch, so two halves add up to it, whatever their lengths."""
    weights = []
    for parts in (1, 2):
        source = Rollout(max_new_tokens=8, num_generations=4, num_mini_batches=parts, advantages=GroupRelative())
        moa = module(folder, combiner=Linear(), source=source, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
        run(tmp_path, moa, max_steps=1, accumulate_grad_batches=parts, val_check_interval=parts)
        weights.append([p.detach() for p in moa.policy.backbone.parameters()])
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)


def test_rows_without_a_score_are_left_out_of_that_objective_alone(tmp_path, folder):
    rewards = objectives(half=Objective(FunctionReward(mostly_silent)))
    with pytest.warns(UserWarning, match="half"):
        recorder = run(tmp_path, module(folder, objectives=rewards, combiner=Linear()), max_steps=1)
    collected = recorder.steps[0].minibatch.collected
    assert 0 < collected.valid_BN[:, 2].float().mean() < 1
    assert collected.valid_BN[:, :2].all()
    assert torch.isfinite(collected.advantages_BTN).all()
    assert (collected.advantages_BTN[~collected.valid_BN[:, 2], :, 2] == 0).all()
    assert torch.equal(collected.mask_BT, collected.responses.mask_BT)


def test_a_row_that_nobody_can_score_is_masked(tmp_path, folder):
    rewards = {"half": Objective(FunctionReward(mostly_silent))}
    with pytest.warns(UserWarning, match="half"):
        recorder = run(tmp_path, module(folder, objectives=rewards), max_steps=1)
    collected = recorder.steps[0].minibatch.collected
    unscored = ~collected.valid_BN[:, 0]
    assert unscored.any()
    assert not collected.mask_BT[unscored].any()


def test_eval_only_objectives_are_scored_but_not_trained(tmp_path, folder):
    rewards = objectives(watch=Objective(Length(), eval_only=True))
    watched = run(tmp_path, module(folder, objectives=rewards))
    assert watched.losses == run(tmp_path, module(folder)).losses
    assert watched.evaluations[0][1].rewards.names == ("good", "length", "watch")


def test_truncated_responses_follow_the_stated_rules(tmp_path, folder):
    collected = {}
    for name, rule in {
        "keep": {},
        "mask": {"mask_truncated_completions": True},
        "fine": {"missing_eos_penalty": 5.0},
    }.items():
        source = Rollout(max_new_tokens=4, num_generations=4, advantages=GroupRelative(standardize=False), **rule)
        recorder = run(tmp_path, module(folder, source=source), max_steps=1)
        collected[name] = recorder.steps[0].minibatch.collected
    cut = collected["keep"].responses.truncated_B
    assert cut.any()
    assert not cut.all()
    assert collected["keep"].mask_BT[cut].any()
    assert not collected["mask"].mask_BT[cut].any()
    assert collected["fine"].advantages_BTN[cut].sum() < collected["keep"].advantages_BTN[cut].sum()


@pytest.mark.parametrize("updates", [{"num_mini_batches": 1}, {"num_mini_batches": 2, "num_iterations": 2}], ids=str)
def test_resume_goes_on_as_if_nothing_had_happened(tmp_path, folder, updates):
    """3 + 3 steps equal 6, in the middle of a collected batch and across the end of an epoch."""
    source = Rollout(max_new_tokens=8, num_generations=2, **updates)

    def moa():
        return module(folder, source=source, kl=RewardKL(0.2, target=0.5, horizon=20))

    whole = moa()
    straight = run(tmp_path, whole, max_steps=6)
    first = moa()
    running = trainer(tmp_path, max_steps=3, callbacks=[Recorder()])
    seed_everything(0, verbose=False)
    running.fit(first, datamodule=FilmPrompts(batch_size=4))
    running.save_checkpoint(tmp_path / "half.ckpt")
    second = moa()
    recorder = Recorder()
    seed_everything(1, verbose=False)
    trainer(tmp_path, max_steps=6, callbacks=[recorder]).fit(
        second, datamodule=FilmPrompts(batch_size=4), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert recorder.losses == straight.losses[3:]
    assert float(second.kl_state["kl_coefficient"]) == float(whole.kl_state["kl_coefficient"])
    for a, b in zip(whole.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(a, b)


class Unlogged(Rollout):
    """Collects the same, with other numbers for the logs."""

    def collect(self, batch, actors, seed):
        experience = super().collect(batch, actors, seed)
        return replace(experience, metrics=dict.fromkeys(["kl", "kl_coefficient", "sequences", "tokens"], float("nan")))


def test_nothing_that_is_only_logged_steers_the_run(tmp_path, folder):
    def trained(source):
        moa = module(
            folder,
            source=source(max_new_tokens=8, num_generations=4),
            combiner=CAID({"length": 0.5}, reference_batches=1),
            kl=RewardKL(0.2, target=0.5, horizon=20),
        )
        return run(tmp_path, moa, max_steps=3).losses, moa.kl_state, moa.combiner_state

    (losses, kl_state, state), (other_losses, other_kl_state, other_state) = trained(Rollout), trained(Unlogged)
    assert losses == other_losses
    assert float(kl_state["kl_coefficient"]) == float(other_kl_state["kl_coefficient"]) != pytest.approx(0.2)
    assert float(state["beta"]) == float(other_state["beta"])


class Forgetting(Linear):
    """Leaves a state without any tensor behind the first update."""

    def combine(self, signals, state):
        return replace(super().combine(signals, state), state={})


def test_an_empty_state_is_a_state(tmp_path, folder):
    moa = module(folder, combiner=Forgetting())
    assert moa.combiner_state
    run(tmp_path, moa, max_steps=1, limit_val_batches=0)
    assert moa.combiner_state == {}


def test_a_checkpoint_holds_what_is_trained_and_no_more(tmp_path, folder):
    moa = module(folder, lora=True, source=Rollout(max_new_tokens=8))
    running = trainer(tmp_path, max_steps=1)
    running.fit(moa, datamodule=FilmPrompts(batch_size=4))
    running.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert saved["state_dict"]
    assert not [name for name in saved["state_dict"] if "lora_" not in name and "value_heads" not in name]

    with pytest.raises(ValueError, match="trained on the objectives good, length, this run on good"):
        trainer(tmp_path).fit(
            module(folder, lora=True, objectives={"good": objectives()["good"]}),
            datamodule=FilmPrompts(batch_size=4),
            ckpt_path=tmp_path / "run.ckpt",
        )
    with pytest.raises(ValueError, match="trained with PAMA, this run uses Linear"):
        trainer(tmp_path).fit(
            module(folder, lora=True, combiner=Linear()),
            datamodule=FilmPrompts(batch_size=4),
            ckpt_path=tmp_path / "run.ckpt",
        )
    with pytest.raises(ValueError, match="trained with reference AdapterOff, this run uses FrozenCopy"):
        trainer(tmp_path).fit(
            module(folder, source=Rollout(max_new_tokens=8)),
            datamodule=FilmPrompts(batch_size=4),
            ckpt_path=tmp_path / "run.ckpt",
        )
    with pytest.raises(ValueError, match="the checkpoint is of another model"):
        trainer(tmp_path).fit(
            module(folder, lora=True, source=Rollout(max_new_tokens=8, num_generations=2, advantages=GroupRelative())),
            datamodule=FilmPrompts(batch_size=4),
            ckpt_path=tmp_path / "run.ckpt",
        )


def test_a_loss_that_is_not_finite_stops_with_a_checkpoint(tmp_path, folder):
    class Broken(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                batch.experience.returns_BTN[..., 1] = torch.nan

    moa = module(folder, source=Rollout(max_new_tokens=8))
    with pytest.raises(NonFiniteLossError, match=r"at step 2: objective length \(value_loss/length\)"):
        run(tmp_path, moa, callbacks=[Broken()])
    saved = torch.load(tmp_path / "run" / "non_finite.ckpt", weights_only=True)
    assert saved["global_step"] == 2


def test_the_reference_is_the_policy_as_it_was_loaded(tmp_path, folder):
    for lora in (False, True):
        moa = module(folder, lora=lora, kl=RewardKL(0.0, target=None))
        recorder = run(tmp_path, moa)
        assert isinstance(moa.reference, AdapterOff if lora else FrozenCopy)
        first, last = recorder.evaluations[0][1], recorder.evaluations[-1][1]
        assert first.kl_B.abs().max() == 0
        assert last.kl_B.abs().max() > 0
        assert not any("reference" in name for name, _ in moa.named_parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": AdapterOff()}, "AdapterOff needs an adapter"),
        ({"combiner": Linear({"good": 1.0, "lenght": 1.0})}, "unknown: lenght; missing: length"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(settings, message):
    with pytest.raises(ValueError, match=message):
        module("./nowhere", **settings)


def test_a_combiner_whose_needs_are_not_met_is_refused(folder):
    class Bare(Rollout):
        provides = frozenset({"scores"})

    with pytest.raises(ValueError, match="MGDAUB needs advantages, gramian, ratio, which Bare does not provide"):
        module(folder, combiner=MGDAUB(), source=Bare())


def test_prompts_that_do_not_fit_are_refused_before_the_weights_are_read(tmp_path, folder):
    (folder / "model.safetensors").unlink()

    class Long(FilmPrompts):
        def rows(self, stage):
            return [*super().rows(stage), {"prompt": "the film " * 15, "source": 0}]

    with pytest.raises(ValueError, match=r"train row 17: the prompt has 30 tokens; with max_new_tokens 8"):
        run(tmp_path, module(folder), Long(batch_size=4))


def test_too_few_prompts_for_a_batch(tmp_path, folder):
    with pytest.raises(ValueError, match="16 training prompts do not fill one batch of 17"):
        run(tmp_path, module(folder), FilmPrompts(batch_size=17))
    with pytest.raises(ValueError, match="num_mini_batches 3 does not divide the 4 responses"):
        run(tmp_path, module(folder, source=Rollout(max_new_tokens=8, num_mini_batches=3)), FilmPrompts(batch_size=4))


def test_the_loss_needs_sensible_numbers():
    with pytest.raises(ValueError, match="cliprange must be a finite number above 0, got 0"):
        ClippedSurrogate(cliprange=0)
    with pytest.raises(ValueError, match="num_generations to 2 or more"):
        Rollout(advantages=GroupRelative())
