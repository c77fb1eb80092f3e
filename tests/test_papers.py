"""PAPERS.md points at files and tests that exist; no method is without its paper, there or in its docstring."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "PAPERS.md").read_text()


def test_every_file_and_test_exists():
    paths = re.findall(r"`((?:moa_lightning|tests|callbacks|bench)/[\w/.]+)`", TEXT)
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_combiner_and_loss_is_there_or_names_its_source():
    files = [*(ROOT / "moa_lightning" / "combiners").rglob("*.py"), *(ROOT / "moa_lightning" / "losses").glob("*.py")]
    shared = {"__init__", "base", "claims", "hooks", "named", "weighted"}
    methods = {f.relative_to(ROOT).as_posix() for f in files if f.stem not in shared}
    unnamed = {path for path in methods if f"`{path}`" not in TEXT}
    assert {path for path in unnamed if "Source: " not in (ROOT / path).read_text()} == set()
