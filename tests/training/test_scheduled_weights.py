"""Bars of long work: on a terminal, on the main process, nowhere else."""

import contextlib
import io
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from transformers.utils import logging as library

from moa_lightning.utils.console import library_bars, progress
from tests.cli.task import make, moa


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, rank: int = 0, ci: str = "") -> str:
    """What a bar of three rows writes there."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setenv("RANK", str(rank))
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", None)
        patch.setattr("huggingface_hub.utils.enable_progress_bars", lambda: None)  # the tests' environment forbids it
        patch.setenv("CI", ci)
        before = library.is_progress_bar_enabled()
        assert list(progress([1, 2, 3], "labelling", "row")) == [1, 2, 3]
        text = stream.getvalue()
        with library_bars():
            assert library.is_progress_bar_enabled() == bool(text)
        assert library.is_progress_bar_enabled() == before
    return text


def test_a_terminal_shows_what_and_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(monkeypatch, Terminal())
    assert "labelling:   0%" in text
    assert "0/3 [00:00<?, ? row/s]" in text


def test_other_processes_ci_and_files_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, Terminal(), rank=1) == ""
    assert drawn(monkeypatch, Terminal(), ci="true") == ""
    assert drawn(monkeypatch, io.StringIO()) == ""


@pytest.mark.slow
def test_an_export_on_a_terminal_shows_reading_and_writing(tmp_path: Path) -> None:
    task = make(tmp_path)
    moa(
        "fit",
        "--config",
        task.config,
        "--trainer.max_steps=1",
        "--model.policy.lora={r: 2, target_modules: all-linear}",
    )
    primary, secondary = pty.openpty()
    termios.tcsetwinsize(secondary, (24, 100))
    program = "from moa_lightning.cli import main; main()"
    command = [sys.executable, "-c", program, "export", str(task.root), str(tmp_path / "out")]
    environment = {
        name: value for name, value in os.environ.items() if name not in {"CI", "HF_HUB_DISABLE_PROGRESS_BARS"}
    }
    text = b""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=secondary, env=environment) as process:
        os.close(secondary)
        with contextlib.suppress(OSError):  # which is how a terminal ends
            while chunk := os.read(primary, 4096):
                text += chunk
    os.close(primary)
    assert process.returncode == 0, text.decode()
    bars = ("Loading weights", "Unloading and merging model", "Writing model shards")
    assert [bar for bar in bars if bar in text.decode()] == list(bars)
