"""The launch scripts: their syntax, what they start, and what they make of the exit codes; what each process prints."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from moa_lightning import cli
from moa_lightning.utils import console

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "scripts").iterdir())
STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
[[ $(basename "$0") != srun ]] || { touch "$CALLS.started"; sleep "${SECONDS_OF_SRUN:-0}"; exit "$CODE"; }
"""


def stubbed(folder: Path, names: list[str], stub: str = STUB, **more: str) -> dict[str, str]:
    """An environment in which these commands only say that they were called."""
    for name in names:
        (folder / name).write_text(stub)
        (folder / name).chmod(0o755)
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "NCCL", "MOA")) and k != "LOGS"}
    return plain | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "CALLS": str(folder / "calls")} | more


def slurm(folder: Path, **more: str) -> dict[str, str]:
    job = {"SLURM_JOB_ID": "41", "SLURM_NTASKS_PER_NODE": "8", "SLURM_NNODES": "4", **more}
    return stubbed(folder, ["srun", "scontrol"], **job)


def test_scripts_are_bash() -> None:
    assert {script.name for script in SCRIPTS} == {"torchrun.sh", "slurm.sbatch"}
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (75, True), (137, False)])
def test_slurm_goes_back_into_the_queue_on_75_alone(code: int, requeued: bool, tmp_path: Path) -> None:
    environment = slurm(tmp_path, CODE=str(code))
    done = subprocess.run(["bash", ROOT / "scripts/slurm.sbatch", "--config", "a b.yaml"], env=environment, check=False)
    assert done.returncode == code
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == (
        "srun --wait=300 --kill-on-bad-exit=0 moa fit --config a b.yaml --ckpt_path=last --trainer.devices=8 "
        "--trainer.num_nodes=4"
    )
    assert calls[1:] == ["scontrol requeue 41"] * requeued


def test_slurm_script_outlives_a_signal_that_reaches_it_too(tmp_path: Path) -> None:
    environment = slurm(tmp_path, CODE="75", SECONDS_OF_SRUN="1", LOGS=str(tmp_path / "logs"))
    job = subprocess.Popen(["bash", ROOT / "scripts/slurm.sbatch"], env=environment)
    while not (tmp_path / "calls.started").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait() == 75
    calls = (tmp_path / "calls").read_text().splitlines()
    assert f"--output={tmp_path}/logs/%j-%t.log moa fit" in calls[0]
    assert calls[1:] == ["scontrol requeue 41"]


def test_torchrun_meets_at_the_first_node(tmp_path: Path) -> None:
    run = [ROOT / "scripts/torchrun.sh", "fit", "--config", "a b.yaml"]
    environment = stubbed(tmp_path, ["torchrun"], PROCESSES="8")
    subprocess.run(run, env=environment, check=True)
    more = {"NNODES": "2", "MASTER_ADDR": "node0", "MAX_RESTARTS": "3", "LOGS": "logs"}
    subprocess.run(run, env=environment | more, check=True)
    alone, several = (tmp_path / "calls").read_text().splitlines()
    assert alone == (
        "torchrun --nnodes=1 --nproc-per-node=8 --standalone --max-restarts=0 --shutdown-timeout=300 --no-python moa "
        "fit --config a b.yaml --trainer.devices=8 --trainer.num_nodes=1"
    )
    assert (
        "--rdzv-endpoint=node0:29400 --rdzv-id=moa --log-dir=logs --redirects=3 --tee=0:3 --max-restarts=3" in several
    )
    unnamed = subprocess.run(run, env=environment | {"NNODES": "2"}, capture_output=True, text=True, check=False)
    assert unnamed.returncode != 0
    assert "MASTER_ADDR is the name or address of the first" in unnamed.stderr


def test_torchrun_without_a_gpu_asks_for_the_number_of_processes(tmp_path: Path) -> None:
    environment = stubbed(tmp_path, ["nvidia-smi"], "#!/usr/bin/env bash\nexit 9\n")
    done = subprocess.run([ROOT / "scripts/torchrun.sh"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "PROCESSES=2" in done.stderr


def test_rank_is_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_PROCID", "LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert console.launched_as() == 0
    for name, rank in {"SLURM_PROCID": 3, "LOCAL_RANK": 2, "RANK": 5}.items():
        monkeypatch.setenv(name, str(rank))
        assert console.launched_as() == rank


@pytest.mark.parametrize(
    ("rank", "shared", "everyone", "printed"),
    [
        ("0", True, "", "moa: error: no data\n"),
        ("1", True, "", ""),
        ("1", True, "1", "moa: error: no data\n"),
        ("0", False, "", "moa: error: no data\n"),
        ("1", False, "", "moa: error: rank 1: no data\n"),
    ],
)
def test_a_refusal_that_all_share_is_printed_once(
    rank: str,
    shared: bool,
    everyone: str,
    printed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("MOA_ALL_RANKS", everyone)
    monkeypatch.setattr(cli, "_SECONDS_TO_BE_SECOND", 0)
    with pytest.raises(SystemExit) as stop:
        cli._fail("no data", shared=shared)
    assert stop.value.code == 2
    assert capsys.readouterr().err == printed
