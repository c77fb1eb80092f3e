"""What a user did wrong is one line; what we did wrong keeps its traceback."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import moa_lightning
from moa_lightning import cli
from moa_lightning.cli import main
from moa_lightning.distributed import raise_on_all_ranks
from moa_lightning.errors import UserError
from tests.cli.task import complaint

PACKAGE = Path(moa_lightning.__file__).parent


def raised(file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            yield node.lineno, node.exc.func.id


def test_users_are_refused_by_user_errors() -> None:
    """A ValueError would print a traceback. The pure functions know no users: whoever calls them checks first."""
    files = [f for d in (PACKAGE, PACKAGE / "callbacks") for f in d.rglob("*.py") if f.parent.name != "functional"]
    assert len(files) > 80
    assert [f"{f}:{line}" for f in files for line, name in raised(f) if name == "ValueError"] == []


@pytest.mark.parametrize("error", [UserError("write b"), None], ids=["alone", "as a cause"])
def test_a_mistake_is_one_line(
    error: UserError | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: str, args: list[str]) -> None:
        if error is not None:
            raise error
        raise TypeError("the parser's") from UserError("write b")

    monkeypatch.setattr(cli, "run", run)
    assert complaint(capsys, "fit") == "write b"


def test_a_defect_keeps_its_traceback_and_says_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moa_lightning.commands.combiners.pages.combiners", 3)  # so that our own code fails
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is, it is no exit
        main(["combiners"])
    assert not isinstance(caught.value, UserError)
    assert any("defect of moa-lightning" in note for note in caught.value.__notes__)


def test_a_value_error_of_somebody_elses_code_is_not_said_to_be_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: str, args: list[str]) -> None:
        raise ValueError("of a combiner of one's own")

    monkeypatch.setattr(cli, "run", run)
    with pytest.raises(ValueError, match="of one's own") as caught:
        main(["fit"])
    assert not hasattr(caught.value, "__notes__")


def test_a_defect_is_raised_as_it_is_by_the_process_that_has_it() -> None:
    with pytest.raises(ZeroDivisionError), raise_on_all_ranks():
        1 / 0  # noqa: B018
    with pytest.raises(UserError, match="write b"), raise_on_all_ranks():
        raise UserError("write b")
    with pytest.raises(ValueError, match="a defect") as caught, raise_on_all_ranks():
        raise ValueError("a defect")
    assert not isinstance(caught.value, UserError)
