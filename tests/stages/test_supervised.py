import json
import math
import re

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.peers.chat_dpo import chat_model, chat_tokenizer
from moa_lightning.chat import end_tokens, render
from moa_lightning.stages.fitting import Fitting, SimilarLengths
from moa_lightning.stages.supervised import Example, NewModel, Texts, _read, collate_examples, encode, supervised
from tests.cli.task import write_prompts
from tests.helpers import tiny

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    lines = [{"q": f"question {i % 5}?", "text": f"the answer is {'good' if i % 2 else 'bad'} ."} for i in range(80)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_policy_from_scratch_learns_and_opens_with_transformers(texts, tmp_path, capsys):
    out = tmp_path / "policy"
    data = Texts(texts, prompt_column="q", val_size=16)
    new = NewModel("llama", 300, {**SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 64})
    supervised(str(out), data, new=new, fit=Fitting(epochs=6, batch_size=8, learning_rate=1e-2, max_length=64))
    before, after = (float(x) for x in capsys.readouterr().out.split("held-out loss ")[1].split(" nats")[0].split("->"))
    assert after < before / 3
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    text = "question 3? the answer is good ."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.padding_side == "left"
    made = model.generate(**tokenizer("question 1?", return_tensors="pt"), max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(made[0], skip_special_tokens=True) in {
        "question 1?the answer is good .",
        "question 1?the answer is bad .",
    }
    assert made[0, -1] == tokenizer.eos_token_id


def test_going_on_from_a_policy_changes_it_and_leaves_the_base_alone(texts, tmp_path):
    base = tiny.policy_folder(tmp_path / "base")
    was = (base / "model.safetensors").read_bytes()
    supervised(str(tmp_path / "out"), Texts(texts, val_size=4), base=str(base), fit=Fitting(max_steps=3, max_length=16))
    old, new = (AutoModelForCausalLM.from_pretrained(tmp_path / name).lm_head.weight for name in ("base", "out"))
    assert (base / "model.safetensors").read_bytes() == was
    assert not torch.equal(old, new)


def test_several_columns_are_several_texts_of_each_row(tmp_path):
    rows = [{"chosen": f"good {i}", "rejected": f"bad {i}", "q": f"film {i}"} for i in range(3)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts, texts = _read(Texts(str(path), ["chosen", "rejected"], "q", val_size=2))
    assert texts == ["good 0", "bad 0", "good 1", "bad 1", "good 2", "bad 2"]
    assert prompts == [f"film {i}" for i in (0, 0, 1, 1, 2, 2)]


def test_only_the_text_behind_the_prompt_is_learnt():
    tokenizer = tiny.tokenizer()
    example = encode(tokenizer, "the film was", "good and long", 16)
    assert example.learnt_from == 3
    assert example.ids[-1] == tokenizer.eos_token_id
    batch = collate_examples([example, Example([5, 6], 1)], pad_id=0)
    labels_BL = batch["labels"]
    assert labels_BL[0, :3].tolist() == [-100] * 3
    assert labels_BL[0, 3:].tolist() == example.ids[3:]
    assert labels_BL[1].tolist() == [-100, 6] + [-100] * (labels_BL.shape[1] - 2)
    assert batch["attention_mask"].sum(1).tolist() == [7, 2]
    # the loss of the padded batch is that of the texts one by one, token by token
    model = AutoModelForCausalLM.from_config(tiny.gpt2_config()).eval()
    logits_BLV = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    together = cross_entropy(logits_BLV[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten(), reduction="sum")
    apart = sum(
        cross_entropy(
            model(torch.tensor([e.ids])).logits[0, e.learnt_from - 1 : -1],
            torch.tensor(e.ids[e.learnt_from :]),
            reduction="sum",
        )
        for e in [example, Example([5, 6], 1)]
    )
    torch.testing.assert_close(together, apart)


def test_batches_hold_every_text_once_and_similar_lengths():
    lengths = [(7 * i) % 50 for i in range(53)]
    sampler = SimilarLengths(lengths, 8, seed=0)
    first, second = list(sampler), list(sampler)
    assert len(first) == len(sampler) == 7
    assert sorted(i for batch in first for i in batch) == list(range(53))
    assert first != second  # another epoch, another order
    assert list(SimilarLengths(lengths, 8, seed=0)) == first
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in first) / len(first)
    assert spread < 20  # of 49


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new": None}, "give either --base"),
        ({"base": "x"}, "give either --base"),
        ({"new": NewModel("lama")}, "'lama' is no architecture"),
        ({"new": NewModel("llama", 300, {"hiden_size": 3})}, "no field hiden_size"),
        ({"data": {"val_size": 80}}, "has 80 rows, no more than the 80 to hold out"),
        ({"data": {"column": "txt"}}, "has no column 'txt'.*did you mean 'text'"),
    ],
)
def test_mistakes_end_in_one_line_before_any_training(changes, message, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("moa_lightning.stages.supervised.train", lambda *_: pytest.fail("trained"))
    arguments = {"new": NewModel("llama", 300, SHAPE), **changes}
    arguments["data"] = Texts(texts, **changes.get("data", {}))
    with pytest.raises(ValueError, match=message):
        supervised(str(tmp_path / "out"), **arguments)
    assert not (tmp_path / "out").exists()


CHATS = [
    {"messages": [{"role": "user", "content": f"the film {word}"}, {"role": "assistant", "content": "good plot"}]}
    for word in ("was", "and", "long", "very")
]


def chat_base(folder):
    chat_model(0.0).save_pretrained(folder)
    chat_tokenizer("newline").save_pretrained(folder)
    return str(folder)


def test_of_chat_messages_the_last_one_is_learnt(tmp_path):
    whole, apart = tmp_path / "whole.jsonl", tmp_path / "apart.jsonl"
    asked = [{"q": row["messages"][:1], "a": row["messages"][1:], "t": row["messages"][1]["content"]} for row in CHATS]
    write_prompts(whole, CHATS)
    write_prompts(apart, asked)
    read = _read(Texts(str(whole), "messages", val_size=1))
    assert read == ([row["messages"][:1] for row in CHATS], ["good plot"] * 4)
    assert _read(Texts(str(apart), "a", "q", val_size=1)) == read
    assert _read(Texts(str(apart), "t", "q", val_size=1)) == read


def test_a_chat_policy_learns_to_end_its_turn(tmp_path):
    base, data = chat_base(tmp_path / "base"), tmp_path / "chats.jsonl"
    write_prompts(data, CHATS * 4)
    fit = Fitting(epochs=30, batch_size=16, learning_rate=1e-2, max_length=32)
    supervised(str(tmp_path / "out"), Texts(str(data), "messages", val_size=0), base=base, fit=fit)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), chat_tokenizer("newline")
    ids = tokenizer(render(tokenizer, CHATS[0]["messages"][:1]), return_tensors="pt", add_special_tokens=False)
    made = model.generate(**ids, max_new_tokens=4, do_sample=False, eos_token_id=end_tokens(tokenizer))
    answer = made[0, ids["input_ids"].shape[1] :]
    assert tokenizer.convert_ids_to_tokens(answer) == ["good", "plot", "<|end|>"]


@pytest.mark.parametrize(
    ("rows", "texts", "says"),
    [
        ([{"text": [{"role": "user", "content": "the film"}]}], {}, "line 1: column 'text': must hold messages with"),
        ([{"text": [{"role": "assistant", "content": "good"}]}], {}, "line 1: column 'text': must hold messages with"),
        ([{"text": CHATS[0]["messages"], "q": "the"}], {"prompt_column": "q"}, "holds messages, but the prompt is te"),
        ([{"text": CHATS[0]["messages"]}, {"text": [{"role": "system", "content": "dull"}, *CHATS[0]["messages"]]}],
         {}, "line 2: the chat template refuses the messages: no system; change or remove the row"),
    ],
)  # fmt: skip
def test_chat_messages_that_cannot_be_learnt(rows, texts, says, tmp_path, monkeypatch):
    monkeypatch.setattr("moa_lightning.stages.supervised.train", lambda *_: pytest.fail("trained"))
    base, data = chat_base(tmp_path / "base"), tmp_path / "chats.jsonl"
    tokenizer = chat_tokenizer("newline")
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    tokenizer.save_pretrained(base)
    write_prompts(data, rows)
    with pytest.raises(ValueError, match=re.escape(says)):
        supervised(str(tmp_path / "out"), Texts(str(data), val_size=0, **texts), base=base)


def test_chat_messages_need_a_chat_template(tmp_path):
    data = tmp_path / "chats.jsonl"
    write_prompts(data, CHATS)
    texts = Texts(str(data), "messages", val_size=0)
    with pytest.raises(ValueError, match=r"holds chat messages, and the tokenizer of '.*' has no chat template"):
        supervised(str(tmp_path / "out"), texts, base=str(tiny.policy_folder(tmp_path / "base")))
    with pytest.raises(ValueError, match="holds chat messages, and a new tokenizer has no chat template"):
        supervised(str(tmp_path / "out"), texts, new=NewModel("llama", 300, SHAPE))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"epochs": 0}, "fit.epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "fit.batch_size must be at least 1, got 0"),
        ({"max_length": 1}, "fit.max_length must be at least 2, got 1"),
        ({"seed": -1}, "fit.seed must be at least 0, got -1"),
        ({"max_steps": 0}, "fit.max_steps must be at least 1, or -1 for no limit, got 0"),
        ({"learning_rate": math.nan}, "fit.learning_rate must be a finite number above 0, got nan"),
        ({"learning_rate": -1.0}, "fit.learning_rate must be a finite number above 0, got -1"),
        ({"weight_decay": math.inf}, "fit.weight_decay must be a finite number of at least 0, got inf"),
        ({"warmup": 1.5}, r"fit\.warmup must lie in \[0, 1\], got 1\.5"),
    ],
)
def test_fields_out_of_range(fields, says):
    with pytest.raises(ValueError, match=says):
        Fitting(**fields)
