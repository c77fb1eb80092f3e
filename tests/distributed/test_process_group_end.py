"""The threads of the process group have ended before Python shuts down: one that has not can abort the process."""

import atexit
import runpy

import pytest

from moa_lightning.distributed import collectives
from tests.helpers import pairs, processes, tiny


@pytest.mark.slow
def test_no_thread_is_left_at_the_end(tmp_path):
    """In every test of two processes each one looks itself, and ends with a code of its own if there is one."""
    tiny.policy_folder(tmp_path / "policy", scale=1.0)
    pairs.write(tmp_path / "data.jsonl")
    found = processes.both([(strategy, "end", {"steps": 1}) for strategy in ("ddp", "fsdp2")], tmp_path)
    assert [len(result["losses"]) for result in found.values()] == [1, 1]


def test_it_ends_at_the_exit_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = []
    monkeypatch.setattr(atexit, "register", registered.append)
    runpy.run_path(collectives.__file__)
    assert [function.__name__ for function in registered] == ["end_process_group"]
    collectives.end_process_group()  # nothing without a process group
