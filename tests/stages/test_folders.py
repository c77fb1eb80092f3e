import pytest

from moa_lightning.stages.folders import refuse_used, whole_folder


def _interrupted(target, overwrite=False):
    before = target.exists()
    with whole_folder(target, overwrite) as folder:
        (folder / "half").write_text("x")
        assert target.exists() == before
        raise RuntimeError("interrupted")


def test_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "model"
    with pytest.raises(RuntimeError, match="interrupted"):
        _interrupted(target)
    assert list(target.parent.iterdir()) == []
    with whole_folder(target) as folder:
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
    with whole_folder(tmp_path / "model", overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert [f.name for f in (tmp_path / "model").iterdir()] == ["new"]
