"""The exact laboratory: its problems are what their names say, and its tables say what was computed."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.mopo import cost as mopo_cost
from bench.mopo import run as mopo
from bench.mopo.ablation import Setting, ablate
from bench.mopo.learned import Learned, Recipe
from bench.mopo.report import Entry
from bench.mopo.structures import (
    STRUCTURES,
    condorcet_cycle,
    evaluate,
    near_deterministic,
    partial_conflict,
    solve,
    sweep,
    ties,
    total_conflict,
    write_comparisons,
)
from moa_lightning.data import Preferences
from moa_lightning.data.base import Stage


def equal(structure):
    return np.full(len(structure.responses), 1 / len(structure.responses))


@pytest.mark.parametrize("build", STRUCTURES, ids=lambda build: build.__name__)
def test_matrices_are_of_win_probabilities(build):
    structure = build()
    assert len(set(structure.responses)) == len(structure.responses) >= 6
    for wins_KK in structure.wins.values():
        assert wins_KK.shape == (len(structure.responses),) * 2
        torch.testing.assert_close(wins_KK + wins_KK.T, torch.ones_like(wins_KK))
        assert ((wins_KK > 0) & (wins_KK < 1)).all()


def test_structures_are_what_their_names_say():
    assert len({build().name for build in STRUCTURES}) == len(STRUCTURES)
    cycle = condorcet_cycle().wins["first"]
    assert min(cycle[0, 1], cycle[1, 2], cycle[2, 0]) > 0.5
    assert torch.allclose(total_conflict().wins_KN.sum(1), torch.ones(6, dtype=torch.float64))
    deterministic = near_deterministic().wins["first"][~torch.eye(6, dtype=torch.bool)]
    assert set(deterministic.numpy().round(9)) == {0.01, 0.99}
    assert sum(len(set(wins_N.tolist())) for wins_N in ties().wins_KN.T) == 6  # three classes of six, twice
    assert any((build().wins_KN.shape[1]) == 3 for build in STRUCTURES)


def test_comparisons_are_drawn_from_the_matrices_and_read_as_preferences(tmp_path):
    structure, file = partial_conflict(), tmp_path / "rows.jsonl"
    write_comparisons([structure], 400, seed=0, file=file)
    (row,) = Preferences(str(file), val_size=0).rows(Stage.TRAIN)
    found_KN = torch.tensor([row[f"wins/{name}"] for name in structure.wins]).double().T
    off = (found_KN - structure.wins_KN).abs()
    # Six comparisons with the others, 400 draws each: a standard error of at most .5 / sqrt(2400).
    assert 0 < off.max() < 4 * 0.5 / np.sqrt(2400)
    write_comparisons([structure], 400, seed=1, file=tmp_path / "other.jsonl")
    assert file.read_text() != (tmp_path / "other.jsonl").read_text()


def entry(learned=()):
    structure = total_conflict()
    exact = solve(structure, np.array([0.4]), 0.1, equal(structure))
    moved = evaluate(np.roll(exact.policy_K, 1), structure, 0.1, equal(structure))
    return Entry(structure, np.array([0.4]), exact, moved, list(learned))


def test_the_distance_is_between_the_values_of_the_two_answers():
    found = entry()
    squares = sum((found.exact.values_N[i] - found.mopo.values_N[i]) ** 2 for i in range(2))
    assert found.distance == pytest.approx(squares**0.5)
    assert found.distance > 0.01


def test_the_interval_is_students_and_says_whether_the_exact_value_is_inside():
    policy_K = entry().exact.policy_K
    around = [policy_K + shift * np.array([1, 0, 0, 0, 0, -1.0]) for shift in (-0.02, 0.01, 0.01)]
    found = entry([Learned(p, 0.0, np.zeros(1)) for p in around])
    wins_K = found.structure.wins_KN[:, 0].numpy()
    spread = np.std([p @ wins_K for p in around], ddof=1) / np.sqrt(3)
    assert found.error_N[0] == pytest.approx(4.302653 * spread, rel=1e-5)  # t of 2 degrees of freedom
    assert found.inside_N.all()
    beside = [p + 0.05 * np.array([1, 0, 0, 0, 0, -1.0]) for p in around]
    assert not entry([Learned(p, 0.0, np.zeros(1)) for p in beside]).inside_N.any()


def test_without_refreshes_the_tabular_run_ends_at_the_exact_optimum():
    structure = partial_conflict()
    found = ablate(structure, equal(structure), Setting(beta=0.95, interval=None, steps=300))
    threshold = 0.95 * equal(structure) @ structure.wins_KN.numpy()[:, 1:]
    exact = solve(structure, threshold, 0.08, equal(structure))
    np.testing.assert_allclose(found.thresholds_M, threshold, atol=1e-6)
    np.testing.assert_allclose(found.values_N, exact.values_N, atol=5e-3)


def test_a_reference_that_follows_at_once_lets_the_secondary_objective_go():
    """The threshold follows the reference down: what beta bounds is one refresh, not the whole run."""
    structure = total_conflict()
    settings = [Setting(interval=interval, steps=200) for interval in (1, None)]
    followed, kept = (ablate(structure, equal(structure), setting).values_N[1] for setting in settings)
    assert followed < 0.3 < 0.49 < kept


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("bench"), []
    small = replace(mopo.QUICK, thresholds=6, recipe=Recipe(comparisons=100, steps=3), ablation=Setting(steps=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mopo, "QUICK", small)
        patch.setattr("builtins.print", lambda *a, sep=" ", **_: lines.append(sep.join(map(str, a))))
        mopo.main(["--quick", "--jobs", "1", "--out", str(out)])
    return out, "\n".join(lines)


def rows_of(file):
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def test_mopos_points_lie_on_the_exact_front_of_every_structure(study):
    rows = rows_of(study[0] / "exact.csv")
    assert {row["structure"] for row in rows} == {build().name for build in STRUCTURES}
    feasible = [row for row in rows if row["feasible"] == "True"]
    assert max(float(row["distance"]) for row in feasible) <= 1e-3
    assert {row["structure"] for row in rows if row not in feasible} == {"three objectives"}
    for name in {row["structure"] for row in rows}:
        values = [float(row["exact/first"]) for row in feasible if row["structure"] == name]
        assert max(values) - min(values) > 0.02  # a front, not a point


def test_the_sweep_starts_where_nothing_binds():
    structure = partial_conflict()
    thresholds = sweep(structure, 0.1, equal(structure), 6)
    free = solve(structure, np.zeros(1), 0.1, equal(structure)).values_N[1]
    assert thresholds.shape == (6, 1)
    assert thresholds[0, 0] < free < thresholds[-1, 0] < float(structure.wins_KN[:, 1].max())


def test_the_study_writes_tables_and_a_figure(study):
    out, printed = study
    learned, ablations = rows_of(out / "learned.csv"), rows_of(out / "ablations.csv")
    assert len(learned) == len(STRUCTURES) * len(mopo.QUICK.shares)
    assert {(row["varied"], row["value"]) for row in ablations} == {
        *(("beta", value) for value in ("0.9", "0.95", "0.99", "0.999")),
        *(("t0", value) for value in ("1", "100", "1000", "inf")),
        *(("tau", value) for value in ("0.04", "0.08", "0.16", "0.32")),
    }
    assert (out / "front.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for build in STRUCTURES:
        assert printed.count(build().name) >= 2
    inside = sum(row[name] == "True" for row in learned for name in row if name.startswith("inside/"))
    cases = sum(row[name] != "" for row in learned for name in row if name.startswith("inside/"))
    assert f"in {inside} of {cases} cases" in printed


def test_the_cost_is_a_share_of_the_step(tmp_path, capsys):
    mopo.main(["--cost", "--quick", "--out", str(tmp_path)])
    rows = rows_of(tmp_path / "cost.csv")
    assert [row["policy"] for row in rows] == [case.size.name for case in mopo_cost.QUICK]
    for row in rows:
        seconds = [float(row[name]) for name in ("observe", "combine", "step")]
        assert min(seconds) > 0
        assert float(row["share"]) == pytest.approx((seconds[0] + seconds[1]) / seconds[2])
    above = sum(float(row["share"]) >= 0.01 for row in rows)
    assert f"in {len(rows) - above} of {len(rows)} cases" in capsys.readouterr().out
