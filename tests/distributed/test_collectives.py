"""What one process cannot do is raised on all of them: with fakes for what the other processes report."""

import pytest

from moa_lightning.distributed import collectives
from moa_lightning.errors import UserError


@pytest.mark.parametrize("error", [UserError("no such column"), OSError(116, "Stale file handle"), OSError()])
def test_a_failure_here_keeps_its_cause(error: Exception) -> None:
    with pytest.raises(ValueError, match=r"column|Stale|OSError") as found, collectives.raise_on_all_ranks():
        raise error
    assert found.value.__cause__ is error


def test_a_failure_elsewhere_is_raised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "all_objects", lambda mine: [mine, "a file is gone", "another one"])
    with pytest.raises(ValueError, match=r"^a file is gone$"), collectives.raise_on_all_ranks():
        pass


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(KeyError), collectives.raise_on_all_ranks():
        raise KeyError("prompt")
