"""Processes that are about to do different things are told so, all with the same words, and none hangs."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from moa_lightning.combiners import PAMA
from moa_lightning.data import PromptData
from moa_lightning.errors import UserError
from moa_lightning.models import PolicyConfig
from moa_lightning.module import AlignmentModule
from moa_lightning.rewards import Length, Objective
from moa_lightning.sources import Rollout
from moa_lightning.training.agreement import difference, failure, fingerprint, flat
from tests.helpers import processes, tiny


class Films(PromptData):
    """Four prompts, the last of which can be chosen; what goes wrong can be chosen too."""

    def __init__(self, last: str = "bad", unread: Exception | None = None, unprepared: str | None = None) -> None:
        super().__init__(batch_size=2)
        self.last, self.unread, self.unprepared = last, unread, unprepared

    def prepare(self) -> None:
        if self.unprepared:
            raise UserError(self.unprepared)

    def rows(self, stage: Any) -> list[dict[str, Any]]:
        if self.unread:
            raise self.unread
        return [{"prompt": word} for word in ("the", "film", "was", self.last)]


HOST = socket.gethostname()
MISSING = "data file 'prompts.jsonl' does not exist"
# What one process has that the other has not, and what both say of it.
CASES: dict[str, tuple[int, dict[str, Any], str | None]] = {
    "same": (1, {}, None),
    "setting": (1, {"tokens": 7}, "differs from the others in model.source: Rollout(max_new_tokens=7, "),
    "command": (1, {"settings": {"data.seed": "3"}}, "in data.seed: 3 there, 0 elsewhere; start all with the same"),
    "rows": (1, {"data": {"last": "good"}}, "differs from the others in data train rows: 4 with digest "),
    "variable": (1, {"NCCL_ALGO": "Ring"}, "in environment variable NCCL_ALGO: Ring there, nothing elsewhere"),
    "policy": (1, {"policy": "other"}, "in policy file config.json: "),
    "unread": (1, {"data": {"unread": FileNotFoundError(MISSING)}}, MISSING),
    "unprepared": (0, {"data": {"unprepared": MISSING}}, MISSING),
    "defect": (1, {"data": {"unread": KeyError("prompt")}}, "KeyError: 'prompt'"),
}


def _fit(mine: dict[str, Any], number: int) -> str | None:
    """What a process is told, or the run folder that it takes."""
    module = AlignmentModule(
        policy=PolicyConfig("policy"),
        objectives={name: Objective(Length(divisor=8.0)) for name in ("long", "longer")},
        combiner=PAMA(),
        source=Rollout(max_new_tokens=mine.get("tokens", 6)),
    )
    module.settings = (
        {"data.seed": "0", "config": f"/node-{number}/run.yaml"} | mine["settings"] if "settings" in mine else {}
    )
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": 1}
    trainer = Trainer(
        default_root_dir=f"run-{number}",
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        enable_model_summary=False,
        limit_val_batches=0,
        **options,
    )
    try:
        trainer.fit(module, datamodule=Films(**mine.get("data", {})))
    except (ValueError, KeyError) as error:
        return f"{type(error).__name__} {error}"
    return trainer.default_root_dir


def _process(number: int, port: int, folder: Path) -> None:
    processes.join(number, port)
    os.chdir(folder / str(number))
    told = {}
    for name, (which, theirs, _) in CASES.items():
        mine = theirs if number == which else {}
        if "settings" in theirs:
            mine = {"settings": mine.get("settings", {})}
        os.environ.pop("NCCL_ALGO", None)
        if "NCCL_ALGO" in mine:
            os.environ["NCCL_ALGO"] = mine["NCCL_ALGO"]
        if "policy" in mine:
            Path("policy").rename("first")
            Path("other").rename("policy")
        told[name] = _fit(mine, number)
        if "policy" in mine:
            Path("policy").rename("other")
            Path("first").rename("policy")
    torch.save(told, folder / f"told-{number}.pt")


@pytest.mark.slow
def test_who_differs_or_fails_is_named_on_every_process(tmp_path: Path) -> None:
    for number in range(2):
        tiny.policy_folder(tmp_path / str(number) / "policy")
        tiny.policy_folder(tmp_path / str(number) / "other")
        config = tmp_path / str(number) / "other" / "config.json"
        config.write_text(config.read_text().replace("{", '{ "summary_first_dropout": 0.7,', 1))
    mp.spawn(_process, args=(processes.free_port(), tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"told-{number}.pt") for number in range(2))
    assert first.pop("same") == second.pop("same") == "run-0"  # rank 0 names the folder
    assert second.pop("defect") == "KeyError 'prompt'"  # with its own traceback
    assert first.pop("defect") == f"SharedRefusal rank 1 on host {HOST}: KeyError: 'prompt'"
    for name, told in first.items():
        which, _, expected = CASES[name]
        assert told == second[name]
        assert told.startswith(f"SharedRefusal rank {which} on host {HOST}"), told
        assert expected in told
        assert "\n" not in told


def test_majority_is_right_and_rank_0_where_there_is_none() -> None:
    told = difference(["a", "b", "c"], [{"x": "1"}, {"x": "2"}, {"x": "2"}])
    assert told is not None
    assert told.startswith("rank 0 on host a differs from the others in x: 1 there, 2 elsewhere")
    told = difference(["a", "a", "b", "b"], [{"x": "1"}, {"x": "1"}, {"x": "2", "y": "3", "z": "4"}, {"x": "2"}])
    assert told is not None
    assert told.startswith(
        "ranks 2, 3 on host b differ from the others in x: 2 there, 1 elsewhere (so do 2 more, such as y); start"
    )
    assert difference(["a", "b"], [{"x": "1"}, {"x": "1"}]) is None


def test_many_processes_make_one_short_line() -> None:
    hosts = [f"node{rank // 8}" for rank in range(64)]
    told = difference(hosts, [{"long": "v" * 500 if rank < 24 else "w" * 500} for rank in range(64)])
    assert told is not None
    assert told.startswith("ranks 0, 1, 2, 3, 4, 5, 6, 7 and 16 more on hosts node0, node1, node2 differ")
    assert len(told) < 400


def test_what_all_say_alike_needs_no_rank() -> None:
    assert failure(["a", "b"], ["no file", "no file"]) == "no file"
    assert failure(["a", "b"], [None, "no file"]) == "rank 1 on host b: no file"
    assert failure(["a", "b"], [None, None]) is None


def test_fingerprint_sees_order_and_content_but_not_the_order_of_columns() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "wish": 1},
        {"prompt": [{"role": "user", "content": "ä"}], "wish": None},
    ]
    same = fingerprint(rows)
    assert same.startswith("2 with digest ")
    assert fingerprint([dict(reversed(row.items())) for row in rows]) == same
    others = [rows[::-1], rows[:1], [rows[0] | {"wish": 2}, rows[1]], [rows[0] | {"wish": "1"}, rows[1]]]
    assert len({same, *map(fingerprint, others)}) == 5
    assert fingerprint([]).startswith("0 ")


def test_config_by_dotted_keys_keeps_what_is_empty() -> None:
    assert flat({"a": {"b": None, "c": [], "d": [{"e": 1.5}]}}) == {"a.b": "None", "a.c": "[]", "a.d.0.e": "1.5"}
