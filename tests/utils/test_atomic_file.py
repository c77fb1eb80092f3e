import subprocess
import sys
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


def test_a_link_stays_one_and_a_mode_is_kept(tmp_path: Path) -> None:
    file, link = tmp_path / "there" / "summary.json", tmp_path / "summary.json"
    file.parent.mkdir()
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    for new in ("new", "newer"):
        with atomic_file(link) as scratch:
            scratch.write_text(new)
        assert link.is_symlink()
        assert file.read_text() == new
        assert file.stat().st_mode & 0o777 == 0o640
    assert sorted(tmp_path.rglob("*")) == [link, file.parent, file]


def test_what_a_killed_writer_left_goes_and_what_another_writes_stays(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    ended = subprocess.Popen([sys.executable, "-IS", "-c", ""])
    ended.wait()
    writing = subprocess.Popen([sys.executable, "-IS", "-c", "input()"], stdin=subprocess.PIPE)
    others = [tmp_path / f".summary.json.{name}" for name in (f"{writing.pid}.partial", "old.partial", "1")]
    for left in (tmp_path / f".summary.json.{ended.pid}.partial", *others):
        left.touch()
    with atomic_file(file) as scratch:
        scratch.write_text("new")
    writing.communicate(b"\n")
    assert set(tmp_path.iterdir()) == {file, *others}


def _write_half(path: Path) -> None:
    path.write_text("half")
    raise ZeroDivisionError
