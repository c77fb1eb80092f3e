"""Moments over batches and processes: those of all rows at once."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_lightning.utils.moments import Moments, _merged


def parted(rows: torch.Tensor, cuts: list[int]) -> list[torch.Tensor]:
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    return [rows[i:j] for i, j in itertools.pairwise(edges)]  # some are empty


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 99), st.lists(st.integers(0, 40), max_size=4), st.sampled_from([0.0, 3.0, 1e7]))
def test_batches_and_processes_make_no_difference(seed: int, cuts: list[int], origin: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = origin + torch.randn(40, 3, generator=generator, dtype=torch.float64)
    rows[torch.rand(40, 3, generator=generator) < 0.3] = torch.nan
    batches = Moments(3)
    for part in parted(rows, cuts):
        batches.update(part)
    processes = []
    for part in parted(rows, cuts):
        own = Moments(3)
        own.update(part)
        processes.append(own.parts_3N)
    count_N, mean_N, std_N = batches.compute()
    expected = [column[column.isfinite()] for column in rows.T]
    torch.testing.assert_close(count_N, torch.tensor([float(len(c)) for c in expected], dtype=torch.float64))
    torch.testing.assert_close(mean_N, torch.stack([c.mean() for c in expected]), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(std_N, torch.stack([c.std() for c in expected]), rtol=1e-9, atol=0)
    torch.testing.assert_close(_merged(torch.stack(processes)), batches.parts_3N, rtol=1e-9, atol=1e-12)


def test_a_column_without_entries_has_no_mean() -> None:
    moments = Moments(2)
    moments.update(torch.tensor([[1.0, torch.nan], [3.0, torch.inf]]))
    count_N, mean_N, std_N = moments.compute()
    assert count_N.tolist() == [2, 0]
    assert mean_N[0] == 2
    assert mean_N[1].isnan()
    assert std_N.tolist() == pytest.approx([2**0.5, 0], rel=1e-15)


def test_float32_scores_are_summed_in_float64() -> None:
    moments = Moments(1)
    moments.update(torch.tensor([[16_777_216.0]]))
    moments.update(torch.ones(3, 1))
    assert moments.compute()[1] == 16_777_219 / 4  # float32 would lose a one
