"""Weights by schedule: their values, what is refused, and runs under them, resumed to the bit."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback

from moa_lightning import combiners
from moa_lightning.callbacks import ObjectiveMetrics
from moa_lightning.cli import main
from moa_lightning.combiners import GDPO, MODPO, PAMA, PGAPO, Linear, Tchebycheff
from moa_lightning.combiners.shared.weighted import FirstWeights, Weighted
from moa_lightning.losses import ClippedSurrogate
from moa_lightning.rewards import Length, Objective, RewardPanel
from moa_lightning.schedules import ConstantWeight, LinearWeight, PiecewiseWeight
from moa_lightning.sources import GroupRelative, Rollout
from moa_lightning.training.scheduled_weights import ScheduledWeights
from tests.end_to_end.test_matrix import Films, FunctionReward, goodness
from tests.helpers import pairs, tiny

ROOT = Path(__file__).resolve().parents[1]
FADING = LinearWeight(1.0, 0.2)
RISING = PiecewiseWeight([(0.1, 0.0), (0.4, 3.0), (0.5, 1.0)])
NAMES = ("good", "short")


def objectives(good=1.0, short=1.0):
    return {
        "good": Objective(FunctionReward(goodness), weight=good),
        "short": Objective(Length(divisor=8.0), weight=short, scale=-1.0),
    }


def followed(combiner, **weights):
    return ScheduledWeights(combiner, RewardPanel(objectives(**weights)))


@pytest.mark.parametrize(
    "schedule", [RISING, LinearWeight(2.0, 0.5, begin=0.3, until=0.7), PiecewiseWeight([(0.5, 2)])]
)
def test_values_are_those_of_an_interpolation(schedule):
    points = getattr(schedule, "points", None) or [(schedule.begin, schedule.start), (schedule.until, schedule.end)]
    for progress in np.linspace(0, 1, 101):
        assert schedule.at(progress) == pytest.approx(np.interp(progress, *zip(*points, strict=True)), abs=1e-12)
    assert [schedule.at(where) for where, _ in points] == [height for _, height in points]
    assert set(schedule.knots) == {0.0, 1.0, *(where for where, _ in points)}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ConstantWeight(-1.0), r"ConstantWeight.value must be a finite number >= 0, got -1"),
        (lambda: LinearWeight(1.0, float("nan")), "LinearWeight.end must be a finite number"),
        (lambda: LinearWeight(1.0, 2.0, begin=0.5, until=0.5), "0 <= begin < until <= 1; got 0.5 and 0.5"),
        (lambda: LinearWeight(1.0, 2.0, until=80), "shares of the run"),
        (lambda: PiecewiseWeight([]), "at least one point"),
        (lambda: PiecewiseWeight([(0.1, 1.0), (0.2, -1.0)]), "weight at 0.2 must be a finite number >= 0"),
        (lambda: PiecewiseWeight([(0.5, 1.0), (0.4, 1.0)]), "in the order of progress, each once; got 0.4 after 0.5"),
        (lambda: PiecewiseWeight([(0.5, 1.0), (0.5, 2.0)]), "each once"),
        (lambda: PiecewiseWeight([(0.0, 1.0), (50, 2.0)]), r"in \[0, 1\]; got one at 50"),
    ],
)
def test_what_is_no_schedule_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def taking_weights():
    found = [c for _, c in inspect.getmembers(combiners, inspect.isclass) if "weights" in c.__dict__]
    assert len(found) >= 9
    return found


@pytest.mark.parametrize("kind", taking_weights())
def test_whoever_takes_weights_follows_schedules_or_refuses_them(kind):
    own = {"good": FADING, "short": RISING}
    if issubclass(kind, FirstWeights):
        for combiner, weights in ((kind(weights=own), {}), (kind(), own)):
            with pytest.raises(ValueError, match=rf"{kind.__name__} moves the weights by itself.* use Linear or GDPO"):
                followed(combiner, **weights)
        return
    assert issubclass(kind, Weighted)
    for progress in (0.0, 0.2, 0.45, 1.0):
        numbers = {name: schedule.at(progress) for name, schedule in own.items()}
        default_N = torch.tensor(list(numbers.values()))
        for weights, expected in (
            (followed(kind(weights=own)), kind(weights=numbers).init(NAMES, torch.ones(2))),
            (followed(kind(), **own), kind().init(NAMES, default_N)),
        ):
            moved = weights.at(progress, weights.start())
            assert moved.keys() == expected.keys()
            assert torch.equal(moved["weights"], expected["weights"])
            assert moved["weights"].dtype == torch.float32


def test_weights_that_do_not_fit_later_are_refused_at_the_start():
    ending = LinearWeight(1.0, 0.0, until=0.5)
    with pytest.raises(ValueError, match=r"all are 0 at progress 0\.5"):
        followed(Linear(), good=ending, short=0.0).start()
    with pytest.raises(ValueError, match=r"weight of the primary objective 'good'.* at progress 0\.5"):
        followed(MODPO(), good=ending).start()
    with pytest.raises(ValueError, match="unknown: long"):
        followed(Linear(weights={"good": FADING, "long": 1.0})).start()


@pytest.mark.parametrize("combiner", [PAMA(), Linear(weights={"good": 1.0, "short": 1.0})])
def test_a_schedule_that_nobody_reads_is_told_of(combiner):
    with pytest.warns(UserWarning, match="weight of objective 'good' has no effect"):
        assert followed(combiner, good=FADING).followed == {}


class Recorder(Callback):
    """Losses, weights after each step, and what is logged; stops where it is told to, as an interruption would."""

    def __init__(self, stop=None, to=None):
        self.stop, self.to, self.losses, self.weights, self.logged = stop, to, [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.weights.append(pl_module.combiner_state["weights"].tolist())
        self.logged.append(float(trainer.callback_metrics.get("scheduled_weights/good", -1.0)))
        if trainer.global_step == self.stop:
            trainer.save_checkpoint(self.to)
            trainer.should_stop = True


def module(folder, combiner, passes=1, **weights):
    rollout = Rollout(max_new_tokens=6, num_generations=4, num_iterations=passes, advantages=GroupRelative())
    return pairs.module(
        folder, combiner=combiner, source=rollout, loss=ClippedSurrogate(), objectives=objectives(**weights)
    )


def run(folder, moa, stop=None, ckpt_path=None, **options):
    recorder = Recorder(stop, folder / "half.ckpt")
    running = pairs.trainer(folder, callbacks=[ObjectiveMetrics(), recorder], **{"max_steps": 6, **options})
    running.fit(moa, datamodule=Films(batch_size=4), ckpt_path=ckpt_path, weights_only=ckpt_path is not None or None)
    return recorder


@pytest.fixture
def folder(tmp_path):
    return tiny.policy_folder(tmp_path / "policy", scale=1.0)


@pytest.mark.parametrize("combiner", [Linear(), GDPO(), Tchebycheff(), PGAPO()], ids=lambda c: type(c).__name__)
def test_two_halves_are_the_whole(tmp_path, folder, combiner):
    def moa():
        return module(folder, combiner, passes=2, good=FADING)

    whole, resumed = moa(), moa()
    straight = run(tmp_path / "run", whole)
    first = run(tmp_path / "run", moa(), stop=3)  # between the passes over a batch
    torch.manual_seed(99)
    second = run(tmp_path / "run", resumed, ckpt_path=tmp_path / "run" / "half.ckpt")
    assert first.losses + second.losses == straight.losses
    assert first.weights + second.weights == straight.weights
    torch.testing.assert_close(dict(resumed.named_parameters()), dict(whole.named_parameters()), rtol=0, atol=0)
    weights = [FADING.at(step / 6) for step in (0, 0, 2, 2, 4, 4)]  # of the step at which the batch was collected
    np.testing.assert_allclose([good for good, _ in straight.weights], [w / (w + 1) for w in weights], rtol=1e-6)
    np.testing.assert_allclose(straight.logged, [w / (w + 1) for w in weights], rtol=1e-6)


def test_progress_is_that_of_the_epochs_where_no_steps_are_given(tmp_path, folder):
    length = len(run(tmp_path / "a", module(folder, Linear()), max_epochs=1, max_steps=-1).losses)
    recorder = run(tmp_path / "b", module(folder, Linear(), good=FADING), max_epochs=2, max_steps=-1)
    weights = [FADING.at(step / (2 * length)) for step in range(2 * length)]
    np.testing.assert_allclose([good for good, _ in recorder.weights], [w / (w + 1) for w in weights], rtol=1e-6)


def test_a_constant_schedule_is_a_number_to_the_bit(tmp_path, folder):
    number = run(tmp_path / "a", module(folder, Linear(), good=2.0), max_steps=3)
    schedule = run(tmp_path / "b", module(folder, Linear(), good=ConstantWeight(2.0)), max_steps=3)
    assert schedule.losses == number.losses
    assert schedule.weights == number.weights
    assert number.logged == [-1.0] * 3  # weights that stay need no curve


def test_a_run_without_end_makes_no_progress(tmp_path, folder):
    with pytest.raises(ValueError, match=r"weight of 'good' follows.* no end; set trainer\.max_steps"):
        run(tmp_path, module(folder, Linear(), good=FADING), max_steps=-1, max_epochs=-1)


@pytest.mark.parametrize(
    "flags",
    [
        ("weight=LinearWeight", "weight.start=1", "weight.end=0.2"),
        ('weight={"class_path": "LinearWeight", "init_args": {"start": 1, "end": 0.2}}',),
    ],
)
def test_flags_and_the_printed_config_say_the_same(tmp_path, capsys, flags):
    def printed(*arguments):
        with pytest.raises(SystemExit):
            main(["fit", *arguments, "--print_config"])
        return capsys.readouterr().out

    given = printed(f"--config={ROOT}/configs/demo.yaml", *(f"--model.objectives.informative.{flag}" for flag in flags))
    weight = yaml.safe_load(given)["model"]["objectives"]["informative"]["weight"]
    assert weight["class_path"] == "moa_lightning.schedules.LinearWeight"
    assert LinearWeight(**weight["init_args"]) == FADING
    (tmp_path / "again.yaml").write_text(given)
    assert printed(f"--config={tmp_path / 'again.yaml'}") == given


def test_the_example_of_the_documentation(capsys, tmp_path):
    text = (ROOT / "docs/rewards.md").read_text()
    block = next(b for b in text.split("```yaml\n")[1:] if "LinearWeight" in b).partition("```")[0]
    (tmp_path / "schedule.yaml").write_text(block)
    with pytest.raises(SystemExit):
        main(["fit", f"--config={ROOT}/configs/demo.yaml", f"--config={tmp_path / 'schedule.yaml'}", "--print_config"])
    resolved = yaml.safe_load(capsys.readouterr().out)["model"]["combiner"]["init_args"]["weights"]
    assert {name: weight["class_path"].rpartition(".")[2] for name, weight in resolved.items()} == {
        "sentiment": "LinearWeight",
        "informative": "PiecewiseWeight",
    }
