"""The contract itself: how small it is, and the weights that the logs show."""

import torch

from moa_lightning.combiners import Combined, Combiner


def test_the_core_has_four_members():
    own = {*vars(Combiner), *Combiner.__annotations__}
    assert {name for name in own if not name.startswith("_")} == {"needs", "init", "observe", "combine"}


def test_mean_weights_are_over_what_counts():
    """Of two tokens and a padded one, of two responses and one that nobody scored, of a batch."""
    weights_BTN = torch.tensor([[[0.25, 0.75], [1.0, 0.0], [0.0, 0.0]]])
    assert Combined(torch.zeros(1, 3), weights_BTN).mean_weights().tolist() == [0.625, 0.375]
    weights_BN = torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found_N = Combined(torch.zeros(3), weights_BN).mean_weights()
    assert found_N.dtype == torch.float32
    assert found_N.tolist() == [0.25, 0.75]
    assert (
        Combined(torch.zeros(3), torch.tensor([0.2, 0.8])).mean_weights().tolist() == torch.tensor([0.2, 0.8]).tolist()
    )
    assert Combined(torch.zeros(3), torch.zeros(3, 2)).mean_weights().tolist() == [0.5, 0.5]
