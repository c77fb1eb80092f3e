"""What is exported answers as the policy in the run did, to the bit, where this package is not installed."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import save

from moa_lightning.commands.fit.cli import AlignmentCLI
from tests.cli.task import Task, make, moa
from tests.helpers import tiny

SHAPES = {
    "gpt2-tied": tiny.gpt2_config(),
    "gpt2-untied": tiny.gpt2_config(tie_word_embeddings=False),
    "llama-tied": tiny.llama_config(tie_word_embeddings=True),
    "llama-untied": tiny.llama_config(),
}
LORA = "--model.policy.lora={r: 4, target_modules: all-linear}"

ELSEWHERE = """
import json, pathlib, sys
import torch

sys.modules["moa_lightning"] = None  # importing it is an error
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

folders, inputs, out = json.loads(sys.argv[1])
found, batch = {}, torch.load(inputs)
for name, folder in folders.items():
    adapter = (pathlib.Path(folder) / "adapter_config.json").exists()
    loader = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    model = loader.from_pretrained(folder).eval()
    with torch.no_grad():
        found[name] = model(**batch).logits
    assert AutoTokenizer.from_pretrained(folder)("the film").input_ids == [3, 4]
    assert GenerationConfig.from_pretrained(folder).max_new_tokens == 6
torch.save(found, out)
"""


def batch() -> dict[str, Tensor]:
    ids, attention, _ = tiny.padded_batch()
    return {"input_ids": ids, "attention_mask": attention}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(**batch()).logits
    return result


def fit(task: Task, *flags: object) -> Any:
    """A run of one step; the policy that it ended with."""
    cli = AlignmentCLI.run_command(
        ["fit", "--config", str(task.config), "--trainer.max_steps=1", "--data.seed=0", *map(str, flags)]
    )
    return cli.model.policy.backbone


def sharded(file: Path, folder: Path) -> Path:
    """A checkpoint in the layout that a strategy with save_distributed_checkpoint writes."""
    whole = torch.load(file, weights_only=True)
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        save({"state_dict": whole.pop("state_dict")}, checkpoint_id=folder, no_dist=True)
    torch.save(whole, folder / "meta.pt")
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits in the runs, and those of what was exported from them, by what it is."""
    root = tmp_path_factory.mktemp("logits")
    torch.save(batch(), root / "batch.pt")
    expected: dict[str, Tensor] = {}
    folders: dict[str, str] = {}

    def exported(name: str, logits: Tensor, *arguments: object) -> None:
        expected[name], folders[name] = logits, str(root / name)
        moa("export", *arguments[:1], root / name, *arguments[1:])

    for shape, config in SHAPES.items():
        (root / shape).mkdir()
        task = make(root / shape)
        shutil.rmtree(task.policy)
        tiny.policy_folder(task.policy, config)
        own = logits(fit(task))
        exported(f"{shape} full", own, task.root, "--max_shard_size=20KB", "--value_heads=true")
        shutil.move(task.root / "policy", root / shape / "aside")
        exported(f"{shape} full from a checkpoint", own, task.root)

        adapted = fit(task, LORA, f"--trainer.default_root_dir={root / shape / 'lora'}")
        run, own = root / shape / "lora", logits(adapted)
        merged = logits(copy.deepcopy(adapted).merge_and_unload())
        assert not torch.equal(merged, own), "merging rounds; if it does not, this shows nothing"
        torch.testing.assert_close(merged, own, rtol=1e-4, atol=1e-5)
        exported(f"{shape} adapter", own, run, "--merge=false")
        exported(f"{shape} merged", merged, run)
        pieces = sharded(run / "checkpoints" / "last.ckpt", run / "checkpoints" / "pieces.ckpt")
        tied = shape.endswith("-tied")
        exported(f"{shape} from pieces", own if tied else merged, run, f"--checkpoint={pieces}", f"--merge={not tied}")

    arguments = json.dumps([folders, str(root / "batch.pt"), str(root / "found.pt")])
    subprocess.run([sys.executable, "-c", ELSEWHERE, arguments], cwd=root, check=True)
    return expected, torch.load(root / "found.pt")


@pytest.mark.slow
def test_the_same_logits_to_the_bit(found: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    expected, loaded = found
    assert len(loaded) == 5 * len(SHAPES)
    assert not [name for name, logits in expected.items() if not torch.equal(loaded[name], logits)]
    for shape in SHAPES:  # two runs that learnt different things
        assert not torch.allclose(expected[f"{shape} full"], expected[f"{shape} adapter"], rtol=1e-3, atol=1e-4)
