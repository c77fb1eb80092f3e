"""Checkpoints of two processes: folders with each process's pieces, and what happens when one cannot write."""

import pytest
import torch

from moa_lightning.combiners import MOPO, PAMA, Linear
from moa_lightning.distributed.shards import stored_shapes
from moa_lightning.training.checkpoints import AtomicCheckpointIO, newest_valid, problem
from tests.helpers import pairs, processes, tiny
from tests.training.test_checkpoints import cut_off, written

pytestmark = pytest.mark.filterwarnings(
    "ignore:objective 'kind' did not score", "ignore:objective 'good' did not score", "ignore:MOPO's labels"
)

PASSES = {"combiner": PAMA, "passes": 2, "scripted": False}
LAGGED = {"combiner": MOPO, "offline": True, "lagged": True}
DROPOUT = {"combiner": PAMA, "lora": True, "dropout": 0.3, "scripted": False}
KINDS = {"passes": PASSES, "lagged": LAGGED, "lora": DROPOUT}
FULL = {"limit": {1: 2000}, "refused": True, "steps": 1}


@pytest.mark.slow
def test_a_folder_with_pieces_is_whole_or_not_there_and_resumes_to_the_bit(tmp_path):
    tiny.policy_folder(tmp_path / "policy", scale=1.0)
    pairs.write(tmp_path / "data.jsonl")
    cells = []
    for kind, case in KINDS.items():
        cells += [
            ("fsdp2", f"straight-{kind}", case | {"steps": 4}),
            ("fsdp2-pieces", f"half-{kind}", case | {"steps": 2, "save": f"{kind}.ckpt"}),
            ("fsdp2-pieces", f"whole-{kind}", case | {"steps": 4, "resume": f"{kind}.ckpt"}),
        ]
    cells += [
        ("fsdp2-pieces", "again", DROPOUT | {"steps": 2, "save": "lora.ckpt"}),  # over the one that is there
        ("fsdp2-pieces", "full-disk", DROPOUT | FULL | {"save": "lora.ckpt"}),  # of one process
        ("fsdp2", "full-disk", DROPOUT | FULL | {"save": "one.ckpt", "limit": {0: 2000}}),
        ("fsdp2-pieces", "other", {"combiner": Linear, "resume": "lora.ckpt", "refused": True}),
        ("fsdp2-pieces", "rank", DROPOUT | {"r": 3, "resume": "lora.ckpt", "refused": True}),
        ("fsdp2-pieces", "combiner", DROPOUT | {"combiner": Linear, "resume": "lora.ckpt", "refused": True}),
    ]
    former = written(tmp_path / "fsdp2-one.ckpt" / "meta.pt", 1)  # a folder, in the place of the one file to be
    found = processes.both(cells, tmp_path)
    for kind in KINDS:
        straight = found["fsdp2", f"straight-{kind}"]
        half, whole = (found["fsdp2-pieces", f"{part}-{kind}"] for part in ("half", "whole"))
        assert half["losses"] + whole["losses"] == straight["losses"], kind
        torch.testing.assert_close(whole["weights"], straight["weights"], rtol=0, atol=0, msg=kind)
        torch.testing.assert_close(whole["state"], straight["state"], rtol=0, atol=0, equal_nan=True)

    folder = tmp_path / "fsdp2-pieces-lora.ckpt"
    names = stored_shapes(folder, "state_dict")
    assert names.keys() == {name for name in names if "lora_" in name or "value_heads" in name}
    assert any("value_heads" in name for name in names)

    refused = {name: result["refused"] for (_, name), result in found.items() if "refused" in result}
    says = f"checkpoint {folder} could not be written: "
    assert found["fsdp2-pieces", "full-disk"]["refused"].startswith(says)
    assert "could not be written: File too large; it takes" in found["fsdp2", "full-disk"]["refused"]
    assert "weights missing" in refused["other"]
    assert "have another shape" in refused["rank"]
    assert "(3, 32) here" in refused["rank"]
    assert "was trained with PAMA, this run uses Linear" in refused["combiner"]
    # Nothing half is left, and what was there before is whole.
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert former.is_file()
    assert problem(folder) is None
    assert torch.load(folder / "meta.pt", weights_only=True)["global_step"] == 2

    newest = tmp_path / "fsdp2-pieces-passes.ckpt"
    with pytest.raises(ValueError, match=r"lora.ckpt is sharded, .* use strategy FSDP2Strategy"):
        AtomicCheckpointIO().load_checkpoint(folder)
    piece = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    cut_off(piece)
    assert problem(folder).startswith("it is truncated")
    (newest / ".metadata").unlink()
    (tmp_path / "fsdp2-pieces-lagged.ckpt" / "meta.pt").unlink()
    with pytest.warns(UserWarning, match="left out"):
        assert newest_valid(tmp_path) is None
