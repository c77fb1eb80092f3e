"""``moa combiners``: the table, and a page of each, from the classes, their docstrings and their presets."""

import re
from pathlib import Path

import pytest
import yaml

from moa_lightning.combiners.claims import MEANINGS, Claim
from moa_lightning.commands.combiners.facts import FAMILIES, SECTIONS, Facts, every_combiner
from moa_lightning.commands.combiners.pages import page
from moa_lightning.signals import MEANINGS as SIGNALS
from moa_lightning.signals import Signal
from tests.cli.task import complaint, moa

ROOT = Path(__file__).resolve().parents[2]
KNOWN = every_combiner()
HEADINGS = [  # of every page, in this order
    "Formula",
    "Symbols",
    "When",
    "Cost",
    "What it reads and remembers",
    "A response without a score",
    "KL",
    "Convergence",
    "What it claims",
    "Settings",
    "YAML",
    "What to watch in the logs",
    "Source",
    "Code and test",
]
OWN = '''
from dataclasses import dataclass
from moa_lightning.combiners import Linear

@dataclass(frozen=True)
class Halved(Linear):
    """Half of it.

    Choose it when: never.

    Args:
        share: of what it
            would be.
    """
    share: float = 0.5

class Bare(Linear): ...

class Needing(Linear):
    """With a setting that has no default."""
    def __init__(self, must): ...
'''


@pytest.mark.parametrize("one", KNOWN, ids=lambda one: one.name)
def test_a_page_has_every_section_and_its_yaml_names_the_combiner(one: Facts) -> None:
    printed = page(one)
    required = set(SECTIONS) - {"Deviations"}  # some have none
    assert required <= set(one.sections)
    assert all(text.endswith(".") and len(text) > 5 for text in one.sections.values())
    assert re.findall(r"^## (.*)$", printed, re.MULTILINE) == HEADINGS
    for title in one.sections.keys() - {"Symbols"}:
        text = one.sections[title]
        assert text in printed or text[0].upper() + text[1:] in printed
    for symbol in one.sections["Symbols"].removesuffix(".").split("; "):
        assert f"\n* {symbol}\n" in printed
    assert one.test in printed
    assert (ROOT / one.test).is_file()
    assert all(setting.meaning for setting in one.settings)
    assert "``" not in printed.replace("```", "")
    blocks = re.findall(r"```yaml\n(.*?)```", printed, re.DOTALL)
    assert yaml.safe_load(blocks[0])["model"]["combiner"]["class_path"] == one.name
    assert one.combiner is not None
    for needed in one.combiner.needs:
        assert f"reads **{needed}**" in printed
    for claim in one.combiner.claimed:
        assert f"**{claim}**: {MEANINGS[claim]}" in printed


def test_the_table_has_every_combiner_once_and_fits(capsys: pytest.CaptureFixture[str]) -> None:
    moa("combiners")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    for one in KNOWN:
        assert sum(line.split()[:1] == [one.name] for line in lines) == 1
    assert [f for f in FAMILIES if any(line.startswith(f"{f}:") for line in lines)] == list(FAMILIES)
    words = [" ".join(line.split()) for line in lines]
    for family in FAMILIES:
        start = next(i for i, line in enumerate(words) if line.startswith(f"{family}:"))
        rows = "\n".join(words[start:]).partition("\n\n")[0]
        assert [one.name in rows for one in KNOWN] == [one.family == family for one in KNOWN]
    assert [c for c, text in MEANINGS.items() if not any(line.endswith(f"{c}: {text}") for line in words)] == []
    assert [s for s, text in SIGNALS.items() if f"{s} {text}" not in words] == []
    assert not {"…", "\x1b"} & set("".join(lines))
    assert set(MEANINGS) == set(Claim)
    assert set(SIGNALS) == set(Signal)


def test_families_and_costs_are_read_off_the_classes() -> None:
    by_name = {one.name: one for one in KNOWN}
    scores, gradients, adaptive, constrained = FAMILIES
    for name, family in {"GDPO": scores, "GAPO": gradients, "CTWA": adaptive, "MOPO": constrained}.items():
        assert by_name[name].family == family
    assert by_name["Linear"].extra_passes == "none"
    assert by_name["MGDAUB"].extra_passes == "one, through the head"
    assert by_name["PAMA"].mathematics == ("moa_lightning.functional.pama",)
    assert by_name["Lagrangian"].remembered[:3] == ("duals", "thresholds", "values")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moa("combiners", "--name=PAMA")
    assert capsys.readouterr().out.startswith("# PAMA\n")
    moa("combiners", "--output", tmp_path / "docs")
    assert {p.stem for p in (tmp_path / "docs").iterdir()} == {one.name for one in KNOWN} | {"index"}
    index = (tmp_path / "docs" / "index.md").read_text()
    for link in re.findall(r"\]\((\S+)\)", index):
        assert (tmp_path / "docs" / link).is_file()


def test_a_page_of_your_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_combiner_of_the_test.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    moa("combiners", "--name=my_combiner_of_the_test.Halved")
    printed = capsys.readouterr().out
    assert printed.startswith("# Halved\n\nHalf of it.\n\n## When\n\nNever.\n")
    assert "| `share` | `0.5` | of what it would be. |" in printed
    assert "class_path: my_combiner_of_the_test.Halved" in printed
    for other in ("Bare", "Needing"):
        moa("combiners", f"--name=my_combiner_of_the_test.{other}")
        assert capsys.readouterr().out.startswith(f"# {other}\n")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Gramain", "there is no combiner 'Gramain'; did you mean 'Gramian'?"),
        ("Pama", "there is no combiner 'Pama'; did you mean 'PAMA'?"),
        ("nowhere_at_all.Mine", "combiner 'nowhere_at_all.Mine': there is no module 'nowhere_at_all'"),
        ("moa_lightning.combiners.Combiner", "is no combiner: subclass"),
        ("moa_lightning.rewards.Length", "is no combiner: subclass"),
    ],
)
def test_what_is_no_combiner(name: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in complaint(capsys, "combiners", f"--name={name}")
