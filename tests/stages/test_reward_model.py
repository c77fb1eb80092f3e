import gzip
import json
import math

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from moa_lightning.rewards import TextClassifier
from moa_lightning.stages.reward_model import Pair, Preferences, RewardFitting, accuracy, collate, margins, reward_model
from tests.helpers import tiny


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for i in range(160):
            row = {"prompt": "the film was", "chosen": f" {'very ' * (i % 3)}good .", "rejected": " bad and dull ."}
            file.write(json.dumps(row) + "\n")
    return str(path)


def test_learns_what_was_preferred_and_opens_as_any_reward_model(pairs, tmp_path, capsys):
    base, out = tiny.policy_folder(tmp_path / "base", tiny.llama_config(), scale=1.0), tmp_path / "reward"
    reward_model(
        str(out),
        Preferences(pairs, prompt_column="prompt", val_size=32),
        str(base),
        RewardFitting(epochs=3, batch_size=8, learning_rate=1e-2),
    )
    printed = capsys.readouterr().out
    assert float(printed.split(" -> ")[1].split(" ")[0]) > 0.9
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.num_labels == 1
    assert model.config.id2label == {0: "reward"}
    good, bad = (
        model(**tokenizer(text, return_tensors="pt")).logits.item()
        for text in ("the film was good .", "the film was bad and dull .")
    )
    assert good > bad
    scores = TextClassifier(str(out)).score(["the film was"] * 2, [" good .", " bad and dull ."])
    assert scores == pytest.approx([good, bad], abs=1e-5)


@pytest.mark.parametrize("config", [tiny.llama_config, tiny.gpt2_config])
def test_margins_do_not_depend_on_padding(config, tmp_path):
    folder = tiny.policy_folder(tmp_path / "base", config())
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    batch = [Pair([5, 6, 7], [8]), Pair([9], [10, 11, 12, 13, 6])]
    apart = [margins(model, collate([pair], 0)).item() for pair in batch]
    assert margins(model, collate(batch, 0)).tolist() == pytest.approx(apart, abs=1e-5)


def test_accuracy_counts_a_tie_as_half(tmp_path):
    folder = tiny.policy_folder(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    same = Pair([5, 6], [5, 6])
    one, other = Pair([5, 6], [7, 8, 9]), Pair([7, 8, 9], [5, 6])
    assert accuracy(model, [same], 2) == 0.5
    assert accuracy(model, [one], 2) + accuracy(model, [other], 2) == 1.0
    assert accuracy(model, [one, other, same], 2) == 0.5
    assert math.isnan(accuracy(model, [], 2))


def test_long_texts_keep_their_end(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("moa_lightning.stages.reward_model.train", lambda _, pairs, fit: seen.extend(pairs))
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"chosen": "the " * 20 + "film was good", "rejected": "bad"}) + "\n")
    reward_model(
        str(tmp_path / "out"),
        Preferences(str(path), val_size=0),
        str(tiny.policy_folder(tmp_path / "base")),
        RewardFitting(max_length=3),
    )
    assert tiny.tokenizer().decode(seen[0].chosen) == "film was good"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "good"}, "has no column 'rejected'"),
        ({"chosen": "good", "rejected": " "}, "row 1: column 'rejected' holds no text"),
        ({"chosen": "good", "rejected": "bad"}, "has 1 pairs, no more than the 128 to hold out"),
    ],
)
def test_mistakes_end_in_one_line(row, message, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        reward_model(str(tmp_path / "out"), Preferences(str(path)), str(tmp_path / "no-model-is-opened"))
    assert not (tmp_path / "out").exists()
