"""The bench of sampling under sharding: the same samples, and bytes that follow from the policy's size."""

import pytest

from bench.sharding.generation import Case, on_two_processes, report


@pytest.mark.slow
def test_samples_and_bytes():
    found = on_two_processes(Case(sequences=2, prompt=3, tokens=5, layers=2, hidden=32, vocabulary=61, repeats=1))
    blocks = 4 * 2 * (12 * 32**2 + 13 * 32)
    assert found["replica"]["bytes"] == 0
    assert blocks <= found["gathered"]["bytes"] <= 1.1 * found["policy"]["bytes"]
    assert found["layerwise"]["bytes"] >= 5 * blocks  # for each token
    assert [line.split()[0] for line in report(found)[1:]] == ["replica", "gathered", "layerwise"]
