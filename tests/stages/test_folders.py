import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from moa_lightning.utils.atomic_folder import atomic_folder, refuse_used


@contextmanager
def limited(size):
    """Within it no file of this process grows beyond so many bytes: the nearest to a full disk without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _interrupted(target, overwrite=False):
    before = target.exists()
    with atomic_folder(target, overwrite) as folder:
        (folder / "half").write_text("x")
        assert target.exists() == before
        raise RuntimeError("interrupted")


def test_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "model"
    with pytest.raises(RuntimeError, match="interrupted"):
        _interrupted(target)
    assert list(target.parent.iterdir()) == []
    with atomic_folder(target) as folder:
        (folder / "file").write_text("x")
    assert [f.name for f in target.iterdir()] == ["file"]


def test_what_is_there_stays_unless_it_may_go(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").write_text("x")
    with pytest.raises(ValueError, match="is not empty; choose another folder, or set --overwrite=true"):
        refuse_used(tmp_path / "model", overwrite=False)
    with pytest.raises(RuntimeError, match="interrupted"):
        _interrupted(tmp_path / "model", overwrite=True)
    assert (tmp_path / "model" / "precious").exists()
    with atomic_folder(tmp_path / "model", overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert [f.name for f in (tmp_path / "model").iterdir()] == ["new"]


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path):
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "old").write_text("x")
    for write in (
        lambda file: file.write_bytes(bytes(20_000)),
        lambda file: save_file({"weight": torch.zeros(5_000)}, file),
    ):
        with (
            limited(10_000),
            pytest.raises(
                ValueError, match=r"^'.*model' cannot be written: File too large; partial output was removed$"
            ),
            atomic_folder(target, overwrite=True) as folder,
        ):
            write(folder / "big.safetensors")
        assert [f.name for f in tmp_path.iterdir()] == ["model"]
        assert [f.name for f in target.iterdir()] == ["old"]


def test_other_errors_keep_their_own_words(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "model"):
        (tmp_path / "nowhere").read_text()


def test_halves_of_killed_writers_go_with_the_next_one(tmp_path):
    program = "import os, sys; from moa_lightning.utils.atomic_folder import atomic_folder\n"
    program += f"with atomic_folder({str(tmp_path / 'policy')!r}, overwrite=True, only_writer=True) as folder:\n"
    program += "    (folder / 'half').write_text('x'); os.kill(os.getpid(), 9)\n"
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "old").write_text("x")
    subprocess.run([sys.executable, "-c", program], check=False)
    assert sorted(f.name.partition("-")[0] for f in tmp_path.iterdir()) == [".policy", "policy"]
    assert [f.name for f in (tmp_path / "policy").iterdir()] == ["old"]
    with atomic_folder(tmp_path / "policy", overwrite=True, only_writer=True) as folder:
        (folder / "new").write_text("x")
    assert [f.name for f in tmp_path.iterdir()] == ["policy"]
    assert [f.name for f in (tmp_path / "policy").iterdir()] == ["new"]


def test_files_may_be_read_by_whom_the_umask_allows(tmp_path):
    with atomic_folder(tmp_path / "model") as folder:
        save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    modes = {f.stat().st_mode & 0o777 for f in (tmp_path / "model").iterdir()}
    assert modes == {(tmp_path / "model").stat().st_mode & 0o666}
