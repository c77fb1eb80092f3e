"""What lies in an exported folder: what a server expects, the run's settings and numbers, and who may not have it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig

from moa_lightning.commands.export.model_card import Exported, card, vllm_refuses
from moa_lightning.commands.export.policy_folder import merged, shareable
from tests.cli.task import Task, complaint, make, moa
from tests.helpers import tiny
from tests.stages.test_folders import limited

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A finished LoRA run with settings of its own, on a Llama-shaped policy."""
    task = make(tmp_path_factory.mktemp("finished"))
    shutil.rmtree(task.policy)
    tiny.policy_folder(task.policy, tiny.llama_config())
    own = GenerationConfig(eos_token_id=[1, 4], pad_token_id=0, repetition_penalty=1.5, do_sample=True)
    own.save_pretrained(task.policy)
    (task.policy / "README.md").write_text("---\nlicense: mit\nbase_model: some-one/small\n---\n")
    moa("fit", "--config", task.config, "--trainer.max_steps=1", "--model.source.temperature=0.7",
        "--model.source.top_p=0.9", f"--model.policy.chat_template={TEMPLATE}",
        "--model.policy.lora={r: 4, target_modules: all-linear}")  # fmt: skip
    return task


@pytest.fixture(scope="module")
def exported(finished: Task, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """It, merged in several files, and its adapter."""
    folder = tmp_path_factory.mktemp("exported")
    moa("export", finished.root, folder / "model", "--max_shard_size=20KB")
    moa("export", finished.root, folder / "adapter", "--merge=false")
    return {"model": folder / "model", "adapter": folder / "adapter"}


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_a_model_has_what_vllm_reads(exported: dict[str, Path]) -> None:
    """vLLM itself cannot be installed beside this torch; these are its loader's conditions, one by one."""
    folder = exported["model"]
    config = read(folder / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert {"vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"} <= config.keys()
    assert AutoConfig.from_pretrained(folder).model_type == "llama"
    files = {path.name for path in folder.glob("*.safetensors")}
    index = read(folder / "model.safetensors.index.json")["weight_map"]
    assert len(files) > 1
    assert set(index.values()) == files, "a file that the index does not know would be read all the same"
    held = {name: file for file in files for name in load_file(folder / file)}
    assert held == index
    assert not [name for name in held if "lora" in name or "base_layer" in name or "value" in name.split(".")[0]]
    assert not list(folder.glob("*.bin")) + list(folder.glob("*.pt"))
    assert not (folder / "adapter_config.json").exists()
    assert (folder / "tokenizer.json").exists()
    assert (folder / "tokenizer_config.json").exists()
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
    generation = read(folder / "generation_config.json")
    assert generation["eos_token_id"] == [1, 4]
    assert generation["max_new_tokens"] == 6


def test_an_adapter_has_what_vllm_reads(exported: dict[str, Path], finished: Task) -> None:
    folder = exported["adapter"]
    config = read(folder / "adapter_config.json")
    assert vllm_refuses(config) == []
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert Path(config["base_model_name_or_path"]) == finished.policy.absolute()
    weights = load_file(folder / "adapter_model.safetensors")
    assert weights
    assert all(name.startswith("base_model.model.") for name in weights)
    assert {name.rsplit(".", 2)[1] for name in weights} == {"lora_A", "lora_B"}
    assert "--max-lora-rank 8 " in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, "it holds whole layers (modules_to_save)"),
        ({"use_dora": True}, "it is a DoRA adapter"),
        ({"bias": "all"}, "it holds biases"),
        ({"r": 1024}, "its rank is above 512"),
        ({"alpha_pattern": {"q_proj": 2}}, "it has ranks or scales of single layers"),
        ({"peft_type": "IA3"}, "it is no LoRA adapter"),
    ],
)
def test_what_vllm_refuses_is_said(exported: dict[str, Path], change: dict[str, Any], said: str) -> None:
    config = read(exported["adapter"] / "adapter_config.json")
    assert vllm_refuses(config | change) == [said]


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_sampling_is_that_of_the_run(exported: dict[str, Path], kind: str) -> None:
    found = GenerationConfig.from_pretrained(exported[kind])
    assert (found.do_sample, found.temperature, found.top_p, found.top_k, found.max_new_tokens) == (
        True,
        0.7,
        0.9,
        0,
        6,
    )
    assert (found.eos_token_id, found.pad_token_id) == ([1, 4], 0)
    assert found.repetition_penalty == 1.5, "the base model's own"


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_the_card_tells_what_it_is(exported: dict[str, Path], finished: Task, kind: str) -> None:
    loaded = ModelCard.load(exported[kind] / "README.md")
    header = loaded.data.to_dict()
    assert header["library_name"] == {"model": "transformers", "adapter": "peft"}[kind]
    assert header["base_model"] == "some-one/small"
    assert header["license"] == "mit"
    assert {"moa-lightning", "pama"} <= set(header["tags"])
    text, summary, facts = loaded.text, read(finished.root / "summary.json"), read(exported[kind] / "moa.json")
    for name, numbers in summary["objectives"].items():
        cells = " | ".join(f"{numbers[key]:.4g}" for key in ("start", "end", "std_error"))
        assert f"| {name} | FunctionReward(function=tests.cli.task." in text
        assert f" | 1.0 | {cells} |" in text
    assert f"Hypervolume {summary['hypervolume']['start']:.4g} -> {summary['hypervolume']['end']:.4g}" in text
    for line in ("- combiner: PAMA(granularity=token, noon=True)", "- KL: RewardKL(init_kl_coef=0.2", "- steps: 1",
                 "- reference: the base model (adapter off)", "- seed: 7", "- adapter: LoRA(r=4"):  # fmt: skip
        assert line in text, line
    assert [f for f in ("front.png", "config.yaml", "moa.json") if (exported[kind] / f).exists()] == [
        "front.png", "config.yaml", "moa.json"]  # fmt: skip
    assert facts["objectives"] == summary["objectives"]
    assert (facts["steps"], facts["combiner"], facts["format"]) == (1, "PAMA", kind)
    settings = yaml.safe_load((exported[kind] / "config.yaml").read_text())
    assert settings == shareable(yaml.safe_load((finished.root / "config.yaml").read_text()))
    assert settings["model"]["policy"]["lora"]["r"] == 4
    assert (settings["model"]["policy"]["path"], settings["data"]["init_args"]["path"]) == ("tiny", "prompts.jsonl")


def test_another_precision(finished: Task, tmp_path: Path) -> None:
    for merge in ("true", "false"):
        moa("export", finished.root, tmp_path / merge, f"--merge={merge}", "--dtype=bfloat16")
    assert read(tmp_path / "true" / "config.json")["dtype"] == "bfloat16"
    for file in tmp_path.glob("*/*.safetensors"):
        assert {value.dtype for value in load_file(file).values()} == {torch.bfloat16}


def test_a_stopped_run_is_exported_from_its_newest_checkpoint(
    finished: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "stopped"
    shutil.copytree(finished.root, run, ignore=shutil.ignore_patterns("policy"))
    newest = run / "checkpoints" / "step-1.ckpt"
    (run / "checkpoints" / "last.ckpt").unlink()
    moa("export", run, tmp_path / "out")
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{run} holds no policy/: the run did not end. This is its newest checkpoint, step-1.ckpt"
    assert read(tmp_path / "out" / "moa.json")["objectives"] == read(finished.root / "summary.json")["objectives"]

    newest.write_bytes(newest.read_bytes()[:5000])
    with pytest.warns(UserWarning, match="step-1.ckpt is left out: it is truncated"):
        line = complaint(capsys, "export", run, tmp_path / "none")
    assert line == f"there is no whole checkpoint in '{run / 'checkpoints'}'"
    line = complaint(capsys, "export", run, tmp_path / "none", f"--checkpoint={newest}")
    assert line.startswith(f"checkpoint {newest} cannot be used: it is truncated")
    line = complaint(capsys, "export", run, tmp_path / "none", "--checkpoint=step-9.ckpt")
    assert line == f"checkpoint 'step-9.ckpt' does not exist; in '{run / 'checkpoints'}' there is step-1.ckpt"
    assert {path.name for path in tmp_path.iterdir()} == {"stopped", "out"}


def test_numbers_of_a_later_step_are_not_those_of_the_policy(
    finished: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that went on and was killed: its summary is of a later step than its policy."""
    run = tmp_path / "run"
    shutil.copytree(finished.root, run)
    (run / "summary.json").write_text(json.dumps(read(run / "summary.json") | {"steps": 9}))
    moa("export", run, tmp_path / "out", "--merge=false")
    assert f"{run / 'policy'} is of step 1; --checkpoint=last takes a later one" in capsys.readouterr().out
    assert read(tmp_path / "out" / "moa.json")["steps"] == 1
    text = (tmp_path / "out" / "README.md").read_text()
    assert "There is no evaluation of this step." in text
    assert "- steps: 1" in text

    (run / "summary.json").unlink()  # a run without evaluations
    moa("export", run, tmp_path / "silent", "--merge=false")
    assert "takes a later one" not in capsys.readouterr().out
    assert "There is no evaluation of this step." in (tmp_path / "silent" / "README.md").read_text()


def test_a_base_that_has_moved(finished: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, base = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(finished.root, run)
    shutil.copytree(finished.policy, base)
    gone = tmp_path / "gone"
    for file in (run / "config.yaml", run / "policy" / "adapter_config.json"):
        file.write_text(file.read_text().replace(str(finished.policy), str(gone)))
    for checkpoint in ([], ["--checkpoint=last"]):
        line = complaint(capsys, "export", run, tmp_path / "out", *checkpoint)
        assert f"folder '{gone}' does not exist" in line
        assert "give it with --base=PATH" in line
        moa("export", run, tmp_path / f"out-{len(checkpoint)}", f"--base={base}", *checkpoint)
    moa("export", run, tmp_path / "adapter", "--merge=false", f"--base={base}")
    assert read(tmp_path / "adapter" / "adapter_config.json")["base_model_name_or_path"] == str(base)
    found = [load_file(tmp_path / f"out-{i}" / "model.safetensors") for i in (0, 1)]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [tiny.gpt2_config(), tiny.llama_config(tie_word_embeddings=True)])
def test_an_adapter_on_a_tied_embedding_is_not_merged(config: PretrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="merged, it would change both; export it with --merge=false"):
        merged(adapted)


def test_a_checkpoint_of_another_policy(finished: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tiny.policy_folder(tmp_path / "other", tiny.llama_config(hidden_size=64))
    line = complaint(capsys, "export", finished.root, tmp_path / "out", "--checkpoint=last", f"--base={other}")
    assert line.startswith(
        f"the checkpoint is not of the policy that '{finished.root / 'config.yaml'}' describes: weight '"
    )
    assert f"has another shape than in '{other}'" in line
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room(
    finished: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with limited(10_000):
        line = complaint(capsys, "export", finished.root, tmp_path / "out")
    assert line == f"'{tmp_path / 'out'}' cannot be written: {os.strerror(27)}; partial output was removed"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    line = complaint(capsys, "export", finished.root, tmp_path / "out")
    assert "and its disk has 0.00 GB left; choose another folder" in line
    assert list(tmp_path.iterdir()) == []


def test_a_size_without_meaning(finished: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, "export", finished.root, tmp_path / "out", "--max_shard_size=huge")
    assert line == "max_shard_size must be a number with KB, MB, GB or TB, such as 5GB; got 'huge'"


def test_the_card_takes_no_html_and_no_columns() -> None:
    bad = "<script>|\n# x"
    settings = {"model": {"objectives": {bad: {"reward": {"class_path": "a.Words", "init_args": {"words": [bad]}}}}}}
    facts = {"objectives": {bad: {"start": 0.0, "end": 1.0, "std_error": 0.1}}, "combiner": "PAMA", "seed": bad}
    text = card(Exported('a"`b', None, None, "float32", facts, settings, False))
    assert "<script>" not in text
    assert "\n# x" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| &lt;script")]
    assert row.replace("\\|", "").count("|") == 7, "a row of six cells"
    assert 'from_pretrained("a\\"`b")' in text
    assert "vllm serve 'a\"`b'" in text


def test_the_card_imports_no_class_of_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "somebodys_rewards.py").write_text("raise SystemExit('this ran')")
    reward = {"class_path": "somebodys_rewards.Reward", "init_args": {"size": 3}}
    settings = {"model": {"objectives": {"good": {"reward": reward}}}}
    assert "| Reward(size=3) |" in card(Exported("a", None, None, "float32", {}, settings, False))
