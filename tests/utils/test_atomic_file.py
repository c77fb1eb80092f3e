from pathlib import Path

import pytest

from moa_lightning.utils.atomic_file import atomic_file


def test_the_file_is_replaced_once_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    file.write_text("old")
    with atomic_file(file) as scratch:
        scratch.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_after_an_error_the_old_file_stays_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(file) as scratch:
        _write_half(scratch)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def _write_half(path: Path) -> None:
    path.write_text("half")
    raise ZeroDivisionError
