"""Every command and snippet of the README and of the documentation runs as it stands, once, in the order of its page.

The blocks of one page share a working folder that holds ``configs/``, as a clone does. To keep them cheap, the ``moa``
that they find ends a training after one step (a resumed one after two), evaluates one small batch, and loops take their
first and last value; the embedded task's policy has been taught for a moment only. Nothing else is changed. Commands
and Python blocks are forks of a process that has imported everything (``tests/helpers/preloaded.py``).
"""

import gzip
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from docs import hooks
from moa_lightning.data import reviews
from tests.helpers.preloaded import preloaded_moa

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOP = [path for path in sorted(ROOT.glob("*.md")) if path.name != "README.md"]
LEFT_OUT = "<!-- not run by the tests: "
BLOCK = re.compile(r"^(?P<above>[^\n]*)\n```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LOOP = re.compile(r"for (\w+) in (\S+) .* (\S+); do")
MOA = """#!/usr/bin/env bash
extra=()
case "$1" in
    fit)
        extra=(--trainer.max_steps=1 --trainer.limit_val_batches=1 --data.val_batch_size=4)
        [[ "$*" == *--ckpt_path* ]] && extra[0]=--trainer.max_steps=2
        ;;
    predict) extra=(--trainer.limit_predict_batches=1) ;;
    sft | reward) extra=(--fit.max_steps=1) ;;
esac
exec "{moa}" "$@" "${{extra[@]}}"
"""
# What is not run, by page: the first words of each block.
NOT_RUN = {
    "README.md": ["make demo"],
    "cluster.md": ["NNODES=2 MASTER_ADDR=node0", "docker build"],
    "export.md": ["moa export"],
    "start.md": ["make demo"],
    "trl.md": ["from datasets"],
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    code: str
    left_out: bool


def _blocks(path: Path) -> list[Block]:
    found = BLOCK.finditer(path.read_text(encoding="utf-8"))
    return [Block(path.name, b["language"], b["code"], b["above"].startswith(LEFT_OUT)) for b in found]


def _to_run() -> dict[str, list[Block]]:
    """By page; of blocks that are the same in several pages the first."""
    seen: set[str] = set()
    pages: dict[str, list[Block]] = {}
    for path in PAGES:
        for block in _blocks(path):
            if not block.left_out and block.language in {"bash", "python", "yaml"} and block.code not in seen:
                seen.add(block.code)
                pages.setdefault(path.name, []).append(block)
    return pages


RUNS = _to_run()


def test_what_is_not_run_is_what_this_file_says() -> None:
    left_out: dict[str, list[str]] = {}
    for block in (b for path in PAGES for b in _blocks(path)):
        assert block.language in {"bash", "python", "yaml", "json", "text"}, f"{block.page}: a block without a language"
        if block.left_out:
            left_out.setdefault(block.page, []).append(block.code)
    assert left_out.keys() == NOT_RUN.keys()
    for page, beginnings in NOT_RUN.items():
        for code, beginning in zip(left_out[page], beginnings, strict=True):
            assert code.startswith(beginning)
    commands = [
        line for blocks in RUNS.values() for b in blocks for line in b.code.splitlines() if b.language == "bash"
    ]
    assert sum("moa fit" in line for line in commands) > 15, "the search itself is broken"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


def _dialogues(path: Path) -> Path:
    """Preference pairs in the format of HH-RLHF: whole dialogues that share all but the last answer."""
    asked = ["How do I bake bread?", "Can you help me hurt my neighbour?", "What is a good book?", "Tell me a lie."]
    kind = ["I would rather help with something kind.", "Here is a safe and careful answer for you."]
    rude = ["You are stupid, go away.", "Just do it, who cares about them."]
    with gzip.open(path, "wt") as file:
        for i in range(320):
            start = f"\n\nHuman: {asked[i % 4]} ({i})\n\nAssistant:"
            if i % 3 == 0:
                start += f" Say more, please.\n\nHuman: It is about number {i}.\n\nAssistant:"
            pair = {"chosen": f"{start} {kind[i % 2]}", "rejected": f"{start} {rude[i // 2 % 2]}"}
            file.write(json.dumps(pair) + "\n")
    return path


def _hardly_taught(folder: Path) -> None:
    """The embedded task's policy after ten steps; its mark says otherwise, so that runs take it."""
    texts = reviews._TEXTS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reviews, "_TEXTS", 10 * reviews._BATCH)
        reviews.warm_start(str(folder))
    mark = folder / reviews._MARK
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"texts": texts}))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    home = tmp_path_factory.mktemp("home")
    shim, client = home / "bin" / "moa", home / "preloaded" / "moa"
    for folder in (shim.parent, client.parent, home / "cache" / "moa"):
        folder.mkdir(parents=True)
    shim.write_text(MOA.format(moa=client))
    shim.chmod(0o755)
    _hardly_taught(home / "cache" / "moa" / "reviews")
    path = os.pathsep.join([str(shim.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    with preloaded_moa(client, Path(sys.executable).with_name("moa")):
        given = {"PATH": path, "OMP_NUM_THREADS": "1", "CACHE": str(home / "cache"), "PRELOADED": str(client)}
        yield {**os.environ, **given, "HH": str(_dialogues(home / "hh.jsonl.gz"))}


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNS)
def test_page_runs(page: str, environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / ".cache").symlink_to(environment["CACHE"])
    for i, block in enumerate(RUNS[page]):
        code = LOOP.sub(r"for \1 in \2 \3; do", block.code)
        command = {
            "bash": ["bash", "-euo", "pipefail", "-c", code],
            "python": [environment["PRELOADED"], "-c", code],
            "yaml": ["moa", "fit", "--config=configs/demo.yaml", f"--config=block-{i}.yaml", "--print_config"],
        }[block.language]
        (tmp_path / f"block-{i}.yaml").write_text(code)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("path", [*PAGES, *TOP], ids=lambda path: path.name)
def test_files_modules_and_links_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    folders = "moa_lightning|callbacks|configs|tests|scripts|bench|docs"
    files = re.findall(rf"(?<![\w/]|\.)((?:{folders})/[\w./-]+\.(?:py|yaml|md|sh|sbatch|png|svg))\b", text)
    files += re.findall(rf"`((?:{folders})/(?:\w+/)*)`", text)
    modules = re.findall(r"python -m ([\w.]+)", text)
    names = re.findall(r"(?<![\w/.])(moa_lightning(?:\.\w+)+)\b(?!/)", text)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    written = [file for file in files if Path(file).stem not in {"mine", "test_mine"}]  # of a combiner that is to come
    assert [file for file in written if not (ROOT / file).exists()] == []
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []
    for name in names:
        pkgutil.resolve_name(name)  # or it raises
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_generated_pages() -> None:
    """Every combiner and command has a page, and each table of a written page has a row for each combiner."""
    from moa_lightning.cli import COMMANDS
    from tests.combiners.inputs import DEFAULTS

    pages = {name: write() for name, write in hooks.generated().items()}
    assert {f"combiners/{name}.md" for name in DEFAULTS} | {f"reference/{name}.md" for name in COMMANDS} <= pages.keys()
    assert "--model.combiner" in pages["reference/fit.md"]
    assert "usage: moa fit [options]\n" in pages["reference/fit.md"]
    for page in ("kl.md", "missing-scores.md"):
        written = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert hooks.with_tables(written) == written, "run: python docs/hooks.py"
        shown = hooks.linked(written)
        assert [name for name in DEFAULTS if f"| [`{name}`](combiners/{name}.md) | " not in shown] == []
    shown = hooks.linked((ROOT / "docs" / "commands.md").read_text(encoding="utf-8"))
    assert [name for name in COMMANDS if f"[`moa {name}`](reference/{name}.md)" not in shown] == []


def test_a_warning_fails_the_build_that_lint_runs() -> None:
    """With ``--quiet`` MkDocs would count no warnings, and build a site with broken links."""
    makefile = (ROOT / "Makefile").read_text()
    lint = makefile.partition("\nlint:")[2].partition("\n\n")[0]
    assert "$(MKDOCS)" in lint
    assert re.search(r"^MKDOCS := .*/mkdocs build 2>&1\) \|\| \{ .*exit 1; \}$", makefile, re.MULTILINE)
    assert re.search(r"^strict: true$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)


def test_the_citation_has_what_the_format_asks_for() -> None:
    import moa_lightning

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert cited["message"]
    assert all(author.keys() <= {"name", "given-names", "family-names", "website"} for author in cited["authors"])
    assert (cited["title"], cited["version"]) == ("moa-lightning", moa_lightning.__version__)
    assert cited["license"] == "Apache-2.0"
