"""The demo: its processes, its table, its picture; and the claim that PAMA raises both objectives on every seed."""

import io
import json
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from moa_lightning.cli import main
from moa_lightning.commands.demo import command, processes, runs
from moa_lightning.commands.demo.processes import Training, train
from moa_lightning.commands.demo.runs import RUNS, Asked, Point, Reached
from moa_lightning.errors import UserError

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
STEPS = 30  # the demo takes 80; the effect is there before

# In the place of `moa fit`: writes the files of a run step by step, as --seed_everything says.
FAKE = r"""
import json, pathlib, signal, sys, time
given = dict(a.lstrip("-").partition("=")[::2] for a in sys.argv[1:])
folder, steps = pathlib.Path(given["trainer.default_root_dir"]), int(given["trainer.max_steps"])
assert given["ckpt_path"] == "last"
def stop(*_):
    (folder / "last.ckpt").write_text("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
if given.get("fail"):
    print("\n".join(f"line {i}" for i in range(40)) + "\nit went wrong"); sys.exit(3)
(folder / "times").write_text(str(time.time()))
for step in range(steps):
    with (folder / "metrics.csv").open("a") as file:
        file.write(("step,loss\n" if not step else "") + f"{step},0.5\n")
    time.sleep(float(given.get("pause", 0.05)))
(folder / "policy").mkdir()
(folder / "policy/config.json").write_text("{}")
(folder / "summary.json").write_text(json.dumps({"steps": steps}))
(folder / "times").write_text((folder / "times").read_text() + f" {time.time()}")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """``moa fit`` is a small script, and the processes are looked at often."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(processes, "_MOA", (sys.executable, "-IS", str(script)))
    monkeypatch.setattr(processes, "_LOOK", 0.01)

    def training(name, *flags, steps=3):
        return Training(
            tmp_path / "runs" / name, f"what {name} is for", (f"--trainer.max_steps={steps}", *flags), steps
        )

    return training


def printed_by(*arguments):
    out = io.StringIO()
    train(*arguments, Console(file=out, width=100))
    return out.getvalue()


def test_no_file_of_the_working_directory_hides_a_library(tmp_path):
    (tmp_path / "traceback.py").write_text("raise SystemExit('the wrong one')")
    shown = subprocess.run([*processes._MOA, "--version"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (shown.stderr, shown.stdout.split()[:1]) == ("", ["moa"])


def test_two_runs_at_a_time_and_a_line_for_each_state(fake):
    trainings = [fake(name) for name in "abc"]
    lines = printed_by(trainings, 2).splitlines()
    for name in "abc":
        states = [line.removeprefix(f"{name} (what {name} is for) ") for line in lines if line.startswith(name)]
        assert re.fullmatch(r"finished in \d+ s", states[-1])
        assert set(states[:-1]) <= {"starts", "trains"}
    first, second, third = ([float(t) for t in (t.folder / "times").read_text().split()] for t in trainings)
    assert max(first[0], second[0]) < min(first[1], second[1]), "the first two do not run at once"
    assert third[0] > min(first[1], second[1]), "three run at once"


def test_finished_runs_are_kept_and_others_begun(fake):
    printed_by([fake("a")], 1)
    times = (fake("a").folder / "times").read_text()
    lines = printed_by([fake("a"), fake("b")], 1).splitlines()
    assert lines[0] == "a (what a is for) kept"
    assert lines[-1].startswith("b (what b is for) finished")
    assert (fake("a").folder / "times").read_text() == times
    assert not runs.is_finished(fake("a").folder, 4), "of fewer steps"
    (fake("a").folder / "policy" / "config.json").unlink()
    assert not runs.is_finished(fake("a").folder, 3), "killed while it wrote"


def test_a_run_that_fails_ends_all_and_shows_its_last_lines(fake):
    slow, failing = fake("slow", "--pause=60"), fake("failing", "--fail=1")
    out = io.StringIO()
    with pytest.raises(UserError, match=r"run failing failed with exit code 3; its log is .*log\.txt"):
        train([slow, failing], 2, Console(file=out, width=100))
    assert "line 39\nit went wrong" in out.getvalue()
    assert "line 20" not in out.getvalue()
    assert slow.process.poll() is not None


@pytest.fixture
def heeded():
    """``SIGHUP`` is not ignored; it would be where the tests run under ``nohup``."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_lets_runs_save_and_leaves_none(fake, number):
    trainings = [fake(name, "--pause=60") for name in "ab"]
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    def interrupt():
        while not all((training.folder / "metrics.csv").is_file() for training in trainings):
            time.sleep(0.01)
        signal.raise_signal(number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        printed_by(trainings, 2)
    thread.join()
    assert [training.process.poll() for training in trainings] == [75, 75]
    assert all((training.folder / "last.ckpt").is_file() for training in trainings)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_an_ignored_signal_stays_ignored(fake):
    """As under ``nohup``."""
    training = fake("a", "--pause=0.2")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def hang_up():
        while not (training.folder / "metrics.csv").is_file():
            time.sleep(0.01)
        signal.raise_signal(signal.SIGHUP)

    thread = threading.Thread(target=hang_up)
    thread.start()
    try:
        assert "a (what a is for) finished" in printed_by([training], 1)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        thread.join()
        signal.signal(signal.SIGHUP, before)


def test_a_demo_is_continued_where_its_settings_are_the_same(tmp_path):
    root = tmp_path / "runs" / "demo"
    assert command.claim(root, 80, 0) == root
    assert command.claim(root, 80, 0) == root
    assert command.claim(root, 40, 0) == command.claim(root, 40, 0) == tmp_path / "runs" / "demo-2"
    assert command.claim(root, 80, 1) == tmp_path / "runs" / "demo-3"
    assert command.claim(root, 80, 0) == root
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert command.claim(tmp_path / "mine", 80, 0) == tmp_path / "mine-2"


@pytest.mark.parametrize("content", [b"", b'{"version": "0.1', b"\xff"])
def test_a_record_that_cannot_be_read_is_of_another_demo(content, tmp_path):
    root = tmp_path / "demo"
    command.claim(root, 80, 0)
    (root / ".demo.json").write_bytes(content)
    assert command.claim(root, 80, 0) == tmp_path / "demo-2"
    assert (root / ".demo.json").read_bytes() == content


def test_a_record_is_written_once_and_whole(tmp_path, monkeypatch):
    root = tmp_path / "demo"
    write = Path.write_text
    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(OSError, match="disk full"):
        command.claim(root, 80, 0)
    monkeypatch.setattr(Path, "write_text", write)
    assert list(root.iterdir()) == []
    ended = subprocess.Popen([sys.executable, "-IS", "-c", ""])
    ended.wait()
    (root / f".{command._RECORD}.{ended.pid}.partial").write_text('{"ver')  # killed while it wrote
    assert command.claim(root, 80, 0) == root
    assert [file.name for file in root.iterdir()] == [command._RECORD]
    monkeypatch.setattr(Path, "write_text", cut_off)
    assert command.claim(root, 80, 0) == root


def cut_off(file, content, **_):
    file.write_bytes(content[:5].encode())
    raise OSError("disk full")


@pytest.mark.parametrize("content", ["", '{"st', "[]", "{}", '{"steps": null}'])
def test_a_run_whose_summary_cannot_be_read_is_not_finished(content, tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").touch()
    (tmp_path / "summary.json").write_text('{"steps": 3}')
    assert runs.is_finished(tmp_path, 3)
    (tmp_path / "summary.json").write_text(content)
    assert not runs.is_finished(tmp_path, 3)


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--steps=3", "--steps must be at least 4, so that each run is evaluated four times; got 3"),
        ("--jobs=0", "--jobs must be at least 1, got 0"),
    ],
)
def test_bad_numbers_are_refused_at_once(flag, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["demo", flag])
    assert capsys.readouterr().err == f"moa: error: {says}\n"
    assert list(tmp_path.iterdir()) == []


def reached():
    start = Point(-0.05, 0.12, 0.04, 0.015)
    ends = [Point(0.5, 0.616, 0.015, 0.015), Point(0.98, 0.005, 0.01, 0.004), Point(0.6, 0.504, 0.02, 0.0099)]
    asked = [Asked("pama"), Asked("linear-0.2", weight=0.2), Asked("lagrangian", threshold=0.5)]
    return [Reached(a, (start, e), v) for a, e, v in zip(asked, ends, ("", "", "open"), strict=True)]


def test_the_report(tmp_path):
    out = io.StringIO()
    command.report(reached(), tmp_path, Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    head = lines.index(next(line for line in lines if "asked for" in line)) - 1
    assert lines[head].split() == ["sentiment", "informative", "to", "the"]
    assert lines[head + 1].split() == ["run", "asked", "for", "±", "s.e.", "±", "s.e.", "front", "met?"]
    rows = [re.split(r"  +", line.strip()) for line in lines[head + 2 :] if " ± " in line]
    assert rows[0] == ["start", "-0.050 ± 0.040", "0.120 ± 0.015", "0.794"]
    assert rows[1] == ["pama", "no weights", "0.500 ± 0.015", "0.616 ± 0.015", "0.074"]
    assert rows[2][:2] == ["linear-0.2", "weights 0.8, 0.2"]
    assert rows[3][1] == "informative >= 0.5"
    assert rows[3][-1] == "open"
    assert f"The picture is {tmp_path}/front.png." in out.getvalue()
    for file in (tmp_path / "front.png", CONFIG.parents[1] / "docs" / "front.png"):
        picture = file.read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert struct.unpack(">I", picture[16:20]) == (700,)
        assert 10_000 < len(picture) < 80_000


def test_runs_ask_for_points_of_the_front():
    """By brute force: weights ask for the point that they value most."""
    for weight in (0.1, 0.2, 0.5, 0.6, 0.7, 1.0):
        valued = {f / 1000: (1 - weight) * (1 - (f / 1000) ** 2) + weight * f / 1000 for f in range(1001)}
        assert Asked("", weight=weight).best == pytest.approx(max(valued, key=valued.__getitem__), abs=1e-3)
    assert Asked("", threshold=0.3).best == 0.3
    assert Asked("").best is None
    assert len({run.name for run in RUNS}) == len(RUNS)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working directory that the warm-started policy is kept in."""
    return tmp_path_factory.mktemp("home")


@pytest.mark.slow
def test_both_objectives_rise_on_three_seeds(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home)
    summaries = []
    for seed in range(3):
        main(["fit", f"--config={CONFIG}", f"--seed_everything={seed}", "--data.val_repeats=2",
              f"--trainer.max_steps={STEPS}", f"--trainer.val_check_interval={STEPS}",
              f"--trainer.default_root_dir={tmp_path}/{seed}", "--trainer.enable_progress_bar=false"])  # fmt: skip
        summaries.append(json.loads((tmp_path / str(seed) / "summary.json").read_text()))
    assert capsys.readouterr().out.count("warm start: teaching") == 1  # kept for the second and third run
    ends = []
    for name in ("sentiment", "informative"):
        for numbers in (summary["objectives"][name] for summary in summaries):
            rise = numbers["end"] - numbers["start"]
            assert rise > 3 * (numbers["std_error"] ** 2 + numbers["start_std_error"] ** 2) ** 0.5, (name, numbers)
        ends.append([summary["objectives"][name]["end"] for summary in summaries])
    assert len({tuple(end) for end in zip(*ends, strict=True)}) == 3, "the seed changes nothing"
    for summary in summaries:
        assert summary["hypervolume"]["end"] > 1.5 * summary["hypervolume"]["start"]


@pytest.mark.slow
def test_the_demo_itself(home, monkeypatch, capsys):
    """With fewer and shorter runs and evaluations, through the same code; the next command that it prints works."""
    monkeypatch.chdir(home)
    config = CONFIG.read_text()
    assert "val_repeats: 8" in config
    (home / "demo.yaml").write_text(config.replace("val_repeats: 8", "val_repeats: 1"))
    monkeypatch.setattr(command, "CONFIG", home / "demo.yaml")
    monkeypatch.setattr(command, "RUNS", (RUNS[0], RUNS[-1]))
    main(["demo", "--steps=4", "--seed=1"])
    said = capsys.readouterr().out
    assert re.search(r"^ *pama +no weights +-?0\.\d{3} ± 0\.\d{3} ", said, re.MULTILINE)
    assert re.search(r"^ *lagrangian .* (met|missed|open) *$", said, re.MULTILINE)
    assert (home / "runs/demo/front.png").is_file()
    assert len((home / "runs/demo/pama/front.csv").read_text().splitlines()) == 1 + 5
    main(["compare", "--runs=runs/demo/*"])
    assert capsys.readouterr().out.count("runs/demo/") == 2
    times = (home / "runs/demo/pama/log.txt").stat().st_mtime_ns
    main(["demo", "--steps=4", "--seed=1"])
    assert "pama (no weights) kept" in capsys.readouterr().out
    assert (home / "runs/demo/pama/log.txt").stat().st_mtime_ns == times
