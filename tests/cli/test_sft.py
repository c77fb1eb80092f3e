"""``moa sft`` as a command; what it computes is tested with the stage."""

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.task import complaint, moa

NEW = (
    "{model_type: llama, vocab_size: 300, config: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, "
    "num_attention_heads: 2, max_position_embeddings: 64}}"
)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    lines = [{"text": f"the film was {word} and the plot was {word}"} for word in ("good", "bad", "long", "dull")] * 8
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sft(texts: Path, output: Path, *more: str) -> list[object]:
    return [
        "sft", "--output", output, "--data.path", texts, "--data.val_size=4", "--fit.max_steps=8", "--fit.batch_size=8",
        "--fit.accelerator=cpu", "--fit.max_length=64", *more,
    ]  # fmt: skip


def test_from_scratch_to_a_folder_that_transformers_opens(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "policy"
    moa(*sft(texts, output, f"--new={NEW}", "--fit.epochs=4"))

    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.hidden_size == 16
    assert model.config.vocab_size == len(tokenizer) <= 300
    prompt = tokenizer("the film was", return_tensors="pt")
    assert tokenizer.decode(prompt.input_ids[0]) == "the film was"
    torch.manual_seed(0)
    assert model.generate(**prompt, max_new_tokens=4).shape[0] == 1
    losses = [line for line in capsys.readouterr().out.splitlines() if line.startswith("held-out loss ")]
    before, after = (float(losses[0].split()[i]) for i in (2, 4))
    assert after < before
    # And from there on, with the same command.
    moa(*sft(texts, tmp_path / "further", f"--base={output}", "--fit.epochs=1"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "further").config.hidden_size == 16


def test_a_used_folder_is_refused_before_training(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        pytest.fail("work was done for a folder that is in use")

    for name in ("load_rows", "train_tokenizer", "build_model", "train"):
        monkeypatch.setattr(f"moa_lightning.stages.supervised.{name}", refuse)
    line = complaint(capsys, *sft(texts, tmp_path, f"--new={NEW}"))
    assert line == f"'{tmp_path}' is not empty; choose another folder, or set --overwrite=true"
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "give either --base (a policy to start from) or --new (one from scratch)"),
        (["--new.model_type=lama"], "new.model_type 'lama' is no architecture of transformers"),
        (["--new={config: {hidden: 3}}"], "new.config: a llama config has no field hidden"),
        (["--new.vocab=9"], "new: NewModel has no field 'vocab'; did you mean 'vocab_size'?; it has model_type, "),
        (["--new={}", "--data.column=txt"], "no column 'txt'; it has text; did you mean 'text'?"),
        (["--fit.epochs=many"], "'fit.epochs' must be int; got 'many'"),
        (["--fit.epoch=3"], "unknown option '--fit.epoch=3'; did you mean '--fit.epochs'?"),
    ],
)
def test_mistakes(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str) -> None:
    assert says in complaint(capsys, *sft(texts, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()
