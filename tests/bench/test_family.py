"""The benchmark of all combiners: what it counts, and that every combiner is in it. No seconds are asserted."""

import inspect
import json

import pytest
import torch

from bench.combiners import family
from bench.combiners.family_report import Row, claims_line, table_line
from bench.combiners.memory import MemoryTracker, peak_bytes
from bench.combiners.roster import Entry, deeper, exported, variants
from moa_lightning import combiners as package
from moa_lightning.losses import ClippedSurrogate, PairwiseLogistic, WeightedLikelihood


def test_storages_count_from_the_operation_that_makes_them_until_their_last_view_is_gone():
    def call():
        a = torch.zeros(1000)  # 4000 bytes
        b = a.view(10, 100)  # the same storage
        c = a + 1  # 8000
        del a
        d = c.exp()  # 12000: b still looks at a's
        del b, d  # 4000
        return torch.ones(250), c  # 5000

    assert peak_bytes(call) == 12_000
    with MemoryTracker() as tracker:
        kept = call()
        assert tracker.live == 5_000
        del kept
        assert (tracker.live, tracker.peak) == (0, 12_000)


def test_what_the_graph_keeps_counts_and_so_do_held_tensors_and_gradients():
    weight = torch.ones(1000, requires_grad=True)

    def call():
        y = (weight * 2).exp().sum()  # held 4000, weight * 2, and its exp, which the graph keeps: 12000; then y
        y.backward()  # 4 of y, 4 of its gradient, exp's 4000, and the gradient by exp's input: 12008

    assert peak_bytes(call, [weight]) == 12_008
    assert peak_bytes(call, [weight, weight.grad]) == 16_008  # now the gradient is there already


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "family.json"
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *a, sep=" ", **_: lines.append(sep.join(map(str, a))))
        family.main(["--quick", "--json", str(file)])
    return json.loads(file.read_text(encoding="utf-8"))["rows"], "\n".join(lines)


def test_every_exported_combiner_has_a_row_for_every_number_of_objectives(quick):
    rows, printed = quick
    names = [entry.name for entry in [*exported(), *variants(), *deeper()]]
    concrete = {
        name for name in package.__all__
        if isinstance(getattr(package, name), type)
        and issubclass(getattr(package, name), package.Combiner)
        and not inspect.isabstract(getattr(package, name))
    }  # fmt: skip
    assert concrete == {entry.name for entry in exported()}
    assert [(row["objectives"], row["combiner"]) for row in rows] == [(n, name) for n in (2, 4) for name in names]
    for name in names:
        assert sum(line.startswith(f"{name:26}") for line in printed.split("\n")) == 2


def test_multipliers_move_in_every_step_that_is_measured(monkeypatch):
    steps, plain = [], package.DualUpdate.step_state
    monkeypatch.setattr(package.DualUpdate, "step_state", lambda *given: steps.append(1) or plain(*given))
    bench = family.Bench.build(family.build_policy(family.QUICK.size), family.QUICK, 2)
    moving = [e for e in [*exported(), *variants()] if hasattr(e.combiner, "dual") and e.name != "CAID"]  # it solves
    assert {"Lagrangian", "MOPO", "CAID, iterated"} <= {entry.name for entry in moving}
    for entry in moving:
        state = bench.start(entry)
        for _ in range(1 + family.DEFAULT.repeats):
            steps.clear()
            state = entry.combiner.observe(bench.experience, state)
            assert steps, entry.name


def test_linear_adds_nothing_to_itself(quick):
    for row in (row for row in quick[0] if row["combiner"] == "Linear"):
        assert row["added_seconds"] == row["added_bytes"] == 0
        assert row["step_bytes"] > 0


def test_gradients_of_all_parameters_are_held_once_for_each_objective(quick):
    held = {
        row["objectives"]: row["added_bytes"] for row in quick[0] if row["combiner"] == "Gramian, parameters"
    }  # fmt: skip
    sizes = [parameter.numel() for parameter in family.build_policy(family.QUICK.size).parameters()]
    # And those of one parameter once more, side by side for the product: at the peak, of the largest.
    assert held[4] - held[2] == pytest.approx(2 * 4 * (sum(sizes) + max(sizes)), rel=0.05)


def test_a_claim_holds_if_time_and_memory_stay_within_the_limit():
    def row(seconds=0.0, count=0, limit=0.02):
        return Row("x", "scores", "ClippedSurrogate", 2, seconds, 1.0, count, 1000, limit)

    assert row(0.02, 20).holds and row(-0.5, -5).holds
    assert row(0.021).holds is False and row(count=21).holds is False
    assert row(9.0, limit=None).holds is None
    assert table_line(row(0.021)).endswith("FAILS")
    assert not table_line(row(0.019)).endswith("FAILS")
    assert claims_line([row(), row(0.021), row(9.0, limit=None)]) == "1 of 2 claims hold; not x with N = 2."


def test_limits_are_those_of_the_claims():
    limits = {entry.name: (entry.limit(2), entry.limit(4)) for entry in [*exported(), *variants(), *deeper()]}
    assert {limits[name] for name in ("GDPO", "Tchebycheff", "SmoothTchebycheff", "RVPO")} == {(0.02, 0.02)}
    assert {limits[name] for name in ("Lagrangian", "MOPO", "MODPO", "CAID", "DynamicWeights, front")} == {(0.03, 0.03)}
    assert max(limits["CTWA"]) <= 0.03
    assert {limits[name] for name in ("MGDAUB", "GAPO", "Gramian")} == {(0.3, None)}
    assert {limits[name] for name in ("Linear", "Gramian, last layer", "Gramian, parameters")} == {(None, None)}


def test_each_combiner_goes_with_a_loss_that_takes_its_score():
    losses = {entry.name: type(entry.loss) for entry in exported()}
    assert losses["MODPO"] is PairwiseLogistic and losses["MOPO"] is WeightedLikelihood
    assert {losses[name] for name in losses if name not in ("MODPO", "MOPO")} == {ClippedSurrogate}
    assert Entry("PAMA", package.PAMA()).loss == ClippedSurrogate()
