"""Every combiner of the package with every source and loss of the package: it trains, or one line says why not.

What is added to ``moa_lightning.combiners``, ``sources`` or ``losses`` enters by itself.
"""

import inspect
from itertools import product

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file

import moa_lightning.combiners as combiners
import moa_lightning.losses as losses
import moa_lightning.sources as sources
from moa_lightning.combiners import Combiner
from moa_lightning.data import PromptData
from moa_lightning.losses import PolicyLoss
from moa_lightning.rewards import FunctionReward, Length, Objective
from moa_lightning.sources import GroupRelative, Source
from tests.helpers import pairs, tiny

pytestmark = pytest.mark.filterwarnings("ignore:objective 'kind' did not score", "ignore:MOPO's labels")


def of_package(package, base):
    found = inspect.getmembers(package, inspect.isclass)
    return {name: c for name, c in found if issubclass(c, base) and not inspect.isabstract(c)}


COMBINERS, LOSSES = of_package(combiners, Combiner), of_package(losses, PolicyLoss)
SOURCES = {
    "Rollout": lambda: sources.Rollout(max_new_tokens=6),
    "Rollout-4": lambda: sources.Rollout(max_new_tokens=6, num_generations=4, advantages=GroupRelative()),
    "Rollout-critics-2": lambda: sources.Rollout(max_new_tokens=6, num_generations=2),
    "PreferenceRows": lambda: sources.PreferenceRows(max_response_length=8),
}
# What users are told to combine; the rest of the matrix need not be sensible.
FITTING = {
    "Linear": "ClippedSurrogate",
    "PAMA": "ClippedSurrogate",
    "MGDAUB": "ClippedSurrogate",
    "MOPO": "WeightedLikelihood",
    "MODPO": "PairwiseLogistic",
    "GDPO": "ClippedSurrogate",
    "Tchebycheff": "ClippedSurrogate",
    "SmoothTchebycheff": "ClippedSurrogate",
    "RVPO": "ClippedSurrogate",
    "CTWA": "ClippedSurrogate",
}

AT_ONCE = {"CAID": {"reference_batches": 1}}  # else the policy stands still for longer than these runs


def goodness(prompts, completions, **columns):
    return [float(sum((w in {"good", "fine"}) - (w in {"bad", "dull"}) for w in text.split())) for text in completions]


class Films(PromptData):
    def rows(self, stage):
        return [{"prompt": text} for text in pairs.PROMPTS[:4] * 2]


def settings(source):
    """Objectives and data that go with a source."""
    if source == "PreferenceRows":
        return pairs.objectives(), lambda folder: pairs.data(pairs.write(folder / "data.jsonl"))
    return {
        "good": Objective(FunctionReward(goodness)),
        "short": Objective(Length(divisor=8.0), scale=-1.0),
    }, lambda folder: Films(batch_size=4)


def module(folder, combiner, source, loss):
    return pairs.module(
        folder,
        combiner=COMBINERS[combiner](**AT_ONCE.get(combiner, {})),
        source=SOURCES[source](),
        loss=LOSSES[loss](),
        objectives=settings(source)[0],
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    )


def lacking(combiner, source, loss):
    """Signals that nobody provides."""
    given, needed = SOURCES[source]().provides, COMBINERS[combiner].needs
    return sorted((needed - given - LOSSES[loss].provides) | (LOSSES[loss].needs - given))


CELLS = list(product(COMBINERS, SOURCES, LOSSES))
MET = [cell for cell in CELLS if not lacking(*cell)]
UNMET = [cell for cell in CELLS if lacking(*cell)]


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def train(tmp_path, cell):
    """Two steps; the losses, and the share of the policy's weights that have moved."""
    folder = tiny.policy_folder(tmp_path / "policy", scale=1.0)
    moa, seen = module(folder, *cell), Losses()
    running = pairs.trainer(tmp_path / "run", max_steps=2, num_sanity_val_steps=0, callbacks=[seen])
    running.fit(moa, datamodule=settings(cell[1])[1](tmp_path))
    before = load_file(folder / "model.safetensors")
    now = {name: p.detach() for name, p in moa.policy.backbone.named_parameters() if name in before}
    assert now
    return seen.losses, sum(not torch.equal(w, before[n]) for n, w in now.items()) / len(now)


@pytest.mark.parametrize(("combiner", "source"), dict.fromkeys(cell[:2] for cell in MET))
def test_what_is_provided_for_trains_with_some_loss_and_the_others_say_why_not(tmp_path, combiner, source):
    trained = []
    for loss in (met[2] for met in MET if met[:2] == (combiner, source)):
        try:
            seen, moved = train(tmp_path / loss, (combiner, source, loss))
        except ValueError as error:
            line = str(error)
            assert line.startswith(f"loss {loss} needs ")
            assert "\n" not in line
            assert any(f"use loss {name}" in line for name in LOSSES)
        else:
            assert len(seen) == 2
            assert torch.isfinite(torch.tensor(seen)).all()
            assert moved > 0.9
            trained.append(loss)
    assert FITTING.get(combiner, *trained[:1]) in trained


@pytest.mark.parametrize("cell", UNMET, ids="-".join)
def test_what_is_not_provided_for_is_refused_before_anything_is_loaded(tmp_path, cell):
    with pytest.raises(ValueError, match="needs") as caught:
        module(tmp_path / "nowhere", *cell)
    line = str(caught.value)
    assert "\n" not in line
    assert any(name in line for name in lacking(*cell))
    assert "does not provide; choose another" in line
    assert cell[0] in line or cell[2] in line


def test_every_source_is_in_the_matrix_and_every_combiner_has_a_place_in_it():
    assert {name.split("-")[0] for name in SOURCES} == set(of_package(sources, Source))
    assert {combiner for combiner, _, _ in MET} == set(COMBINERS)
    several = {source for source in SOURCES if source != "Rollout"}
    for combiner, loss in FITTING.items():
        assert {source for c, source, met in MET if (c, met) == (combiner, loss)} >= several
    assert ("MOPO", "Rollout", "WeightedLikelihood") in UNMET
