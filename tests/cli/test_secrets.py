"""Tokens and passwords: in no file that a run or an export leaves."""

from pathlib import Path

import pytest
import yaml

from moa_lightning.utils.masking import MASK, masked, masked_arguments, masked_settings
from tests.cli.task import Task, complaint, moa

TOKEN = "hf_" + "aB3" * 8
PLAIN = "correct-horse-battery"  # no shape tells that it is one


def leaks(folder: Path) -> list[str]:
    """Files that hold one of the secrets."""
    return [str(file) for file in folder.rglob("*") if file.is_file() and PLAIN.encode() in file.read_bytes()]


def test_no_record_holds_a_secret(task: Task, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    flag = f"--model.policy.options.token={PLAIN}"
    arguments = ["fit", "--config", str(task.config), "--trainer.max_steps=1", "--wandb=offline", flag]
    monkeypatch.setattr("sys.argv", ["moa", *arguments])  # which wandb records
    moa(*arguments)
    record = task.root / "config.yaml"
    assert yaml.safe_load(record.read_text())["model"]["policy"]["options"] == {"token": MASK}
    moa("export", task.root, task.folder / "out")
    text = "".join(p.read_text() for p in (task.folder / "out").iterdir() if p.suffix in {".yaml", ".json", ".md"})
    assert str(task.folder) not in text
    assert yaml.safe_load((task.folder / "out" / "config.yaml").read_text())["model"]["policy"] | {"path": ""} == (
        yaml.safe_load(record.read_text())["model"]["policy"] | {"path": "", "options": {}}
    )
    assert leaks(task.folder) == []

    line = complaint(capsys, "fit", "--config", record)
    name = "model.policy.options.token"
    assert line == f"{name} is masked in this record of a run; give it as --{name}=..."
    moa("fit", "--config", record, "--wandb=off", flag)
    assert leaks(task.folder) == []


@pytest.mark.parametrize(
    "name", ["token", "hf_token", "HF_TOKEN", "use_auth_token", "api_key", "apiKey", "OPENAI_API_KEY", "client_secret",
             "secret_access_key", "db_password", "Authorization"],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert masked({"a": [{name: "x"}]}) == {"a": [{name: MASK}]}


@pytest.mark.parametrize("name", ["eos_token", "pad_token", "tokenizer", "key", "prompt_key", "keyword", "granularity"])
def test_names_of_no_secrets(name: str) -> None:
    assert masked({name: "token"}) == {name: "token"}


def test_numbers_of_an_objective_called_token() -> None:
    settings = {"weights": {"token": 0.5, "max_new_tokens": 8}, "token": True, "use": {"token": None}}
    assert masked(settings) == settings


@pytest.mark.parametrize(
    "text",
    [
        TOKEN,
        "sk-proj-abcdefghijklmnop",
        "ghp_abcdefghijklmnopqrst0123",
        "AKIAABCDEFGHIJKLMNOP",
        "eyJhbGciOiJI.eyJzdWIiOiIx.abc",
    ],
)
def test_shapes_of_secrets(text: str) -> None:
    assert masked({"prompt": f"see {text}."}) == {"prompt": f"see {MASK}."}


def test_secrets_in_addresses_and_headers() -> None:
    assert masked("https://me:secret@host.example/x?y=1") == f"https://{MASK}@host.example/x?y=1"
    assert masked("Authorization: Bearer abcdefgh123") == f"Authorization: Bearer {MASK}"


def test_what_is_masked_is_found_again() -> None:
    assert masked_settings({"a": [{"token": MASK}, {"b": f"https://{MASK}@x"}], "c": "d"}) == ["a.0.token", "a.1.b"]
    assert masked_arguments(["--a.token", "x", "--lr=1"]) == ["--a.token", MASK, "--lr=1"]
