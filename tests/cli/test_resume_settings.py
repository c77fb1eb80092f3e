"""Each setting that differs for a resumed run is taken, kept or refused, and reported; the table says which."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moa_lightning.commands.fit.cli import AlignmentCLI
from moa_lightning.commands.fit.resume_settings import RULES, Verdict, changes, rule_of, table
from moa_lightning.training.agreement import flat
from moa_lightning.training.checkpoints import by_steps, settings_in
from tests.cli.task import Task, complaint, moa

ROOT = Path(__file__).parents[2]


class Stop(Exception):
    """Nothing more is needed."""


class Settings(AlignmentCLI):
    """Parses, and goes no further."""

    found: dict[str, Any] = {}  # noqa: RUF012

    def before_instantiate_classes(self) -> None:
        Settings.found = self._resolved()
        raise Stop


def why(name: str) -> str:
    rule = rule_of(name)
    assert rule is not None
    return rule.why


def settings(*arguments: str) -> dict[str, Any]:
    with pytest.raises(Stop):
        Settings.run_command(["fit", *arguments])
    return Settings.found


def test_a_config_of_an_older_run_still_names_its_strategy(tmp_path: Path) -> None:
    """FSDP2Strategy was in moa_lightning.strategies."""
    older = tmp_path / "config.yaml"
    shipped = (ROOT / "configs" / "trainer" / "fsdp.yaml").read_text()
    older.write_text(shipped.replace("moa_lightning.training.strategies", "moa_lightning.strategies"))
    assert "class_path: moa_lightning.strategies.FSDP2Strategy" in older.read_text()
    found = settings("--config", "configs/demo.yaml", "--config", str(older))
    assert found["trainer"]["strategy"]["class_path"].endswith("strategies.FSDP2Strategy")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "configs/demo.yaml"],
        [
            "--config",
            "configs/demo.yaml",
            "--model.combiner=CAID",
            "--model.kl=LossKL",
            "--model.loss=PairwiseLogistic",
        ],
        ["--config", "configs/demo.yaml", "--model.policy.lora={}", "--model.reference=LaggedCopy"],
        [
            "--config",
            "configs/demo.yaml",
            "--lr_scheduler=StepLR",
            "--lr_scheduler.step_size=3",
            "--optimizer=torch.optim.SGD",
        ],
        ["--config", "configs/recipe/pama.yaml"],
    ],
    ids=["demo", "classes", "adapter", "scheduler", "recipe"],
)
def test_the_table_knows_every_setting(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = list(flat(settings(*arguments)))
    assert len(names) > 100
    unknown = [name for name in names if rule_of(name) is None]
    assert not unknown, "add a Rule in commands/resume_settings.py, and what table() prints to docs/resume.md"


def test_the_table_is_in_the_documentation() -> None:
    assert table() in (ROOT / "docs" / "resume.md").read_text(encoding="utf-8")


def test_every_rule_is_reached() -> None:
    """A rule behind a wider one would promise what does not happen."""
    for rule in RULES:
        assert rule_of(rule.pattern.replace("*", "x")) == rule


def test_only_the_class_of_another_piece_is_named() -> None:
    before = {"model": {"kl": {"class_path": "RewardKL", "init_args": {"target": 1}}, "loss": None, "new": 1}}
    now = {"model": {"kl": {"class_path": "LossKL", "init_args": {"beta": 1}}, "loss": {"class_path": "A"}, "old": 2}}
    assert [(c.name, c.before, c.now, c.rule.verdict) for c in changes(before, now)] == [
        ("model.kl.class_path", "RewardKL", "LossKL", Verdict.REFUSED)
    ]
    assert changes(before, before) == []
    scheduled = [{"lr_scheduler": value} for value in (None, {"class_path": "StepLR", "init_args": {}})]
    assert [c.rule.verdict for c in changes(*scheduled)] == [Verdict.REFUSED]


def test_what_is_changed_is_reported_and_recorded(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    moa("fit", "--config", task.config, "--trainer.max_steps=1", "--model.kl.init_kl_coef=0.3")
    newest = by_steps(task.root / "checkpoints")[0]
    assert settings_in(newest)["model"]["kl"]["init_args"]["init_kl_coef"] == 0.3
    again = ("fit", "--config", task.root / "config.yaml", "--ckpt_path=last")
    capsys.readouterr()

    refused = complaint(capsys, *again, "--model.kl=LossKL", "--model.objectives.good.scale=2", "--model.seed=9")
    assert refused.startswith(
        "model.objectives.good.scale is 2.0, and the checkpoint was written with 1.0: value heads"
    )
    assert refused.endswith("or start from its exported policy (so for model.kl.class_path)")
    assert complaint(capsys, *again, "--model.optimizer=torch.optim.SGD").startswith(
        "model.optimizer.class_path is torch.optim.SGD"
    )

    changed = [
        "--trainer.max_steps=2",
        "--trainer.precision=bf16-mixed",
        "--model.optimizer.lr=1e-4",
        "--data.batch_size=2",
        "--model.kl.init_kl_coef=0.05",
        "--model.kl.target=null",
        "--model.seed=9",
        "--data.seed=8",
        "--seed_everything=5",
    ]
    moa(*again, *changed)
    start = "model.kl.init_args.init_kl_coef"
    lines = {line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed: ")}
    assert lines == {
        "resumed: trainer.max_steps 2 is taken (1 before)",
        "resumed: trainer.precision bf16-mixed is taken (null before)",
        "resumed: model.optimizer.init_args.lr 0.0001 is taken (0.001 before)",
        "resumed: data.init_args.batch_size 2 is taken (4 before)",
        "resumed: model.kl.init_args.target null is taken (3.0 before)",
        f"resumed: {start} 0.05 is not used, 0.3 is kept: {why(start)}",
        "resumed: model.seed 9 is not used, 7 is kept: evaluations of one run draw alike",
        f"resumed: data.init_args.seed 8 is not used, 7 is kept: {why('data.init_args.seed')}",
        "resumed: seed_everything 5 is not used, 7 is kept: random streams continue from the checkpoint",
    }
    record = yaml.safe_load((task.root / "config.yaml").read_text())
    assert record["model"]["kl"]["init_args"] == {"init_kl_coef": 0.3, "target": None, "horizon": 10000.0}
    assert (record["seed_everything"], record["model"]["seed"], record["data"]["init_args"]["seed"]) == (7, 7, 7)
    assert record["data"]["init_args"]["batch_size"] == 2
    assert record["model"]["optimizer"]["init_args"]["lr"] == 1e-4
    assert json.loads((task.root / "summary.json").read_text())["steps"] == 2

    moa("fit", "--config", task.root / "config.yaml", "--ckpt_path=last")  # nothing differs
    assert "resumed: " not in capsys.readouterr().out
