"""What is logged while training: objectives, time, the progress bar."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moa_lightning.callbacks import ObjectiveMetrics, ObjectiveProgressBar, ParetoFront, Throughput
from tests.callbacks.scripted import Scripted, around, evaluation, experience, trainer

NAN = float("nan")
MASK_BT = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
FIRST_BN = torch.tensor([[1.0, 2.0, 9.0], [2.0, NAN, 8.0], [4.0, 1.0, 7.0], [NAN, 5.0, 6.0], [3.0, 3.0, NAN]])
SECOND_BN = torch.tensor([[2.0, NAN, 1.0], [6.0, NAN, 2.0], [7.0, NAN, 3.0], [8.0, NAN, 4.0], [2.0, NAN, 5.0]])
NAMES = ("good", "short", "watched")


class Record(ObjectiveMetrics):
    """Everything the callback logged, batch by batch."""

    def __init__(self):
        super().__init__()
        self.logged = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        seen = SimpleNamespace(
            log_dict=lambda metrics, **options: self.logged.append(metrics),
            combiner=pl_module.combiner,
            combiner_state=pl_module.combiner_state,
            objective_names=pl_module.objective_names,
        )
        super().on_train_batch_end(trainer, seen, outputs, batch, batch_idx)


def advantages(seed=0):
    return torch.randn(*MASK_BT.shape, 2, generator=torch.Generator().manual_seed(seed))


def batch(raw_BN, seed=0):
    return experience(raw_BN, NAMES, MASK_BT, advantages(seed), unwatched=["watched"], scales=[1.0, -2.0, 1.0])


def record(tmp_path, *batches, **options):
    callback = Record()
    moa = Scripted(collected=[batch(raw_BN, i) for i, raw_BN in enumerate(batches)], **options)
    steps = len(batches) * options.get("updates", 1)
    trainer(tmp_path, callback, max_steps=steps, limit_val_batches=0).fit(moa)
    return callback.logged


def test_rewards_and_advantages_of_a_batch(tmp_path):
    (logged,) = record(tmp_path, FIRST_BN)
    expected = {}
    for i, name in enumerate(NAMES):
        column = FIRST_BN[:, i].double().numpy()
        expected |= {
            f"rewards/{name}/mean": np.nanmean(column),
            f"rewards/{name}/std": np.nanstd(column, ddof=1),
            f"rewards/{name}/standardized": 0.0,
            f"rewards/{name}/missing": 0.2,
        }
    short = -2 * FIRST_BN[:, 1].double().numpy()  # the values of the one objective that has a scale
    expected |= {"values/short/mean": np.nanmean(short), "values/short/std": np.nanstd(short, ddof=1)}
    for i, name in enumerate(NAMES[:2]):
        scored_B = ~np.isnan(FIRST_BN[:, i].numpy())
        counted = advantages()[..., i].double().numpy()[MASK_BT.numpy() & scored_B[:, None]]
        expected |= {f"advantages/{name}/mean": counted.mean(), f"advantages/{name}/std": counted.std(ddof=1)}
    rows = [0, 2, 4]  # those that both could score
    expected["correlation/good/short"] = np.corrcoef(FIRST_BN[rows, 0], -2 * FIRST_BN[rows, 1])[0, 1]
    expected |= {"completions/truncated": 0.2, "completions/mean_length": 13 / 5, "kl": 0.25, "kl_coefficient": 0.2}
    expected |= {"weights/good": 0.5, "weights/short": 0.5, "score/mean": 0.0}
    assert expected["rewards/good/mean"] == 2.5
    assert expected["correlation/good/short"] > 0.1  # of values: the raw scores' is negative
    assert logged == pytest.approx(expected, rel=1e-5)


def test_what_the_combiner_reports_is_logged_by_objective(tmp_path):
    callback = Record()
    moa = Scripted(collected=[batch(FIRST_BN)])
    moa.combiner_state = {"duals": torch.tensor([math.nan, 2.5]), "values": torch.tensor([0.5, 0.25])}
    trainer(tmp_path, callback, max_steps=1, limit_val_batches=0).fit(moa)
    reported = {k: v for k, v in callback.logged[0].items() if re.fullmatch(r"(duals|values)/\w+", k)}
    assert reported == {"duals/short": 2.5, "values/good": 0.5, "values/short": 0.25}


def test_a_silent_objective_leaves_no_number_but_its_missing_share(tmp_path):
    _, second, third = record(tmp_path, FIRST_BN, SECOND_BN, FIRST_BN + 6.0)
    assert second["rewards/short/missing"] == 1.0
    gone = {"rewards/short/mean", "rewards/short/std", "values/short/mean", "correlation/good/short"}
    assert not gone & second.keys()
    # Standardised by the first batch: mean 2.5, then 5, and 8.5.
    spread = np.nanstd(FIRST_BN[:, 0], ddof=1)
    assert second["rewards/good/standardized"] == pytest.approx(2.5 / spread)
    assert third["rewards/good/standardized"] == pytest.approx(6.0 / spread)
    assert third["rewards/short/missing"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("score", "mean"),
    [
        (torch.tensor([1.0, -2.0, 3.0, 0.0, 5.0]), (3 * 1 - 2 + 4 * 3 + 0 + 3 * 5) / 13),
        (torch.arange(20.0).reshape(5, 4), float(torch.arange(20.0).reshape(5, 4)[MASK_BT].mean())),
    ],
    ids=["of responses", "of tokens"],
)
def test_every_update_tells_its_own_terms_and_the_first_its_batch(tmp_path, score, mean):
    terms = {"clip_ratio": 0.125, "value_loss/good": 2.0}
    first, second = record(tmp_path, FIRST_BN, updates=2, score_BT=score, weights=[0.75, 0.25], terms=terms)
    of_update = {**terms, "score/mean": pytest.approx(mean), "weights/good": 0.75, "weights/short": 0.25}
    assert second == of_update
    assert {key: first[key] for key in second} == of_update
    assert "rewards/good/mean" in first


def test_the_origin_of_standardised_rewards_survives_a_checkpoint(tmp_path):
    callback = ObjectiveMetrics()
    running = trainer(tmp_path, callback, max_steps=1, limit_val_batches=0)
    running.fit(Scripted(collected=[batch(FIRST_BN)]))
    running.save_checkpoint(tmp_path / "half.ckpt")
    other = ObjectiveMetrics()
    running = trainer(tmp_path, other, max_steps=2, limit_val_batches=0)
    running.fit(Scripted(collected=[batch(FIRST_BN + 6.0)]), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    spread = np.nanstd(FIRST_BN[:, 0], ddof=1)
    assert float(running.callback_metrics["rewards/good/standardized"]) == pytest.approx(6.0 / spread)


def test_shares_of_time(tmp_path, monkeypatch):
    """The clock strikes once a call, so an update takes 1 s; two of them beside 6 s of collection."""
    strikes = iter(range(1000))
    monkeypatch.setattr("moa_lightning.callbacks.throughput.time", SimpleNamespace(perf_counter=lambda: next(strikes)))
    seconds = {"generation": 3.0, "scoring": 2.0, "forward": 1.0}
    callback = Throughput()
    running = trainer(tmp_path, callback, max_steps=4, limit_val_batches=0)
    running.fit(Scripted(collected=[experience(torch.zeros(4, 2), seconds=seconds)] * 2, updates=2))
    logged = {k: float(v) for k, v in running.callback_metrics.items() if k.startswith("throughput/")}
    assert logged == {
        "throughput/share_generation": 3 / 8,
        "throughput/share_scoring": 2 / 8,
        "throughput/share_forward": 1 / 8,
        "throughput/share_learning": 2 / 8,
        "throughput/tokens_per_second": 12 / 8,
        "throughput/generated_tokens_per_second": 12 / 3,
    }
    assert (callback.total_tokens, callback.total_seconds) == (24, 16)


def test_the_progress_bar_shows_the_objectives(tmp_path, capsys):
    collected = experience(around(1.25, -0.5), scales=[1.0, -2.0])
    moa = Scripted([evaluation(around(1, 1)), evaluation(around(2, 2))], [collected])
    watchers = [ObjectiveMetrics(), ParetoFront({"good": 0.0, "short": 0.0}), ObjectiveProgressBar(refresh_rate=1)]
    running = trainer(tmp_path, *watchers, max_steps=1, enable_progress_bar=True)
    running.fit(moa)
    shown = capsys.readouterr().out
    assert re.search(r"good=1\.250, short=1\.000 \(raw -0\.500\)", shown)
    assert watchers[-1].get_metrics(running, moa) == {
        "good": "1.250",
        "short": "1.000 (raw -0.500)",
        "hypervolume": "4.000",
    }
