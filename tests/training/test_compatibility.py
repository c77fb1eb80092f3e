"""Pieces that do not go together are refused, or named, before anything is loaded."""

import pytest
import torch

from moa_lightning.combiners import GDPO, MODPO, MOPO, PAMA, Combiner, Linear
from moa_lightning.losses import ClippedSurrogate, LossKL, PairwiseLogistic, RewardKL, WeightedLikelihood
from moa_lightning.models import PolicyConfig
from moa_lightning.module import AlignmentModule
from moa_lightning.rewards import FromLabels, Length, Objective, RewardPanel, WinProbability
from moa_lightning.sources import PreferenceRows, Rollout
from moa_lightning.training.compatibility import check_compatible, check_minibatches, fitting_loss

SCORED = {"a": Objective(Length()), "b": Objective(Length())}
SEVERAL = Rollout(num_generations=2)


def check(combiner, source, loss, kl=None, objectives=None):
    check_compatible(combiner, source, loss, kl or RewardKL(), RewardPanel(objectives or SCORED))


@pytest.mark.parametrize(
    ("combiner", "source", "loss"),
    [
        (PAMA(), Rollout(), ClippedSurrogate()),
        (PAMA(), PreferenceRows(), WeightedLikelihood()),
        (Linear(), PreferenceRows(), PairwiseLogistic()),
        (Linear(), SEVERAL, PairwiseLogistic()),
        (MOPO(), SEVERAL, WeightedLikelihood()),
        (MOPO(), PreferenceRows(), ClippedSurrogate()),
        (MODPO(), PreferenceRows(), PairwiseLogistic()),
        (GDPO(), SEVERAL, ClippedSurrogate()),
        (GDPO(), PreferenceRows(), PairwiseLogistic()),
    ],
)
def test_these_go_together(combiner, source, loss):
    check(combiner, source, loss)


@pytest.mark.parametrize(
    ("combiner", "source", "loss", "says"),
    [
        (
            MOPO(),
            Rollout(),
            WeightedLikelihood(),
            "MOPO needs wins, which Rollout does not provide; .* combiner or source",
        ),
        (GDPO(), Rollout(), ClippedSurrogate(), "GDPO needs groups, which Rollout .* combiner or source"),
        (MODPO(), SEVERAL, ClippedSurrogate(), "MODPO needs pairs, which ClippedSurrogate .* combiner or loss"),
        (PAMA(), Rollout(), PairwiseLogistic(), "PairwiseLogistic needs wins, which Rollout .* loss or source"),
        (Linear(), SEVERAL, WeightedLikelihood(), "WeightedLikelihood needs weights .* the score of Linear is an adv"),
        (PAMA(noon=False), SEVERAL, WeightedLikelihood(), "the score of PAMA is an advantage of either sign"),
    ],
)
def test_these_do_not(combiner, source, loss, says):
    with pytest.raises(ValueError, match=says) as caught:
        check(combiner, source, loss)
    assert "\n" not in str(caught.value)


def test_labels_of_the_data_say_nothing_of_new_responses():
    labelled = {"a": Objective(FromLabels("a")), "b": Objective(Length())}
    check(MOPO(), PreferenceRows(), WeightedLikelihood(), objectives=labelled)
    with pytest.raises(ValueError, match="objective 'a': FromLabels knows the responses of the data alone"):
        check(MOPO(), SEVERAL, WeightedLikelihood(), objectives=labelled)


@pytest.mark.parametrize(("combiner", "source"), [(MOPO(), SEVERAL), (PAMA(), PreferenceRows())])
def test_a_kl_penalty_that_nobody_reads_is_named(combiner, source, recwarn):
    for silent in (RewardKL(), LossKL(0.1), RewardKL(0.0, target=None)):
        check(combiner, source, ClippedSurrogate(), silent)
    check(PAMA(), Rollout(), ClippedSurrogate(), RewardKL(0.1))
    check(GDPO(), SEVERAL, ClippedSurrogate(), RewardKL(0.1))  # it takes the penalty off its score
    assert not recwarn.list
    with pytest.warns(UserWarning, match="kl RewardKL has no effect: .* use LossKL, or leave it out"):
        check(combiner, source, ClippedSurrogate(), RewardKL(0.1))


def test_responses_to_a_prompt_stay_in_one_minibatch():
    source = Rollout(num_generations=4, num_mini_batches=4)
    check_minibatches(PAMA(), ClippedSurrogate(), source, 3)
    check_minibatches(MOPO(), WeightedLikelihood(), source, 8)
    for combiner, loss, name in (
        (MOPO(), WeightedLikelihood(), "MOPO"),
        (GDPO(), ClippedSurrogate(), "GDPO"),
        (PAMA(), PairwiseLogistic(), "PairwiseLogistic"),
    ):
        with pytest.raises(ValueError, match=f"{name} compares .*num_mini_batches 4 must divide data.batch_size 3"):
            check_minibatches(combiner, loss, source, 3)


def test_without_a_loss_the_one_that_goes_with_the_combiner_is_taken():
    assert fitting_loss(MOPO()) == WeightedLikelihood()
    assert fitting_loss(MODPO()) == PairwiseLogistic()
    for combiner in (Linear(), PAMA(), GDPO()):
        assert fitting_loss(combiner) == ClippedSurrogate()


def test_a_combiner_that_does_not_say_what_it_reads_is_refused():
    class Silent(Combiner):
        def combine(self, signals, state):
            raise NotImplementedError

    with pytest.raises(ValueError, match="combiner Silent does not say what it reads; give it a line such as: needs"):
        fitting_loss(Silent())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lr": -1.0}, r"^model\.optimizer: Invalid learning rate: -1\.0$"),
        ({"lr": float("nan")}, r"^model\.optimizer: Invalid learning rate: nan$"),
        ({"lr": float("inf")}, r"^model\.optimizer: lr must be a finite number, got inf$"),
        ({"lr": 1e-3, "betas": (1.5, 0.9)}, r"^model\.optimizer: Invalid beta parameter"),
        ({"lr": 1e-3, "weight_decay": -1.0}, r"^model\.optimizer: Invalid weight_decay value: -1\.0$"),
    ],
)
def test_an_optimizer_that_refuses_its_settings_is_refused_at_once(settings, says):
    def make(parameters):
        return torch.optim.AdamW(parameters, **settings)

    with pytest.raises(ValueError, match=says):
        AlignmentModule(PolicyConfig("nowhere"), SCORED, optimizer=make)


def test_an_optimizer_that_does_not_take_the_probe_is_left_for_later():
    def make(parameters):
        if all(parameter.numel() < 2 for parameter in parameters):
            raise ValueError("takes large matrices only")
        return torch.optim.SGD(parameters, lr=1.0)

    AlignmentModule(PolicyConfig("nowhere"), SCORED, optimizer=make)


def test_a_penalty_that_win_probabilities_do_not_see_is_named():
    wins = {"a": Objective(WinProbability(Length(), baseline="old")), "b": Objective(Length())}
    cut = Rollout(num_generations=2, missing_eos_penalty=0.5)
    with pytest.warns(UserWarning, match="missing_eos_penalty has no effect on 'a': MOPO reads win prob.* set it to n"):
        check(MOPO(), cut, WeightedLikelihood(), objectives=wins)
    # Warnings are errors here.
    check(MOPO(), SEVERAL, WeightedLikelihood(), objectives=wins)
    check(MOPO(), cut, WeightedLikelihood())
    check(PAMA(), cut, ClippedSurrogate(), objectives=wins)
