"""Checkpoints that run code when they are unpickled: one line from every command, and nothing of them is run."""

import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from moa_lightning.commands.export.run_folder import read_checkpoint
from moa_lightning.distributed.shards import load_optimizer_shards, stored_shapes
from moa_lightning.training.checkpoints import problem
from tests.cli.conftest import _process_as_before, task  # noqa: F401  # fixtures
from tests.cli.task import Task, complaint

COMMANDS = ("fit", "validate", "test", "predict")


class Payload:
    """What unpickles as a call that makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def written(folder: Path, content: dict[str, Any]) -> Path:
    """A sharded checkpoint of one process, as FSDP2Strategy writes it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(content, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 9, "moa": {"combiner": "PAMA", "objectives": []}}, folder / "meta.pt")
    return folder


def poisoned(kind: str, path: Path, marker: Path) -> Path:
    """A checkpoint with a payload: in a file, in the index of a folder, or in what lies beside the shards."""
    if kind == "file":
        torch.save({"global_step": 9, "state_dict": {}, "extra": Payload(marker)}, path)
        return path
    written(path, {"state_dict": {"policy.weight": torch.zeros(3)}})
    if kind == "index":
        (path / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    else:
        torch.save({"global_step": 9, "extra": Payload(marker)}, path / "meta.pt")
    return path


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that a payload would make: unpickling one without care does so, or these tests prove nothing."""
    marker = tmp_path / "the-payload-ran"
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()
    marker.unlink()
    return marker


@pytest.mark.usefixtures("no_weights_are_read")
@pytest.mark.parametrize("kind", ["file", "index", "meta"])
def test_no_command_runs_a_payload(
    kind: str,
    task: Task,  # noqa: F811
    marker: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = task.root / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(task.config, task.root / "config.yaml")
    path = poisoned(kind, folder / "step-9.ckpt", marker)
    why = "cannot be used: it could run code, so it was not opened: "
    for command in COMMANDS:
        line = complaint(capsys, command, "--config", task.config, f"--ckpt_path={path}")
        assert line.startswith(f"checkpoint {path} {why}"), line
        with pytest.warns(UserWarning, match=r"step-9.ckpt is left out: it could run code"):
            line = complaint(capsys, command, "--config", task.config, "--ckpt_path=last")
        assert line.startswith(f"ckpt_path: 'last' finds no valid checkpoint in {folder}"), line
    line = complaint(capsys, "export", task.root, task.folder / "out", f"--checkpoint={path}")
    assert why in line
    with pytest.warns(UserWarning, match=r"step-9.ckpt is left out: it could run code"):
        complaint(capsys, "export", task.root, task.folder / "out")
    assert not marker.exists()


@pytest.fixture
def no_weights_are_read(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A refusal comes before any weights."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("moa_lightning.training.strategies.load_model", refuse)


def test_a_payload_among_an_optimizers_numbers(tmp_path: Path, marker: Path) -> None:
    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.5)
    state = get_optimizer_state_dict(module, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        load_optimizer_shards(written(tmp_path / "good.ckpt", {"optimizer_0": state}), module, optimizer, "optimizer_0")
        assert optimizer.param_groups[0]["lr"] == 0.5
        state["param_groups"][0]["lr"] = Payload(marker)
        path = written(tmp_path / "a.ckpt", {"optimizer_0": state})
        with pytest.raises(ValueError, match=r"a.ckpt cannot be used: 'optimizer_0.*lr' is more than plain data"):
            load_optimizer_shards(path, module, optimizer, "optimizer_0")
    assert not marker.exists()


def test_a_payload_in_place_of_a_weight(tmp_path: Path, marker: Path) -> None:
    path = written(tmp_path / "a.ckpt", {"state_dict": {"policy.weight": torch.zeros(3)}})
    piece = next(path.glob("*.distcp"))
    index = pickle.loads((path / ".metadata").read_bytes())
    torch.save(Payload(marker), piece)
    for stored in index.storage_data.values():
        stored.length = piece.stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(index))
    assert problem(path) == "it could run code, so it was not opened: 'state_dict.policy.weight' is more than a tensor"
    with pytest.raises(ValueError, match=r"a.ckpt cannot be used: Weights only load failed"):
        read_checkpoint(path)
    assert not marker.exists()


def test_what_belongs_there_is_read(tmp_path: Path) -> None:
    content = {
        "state_dict": {
            "policy.a": torch.ones(2, 3, dtype=torch.bfloat16),
            "policy.b": torch.arange(4),
            "policy.c": torch.tensor(1.5, dtype=torch.float64),
        },
        "optimizer_0": {"lr": 0.5, "betas": (0.9, 0.99), "name": "x"},
    }
    path = written(tmp_path / "a.ckpt", content)
    assert problem(path) is None
    assert stored_shapes(path, "state_dict") == {k: v.shape for k, v in content["state_dict"].items()}
    found = read_checkpoint(path).weights
    torch.testing.assert_close(found, {k.removeprefix("policy."): v for k, v in content["state_dict"].items()})
