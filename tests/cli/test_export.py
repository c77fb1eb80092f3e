"""``moa export``: from a run's adapter to a folder for plain transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa_lightning.models import ValueHeads
from tests.cli.task import Task, complaint, make, moa
from tests.helpers import tiny


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A task with a finished LoRA run."""
    task = make(tmp_path_factory.mktemp(request.param))
    if request.param == "llama":
        shutil.rmtree(task.policy)
        tiny.policy_folder(task.policy, tiny.llama_config())
    moa("fit", "--config", task.config, "--model.policy.lora={r: 4, target_modules: all-linear}")
    return task


def logits(model: torch.nn.Module) -> Tensor:
    ids, attention, _ = tiny.padded_batch()
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=ids, attention_mask=attention).logits
    return result


def test_merging_changes_nothing_that_the_policy_says(adapted: Task, tmp_path: Path) -> None:
    assert (adapted.root / "policy" / "adapter_config.json").is_file()
    moa("export", "--run", adapted.root, "--output", tmp_path / "merged")

    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, logits(AutoPeftModelForCausalLM.from_pretrained(adapted.root / "policy")))
    base = logits(AutoModelForCausalLM.from_pretrained(adapted.policy))
    assert not torch.allclose(merged, base, rtol=1e-3, atol=1e-4), "the adapter learnt nothing, so this shows nothing"
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("the film").input_ids == [3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_merged_policy_can_be_evaluated_and_trained_on(adapted: Task, tmp_path: Path) -> None:
    moa("export", "--run", adapted.root, "--output", tmp_path / "merged")
    root = tmp_path / "again"
    moa("fit", "--config", adapted.config, f"--model.policy.path={tmp_path / 'merged'}", "--trainer.max_steps=1",
        f"--trainer.default_root_dir={root}")  # fmt: skip
    assert (root / "policy" / "config.json").is_file()


def test_without_merging_the_adapter_is_copied(adapted: Task, tmp_path: Path) -> None:
    moa("export", adapted.root / "policy", tmp_path / "adapter", "--merge", "false")
    source = adapted.root / "policy" / "adapter_model.safetensors"
    assert (tmp_path / "adapter" / source.name).read_bytes() == source.read_bytes()
    assert not (tmp_path / "adapter" / "value_heads.safetensors").exists()
    exported = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"))
    assert torch.equal(exported, logits(AutoPeftModelForCausalLM.from_pretrained(adapted.root / "policy")))


def test_value_heads_go_along_when_asked(adapted: Task, tmp_path: Path) -> None:
    for merge in ("true", "false"):
        folder = tmp_path / merge
        moa("export", adapted.root, folder, f"--merge={merge}", "--value_heads=true")
        heads = ValueHeads(32, ("short", "good"))
        assert heads.restore(folder)
        assert heads.linear.weight.any()
    # vLLM reads each .safetensors of a folder but those that an index leaves out.
    index = json.loads((tmp_path / "true" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == load_file(tmp_path / "true" / "model.safetensors").keys()
    assert set(index["weight_map"].values()) == {"model.safetensors"}


def test_a_used_folder_is_refused(adapted: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("years of work")
    line = complaint(capsys, "export", "--run", adapted.root, "--output", tmp_path / "used")
    assert line == f"'{tmp_path / 'used'}' is not empty; choose another folder, or set --overwrite=true"
    assert (tmp_path / "used" / "thesis.txt").read_text() == "years of work"

    moa("export", "--run", adapted.root, "--output", tmp_path / "used", "--overwrite=true")
    assert not (tmp_path / "used" / "thesis.txt").exists()
    assert (tmp_path / "used" / "config.json").is_file()


def test_a_failure_leaves_the_old_folder(adapted: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moa("export", "--run", adapted.root, "--output", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    broken = tmp_path / "broken"
    shutil.copytree(adapted.root / "policy", broken)
    (broken / "adapter_model.safetensors").write_bytes(b"\x00")
    line = complaint(capsys, "export", "--run", broken, "--output", tmp_path / "out", "--overwrite=true")
    assert line.startswith(f"policy.path: '{broken}' does not open as a PEFT adapter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "broken"}


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, "export", "--run", tmp_path, "--output", tmp_path / "out")
    assert line == (
        f"'{tmp_path}' holds no policy and no checkpoint; give the folder of a run, or a Hugging Face folder"
    )
    assert not (tmp_path / "out").exists()
    line = complaint(capsys, "export", "--run", tmp_path)
    assert line == "output is missing; give it as --output=..., or in a config file (--config)"
    line = complaint(capsys, "export", "--rum", tmp_path, "--output", tmp_path / "out")
    assert line == "unknown option '--rum'; did you mean '--run'?"
    line = complaint(capsys, "export", tmp_path, tmp_path / "out", tmp_path / "again")
    assert line == f"'{tmp_path / 'again'}' is not expected here; options are written --name=value"
