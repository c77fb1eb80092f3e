"""MOPO's thresholds on votes and with missing labels, where the true win probabilities are known."""

from dataclasses import replace

import pytest
import torch

from bench.mopo import run as mopo
from bench.mopo.votes import PATTERNS, PRECISE, Problem, Settings, Table, World, train, win_matrices

pytestmark = pytest.mark.filterwarnings("ignore:MOPO's labels")

SHORT = Settings(steps=60, averaged=20)


@pytest.mark.parametrize("responses", [2, 4, 8])
@pytest.mark.parametrize("second", ["coin", "Condorcet", "Bradley-Terry"])
def test_a_threshold_that_is_called_met_on_votes_is_met(second, responses):
    paper = train(Problem(second, responses, 0.55, seed=1, dual_values="optimum"), SHORT)
    # The values that set the weights say "met", and no policy that they lead to is.
    assert paper.believed_met(0.55)
    assert paper.last_choice < 0.54
    assert not paper.met(0.55)
    own = train(Problem(second, responses, 0.55, seed=1), SHORT)
    assert own.values == pytest.approx(own.choice, abs=0.01)
    assert own.held_out == pytest.approx(own.last_choice, abs=4 * own.error)
    if second == "Bradley-Terry":  # can be met, and then it is
        assert own.choice == pytest.approx(0.55, abs=0.01)
        assert paper.choice < own.choice - 0.01
    else:
        assert own.choice == pytest.approx(0.5, abs=0.005)
        assert not own.met(0.55)
        assert own.dual > paper.dual  # on its way to the cap, and to the warning
    low = train(Problem(second, responses, 0.42, seed=1), SHORT)
    assert low.met(0.42)
    assert low.last_choice > 0.42


@pytest.mark.parametrize("responses", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_what_evaluations_find_corrects_what_votes_believe(responses):
    own = train(Problem("Bradley-Terry", responses, 0.55, seed=0, dual_values="held_out"))
    assert own.believed > 0.59
    assert own.values == pytest.approx(0.55, abs=0.01)
    assert own.choice == pytest.approx(0.55, abs=0.015)
    assert own.values == pytest.approx(own.choice, abs=0.01)


@pytest.mark.parametrize("missing", PATTERNS)
def test_missing_labels_do_not_bias_the_slack(missing):
    problem = Problem("Bradley-Terry", 4, 0.55, seed=1, votes=False, missing=missing)
    settings = replace(PRECISE, steps=60, averaged=20, held_out=100)
    own = train(problem, settings)
    assert own.values == pytest.approx(0.55, abs=0.005)
    assert own.choice == pytest.approx(own.values, abs=0.005)
    paper = train(replace(problem, dual_values="optimum"), settings)
    if missing in ("one response", "objective", "comparisons"):
        assert paper.choice < paper.values - 0.005


def test_rows_are_drawn_from_the_matrices():
    generator = torch.Generator().manual_seed(0)
    wins = torch.stack([win_matrices(kind, 2, 5, generator) for kind in ("Bradley-Terry", "Condorcet")])
    torch.testing.assert_close(wins + wins.mT, torch.ones_like(wins))
    world = World(wins, generator)
    rows = world.rows(20_000, Problem("Condorcet", 3, 0.5, seed=0))
    for x, r in ((0, 1), (1, 4)):
        here = (rows.prompt_B == x) & (rows.response_B == r)
        torch.testing.assert_close(rows.wins_BN[here].double().mean(0), world.true_XRN[x, r], atol=0.02, rtol=0)
    assert set((rows.wins_BN * 2).unique().tolist()) == {0.0, 1.0, 2.0}
    table = Table(Settings(prompts=2, pool=5))
    table.fit(rows, rows.wins_BN[:, 0], torch.ones(len(rows.wins_BN), dtype=torch.bool))
    expected_XR = world.true_XRN[..., 0] / world.true_XRN[..., 0].mean(1, keepdim=True)
    torch.testing.assert_close(table.log_ratio_XR.exp(), expected_XR, atol=0.04, rtol=0)


def test_the_tables_are_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mopo, "Settings", lambda: Settings(steps=2, averaged=1, held_out=8))
    monkeypatch.setattr(mopo, "PRECISE", Settings(steps=2, averaged=1, held_out=8))
    mopo.main(["--votes", "--quick", "--jobs", "1", "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert told.count("Bradley-Terry") == 18
    for name, rows in (("votes.csv", 36), ("missing.csv", 3 * len(PATTERNS))):
        assert len((tmp_path / name).read_text().splitlines()) == rows + 1
