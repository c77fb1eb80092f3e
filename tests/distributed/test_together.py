"""What one process cannot do is told on all of them: by stand-ins for what the others say."""

import pytest

from moa_lightning import distributed
from moa_lightning.errors import UserError


@pytest.mark.parametrize("error", [UserError("no such column"), OSError(116, "Stale file handle"), OSError()])
def test_a_failure_here_keeps_its_cause(error: Exception) -> None:
    with pytest.raises(ValueError, match=r"column|Stale|OSError") as found, distributed.together():
        raise error
    assert found.value.__cause__ is error


def test_a_failure_elsewhere_is_raised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "all_objects", lambda mine: [mine, "a file is gone", "another one"])
    with pytest.raises(ValueError, match=r"^a file is gone$"), distributed.together():
        pass


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(KeyError), distributed.together():
        raise KeyError("prompt")
