"""Every command block of the README runs as it stands, in the order of the text.

The blocks of one section share a working folder that holds ``configs/``, as a clone does. To keep the runs short, the
``moa`` that they find ends each training after two steps and evaluates one batch, and a loop takes its first and last
value; nothing else is changed. It is a fork of a process that has imported everything (``tests/helpers/preloaded.py``).
"""

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.preloaded import preloaded_moa

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = "<!-- not run by the tests: "
BLOCK = re.compile(r"^(?P<above>[^\n]*)\n```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LOOP = re.compile(r"for (\w+) in (\S+) .* (\S+); do")
MOA = """#!/usr/bin/env bash
extra=()
case "$1" in
    fit) extra=(--trainer.max_steps=2 --trainer.limit_val_batches=1) ;;
    sft | reward) extra=(--fit.max_steps=2) ;;
esac
exec "{moa}" "$@" "${{extra[@]}}"
"""


@dataclass(frozen=True)
class Section:
    """One ``##`` section with the blocks that run."""

    title: str
    blocks: tuple[tuple[str, str], ...]  # (language, code)


def _sections() -> list[Section]:
    parts = re.split(r"^## ", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    sections = []
    for part in parts[1:]:
        found = [(b["language"], b["code"]) for b in BLOCK.finditer(part) if not b["above"].startswith(LEFT_OUT)]
        if blocks := tuple(block for block in found if block[0] in {"bash", "python"}):
            sections.append(Section(part.partition("\n")[0], blocks))
    return sections


SECTIONS = _sections()


def test_only_the_way_into_the_tests_the_cluster_and_the_image_are_left_out() -> None:
    blocks = list(BLOCK.finditer((ROOT / "README.md").read_text()))
    left_out = [b["code"] for b in blocks if b["above"].startswith(LEFT_OUT)]
    commands = [re.findall(r"^\S+ \S+", code, re.MULTILINE) for code in left_out]
    cluster = ["NNODES=2 MASTER_ADDR=node0", "sbatch --nodes=2"]
    assert commands == [["make demo", "make test"], cluster, ["docker build", "docker run"]]
    assert {b["language"] for b in blocks} <= {"bash", "python", "yaml", "json"}, "a block without a language"
    runnable = [b for b in blocks if b["language"] in {"bash", "python"}]
    assert sum(len(section.blocks) for section in SECTIONS) == len(runnable) - len(left_out)


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


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    home = tmp_path_factory.mktemp("home")
    shim, client = home / "bin" / "moa", home / "preloaded" / "moa"
    for folder in (shim.parent, client.parent, home / "policies"):
        folder.mkdir()
    shim.write_text(MOA.format(moa=client))
    shim.chmod(0o755)
    path = os.pathsep.join([str(shim.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    with preloaded_moa(client, Path(sys.executable).with_name("moa")):
        given = {"PATH": path, "OMP_NUM_THREADS": "1", "POLICIES": str(home / "policies")}
        yield {**os.environ, **given, "HH": str(_dialogues(home / "hh.jsonl.gz"))}


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS, ids=[section.title for section in SECTIONS])
def test_section_runs(section: Section, environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / ".cache").symlink_to(environment["POLICIES"])  # the embedded task's is built once
    for language, text in section.blocks:
        code = LOOP.sub(r"for \1 in \2 \3; do", text)
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
