"""Every YAML in ``configs/`` is parsed by the command that reads it, and says what it seems to say."""

from inspect import isabstract
from pathlib import Path
from typing import Any

import pytest
import yaml

from moa_lightning import combiners
from moa_lightning.cli import main
from moa_lightning.combiners import Combiner

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
# These hold one part of a run; the demo gives the rest.
PARTIAL = ("combiner/", "trainer/", "task/length.yaml")
COMMANDS = {"hh/sft.yaml": "sft", "hh/reward.yaml": "reward"}  # all others are read by fit


def _resolved(name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    configs = ["demo.yaml", name] if name.startswith(PARTIAL) else [name]
    with pytest.raises(SystemExit) as stop:
        main([COMMANDS.get(name, "fit"), *(f"--config={CONFIGS / config}" for config in configs), "--print_config"])
    printed = capsys.readouterr()
    assert not stop.value.code, f"{stop.value.code} {printed.err}"
    resolved = yaml.safe_load(printed.out)
    assert isinstance(resolved, dict)
    return resolved


def _lost(given: Any, resolved: Any, where: str = "") -> list[str]:
    """Keys of ``given`` that do not come back with their value; short class names may come back as long ones."""
    if isinstance(given, dict):
        if not isinstance(resolved, dict):
            return [where]
        return [lost for key, value in given.items() for lost in _lost(value, resolved.get(key), f"{where}.{key}")]
    if isinstance(given, list) and isinstance(resolved, list) and len(given) == len(resolved):
        return [
            lost for i, pair in enumerate(zip(given, resolved, strict=True)) for lost in _lost(*pair, f"{where}.{i}")
        ]
    same = given == resolved or (where.endswith("class_path") and str(resolved).endswith(f".{given}"))
    return [] if same or _as_number(given) == _as_number(resolved) is not None else [where]


def _as_number(value: Any) -> float | None:
    """YAML 1.1 reads ``1e-5`` as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


@pytest.mark.parametrize("name", FILES)
def test_yaml_parses_to_what_it_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = yaml.safe_load((CONFIGS / name).read_text())
    assert _lost(given, _resolved(name, capsys)) == []


def test_a_wrong_field_is_noticed(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((CONFIGS / "demo.yaml").read_text() + "\nno_such_field: 1\n")
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={wrong}", "--print_config"])
    assert stop.value.code


def test_every_combiner_has_a_preset_of_its_stem() -> None:
    exported = [getattr(combiners, name) for name in combiners.__all__]
    classes = [c for c in exported if isinstance(c, type) and issubclass(c, Combiner) and not isabstract(c)]
    stems = {c.__module__.rpartition(".")[2] for c in classes}
    assert len(classes) >= 3
    assert stems == {path.stem for path in (CONFIGS / "combiner").glob("*.yaml")}
    for path in (CONFIGS / "combiner").glob("*.yaml"):
        preset = yaml.safe_load(path.read_text())["model"]["combiner"]["class_path"]
        assert path.stem == getattr(combiners, preset.rpartition(".")[2]).__module__.rpartition(".")[2]
