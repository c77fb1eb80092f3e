"""Policies and models that are not there: the line names a folder that may be meant."""

import re
from pathlib import Path
from typing import Any, NoReturn

import pytest

from moa_lightning.errors import UserError
from moa_lightning.utils.pretrained import open_pretrained


class Offline:
    """A class of transformers without a network."""

    @staticmethod
    def from_pretrained(path: str, **arguments: Any) -> NoReturn:
        raise OSError(
            "We couldn't connect to the hub to load the files.\n" + "See how to go on without it at the page " * 9
        )


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("./polcy", "folder './polcy' does not exist (did you mean 'policy'?); give a folder in Hugging Face format"),
        ("runs/polcy", "there is no folder of that name (did you mean 'runs/policy'?), and the hub gave: We couldn't "),
        ("polcy", "there is no folder of that name (did you mean 'policy'?), and the hub gave: We couldn't connect to"),
        (
            "other",
            "there is no folder of that name, and the hub gave: We couldn't connect to the hub to load the files.",
        ),
    ],
)
def test_a_folder_of_nearly_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, says: str) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "runs" / "policy").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(says)) as refused:
        open_pretrained(Offline, path, "model config")
    assert "See how" not in str(refused.value), "a sentence that is cut"
