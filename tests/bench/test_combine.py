"""The benchmark of the combiners: what it measures, what it prints, and that its ratios follow from its rows.

Seconds depend on the machine; none is asserted.
"""

import json
import time

import pytest
import torch

from bench.combiners import combine
from bench.combiners.combine_report import Row, summarise, table_line
from moa_lightning.functional.surrogate import clipped_surrogate


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "combine.json"
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *a, sep=" ", **_: lines.append(sep.join(map(str, a))))
        combine.main(["--quick", "--json", str(file)])
    return json.loads(file.read_text(encoding="utf-8")), "\n".join(lines)


def test_every_policy_has_a_row_for_every_number_of_objectives(quick):
    content, printed = quick
    found = [(row["policy"], row["objectives"]) for row in content["rows"]]
    assert found == [(size.name, n) for size in combine.QUICK.sizes for n in (2, 4, 8, 16)]
    for name, n in found:
        assert sum(line.split()[:1] == [name] and line.split()[2] == str(n) for line in printed.split("\n")) == 1


def test_the_full_gradient_costs_more_than_pama_everywhere(quick):
    content, _ = quick
    assert all(row["full_gradient_seconds"] > row["pama_seconds"] > 0 for row in content["rows"])
    # Beyond two objectives MGDA-UB's solver iterates; with two its lead is too small to rely on in so short a run.
    assert all(row["mgda_ub_seconds"] > row["pama_seconds"] for row in content["rows"] if row["objectives"] > 2)


def test_pama_reads_the_same_tensors_whatever_the_policy(quick):
    rows = quick[0]["rows"]
    shapes = {n: {tuple(row["shape"]) for row in rows if row["objectives"] == n} for n in (2, 4, 8, 16)}
    assert shapes == {n: {(combine.QUICK.sequences, combine.QUICK.tokens, n)} for n in (2, 4, 8, 16)}


def test_scaled_numbers_are_marked_and_only_those(quick):
    content, printed = quick
    marked = {row["policy"]: row["measured_sequences"] < combine.QUICK.sequences for row in content["rows"]}
    assert sorted(marked.values()) == [False, True]  # the quick plan shows both
    lines = [line for line in printed.split("\n") if line.split()[:1] and line.split()[0] in marked and "/8" in line]
    assert len(lines) == 8
    assert all(line.count("~") == (3 if marked[line.split()[0]] else 0) for line in lines)


def test_the_ratios_are_those_of_the_rows(quick):
    content, _ = quick
    for row in content["rows"]:
        assert row["pama_of_step"] == pytest.approx(row["pama_seconds"] / row["step_seconds"])
        assert row["full_gradient_over_pama"] == pytest.approx(row["full_gradient_seconds"] / row["pama_seconds"])
    worst = max(row["pama_of_step"] for row in content["rows"])
    assert content["summary"]["largest_pama_of_step"] == pytest.approx(worst)


def test_the_settings_say_what_was_run(quick):
    settings = quick[0]["settings"]
    assert settings["threads"] == torch.get_num_threads()
    assert settings["plan"]["objectives"] == [2, 4, 8, 16]


def row(policy="p", parameters=10, objectives=2, pama=1.0, scaled=False):
    shape = (32, 512, objectives)
    return Row(policy, parameters, objectives, shape, 32, scaled, 400.0, pama, 3.0, 700.0, 8)


def test_the_summary_fits_the_line_through_n_and_compares_the_policies():
    rows = [row("a", 10, n, 1.0 + 0.5 * n) for n in (2, 4, 8, 16)] + [row("b", 1000, n, 2.0 + n) for n in (2, 4, 8, 16)]
    summary = summarise(rows)
    assert summary["pama_over_n"]["a"] == pytest.approx(
        {"seconds_per_objective": 0.5, "seconds_at_0": 1.0, "largest_distance_from_line": 0.0, "last_over_first": 4.5}
    )
    assert summary["pama_over_policies"] == {str(n): 2.0 for n in (2, 4, 8, 16)}
    assert summary["parameters_over_policies"] == 100
    assert summary["largest_pama_of_step"] == 18 / 400
    assert summary["smallest_full_gradient_over_pama"] == 700 / 18


def test_a_table_line_shows_shares_and_multiples():
    assert table_line(row(pama=2.0, scaled=True)).split() == (
        ["p", "10", "2", "32/32", "~400", "2000.00", "0.500%", "~3,000.0", "2x", "~700", "350x", "1.8x", "0.000"]
    )


def test_the_full_gradient_is_that_of_each_objective_and_its_weights_are_the_min_norm_point():
    policy = combine.build_policy(combine.QUICK.sizes[0])
    ids_BL = torch.randint(1, 64, (2, 9))
    inputs = (ids_BL, torch.ones_like(ids_BL), torch.ones(2, 8, dtype=torch.bool))
    output = policy(*inputs)
    experience = combine.make_experience(ids_BL, output.logprobs_BT.detach(), 3)
    gradients_NP, laps = combine.full_gradients(policy, experience, output, time.perf_counter)
    assert len(laps) == 3

    ratio_BT = (policy(*inputs).logprobs_BT - experience.behaviour_logprobs_BT).exp()
    clipped_surrogate(ratio_BT, experience.advantages_BTN[..., 1], 0.2).mean().backward()
    expected_P = torch.cat([p.grad.flatten() for p in policy.trainable()[0]])
    torch.testing.assert_close(gradients_NP[1], expected_P)

    gram_NN = (gradients_NP @ gradients_NP.T).double()
    weights_N = combine.min_norm(gradients_NP)
    assert float(weights_N.sum()) == pytest.approx(1) and (weights_N >= 0).all()
    norm = weights_N @ gram_NN @ weights_N
    # Optimality on the simplex: no objective's slope is below the norm reached (up to the solver's step).
    assert (gram_NN @ weights_N >= norm - 1e-2 * gram_NN.diagonal().max()).all()
