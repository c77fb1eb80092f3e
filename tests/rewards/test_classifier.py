"""Rewards from sequence classifiers, against transformers itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from moa_lightning.rewards import (
    Chat,
    CompletionOnly,
    Objective,
    Probability,
    PromptAndCompletion,
    RewardPanel,
    TextClassifier,
    TextPair,
)

CPU = torch.device("cpu")
PROMPTS = ["the film ", "a plot ", "the ", "the film was ", "a "]
COMPLETIONS = [
    "was good",
    "was slow and dull film film film",
    "bad",
    "a good good fine plot the dull slow film",
    "fine",
]


def ready(path: Path, **fields: Any) -> TextClassifier:
    reward = TextClassifier(str(path), **fields)
    reward.check(set())
    reward.setup(CPU)
    return reward


def logits_of(path: Path, *texts: str, **options: Any) -> torch.Tensor:
    """Logits (K,) of one text, or one pair of texts, alone: no batch, no padding."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    inputs = AutoTokenizer.from_pretrained(path)(*texts, return_tensors="pt", **options)
    with torch.no_grad():
        return model(**inputs).logits[0]


def refused(path: Path | str, **fields: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the callers look at the message
        TextClassifier(str(path), **fields).check(set())
    assert "\n" not in str(error.value)
    return str(error.value)


# Scores


def test_logits_are_those_of_each_text_alone(bert_folder) -> None:
    folder = bert_folder()
    expected = [logits_of(folder, p + c)[1].item() for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert ready(folder, label="POSITIVE").score(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.05, "the texts must score differently, or their order would not be tested"


def test_decoder_reward_models_without_a_padding_token_score_each_text_alone(gpt2_folder) -> None:
    folder = gpt2_folder()
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    expected = [logits_of(folder, p + c).item() for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    reward = ready(folder)
    assert reward.score(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.05


def test_a_tokenizer_that_pads_on_the_left_changes_nothing(gpt2_folder) -> None:
    """With absolute positions left padding would shift every shorter text."""
    folder = gpt2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    expected = [logits_of(folder, p + c).item() for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert ready(folder).score(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)


def padding_used(reward: TextClassifier) -> int:
    """The token that fills the shorter of two texts."""
    seen = []
    forward = reward._model.forward

    def spy(input_ids: torch.Tensor, **rest: Any) -> Any:
        seen.append(input_ids)
        return forward(input_ids=input_ids, **rest)

    reward._model.forward = spy
    reward.score(["", ""], ["good", "good film"])
    (input_ids_BL,) = seen
    assert reward._model.config.pad_token_id == input_ids_BL[1, -1].item()
    return int(input_ids_BL[1, -1])


def test_padding_is_the_tokenizers_token_else_the_models(gpt2_folder) -> None:
    folder = gpt2_folder(special={"eos_token": "<eos>", "pad_token": "[SEP]"}, pad_token_id=2)
    assert padding_used(ready(folder)) == 3
    folder = gpt2_folder(pad_token_id=2)
    assert padding_used(ready(folder)) == 2


def test_without_any_padding_token_a_text_may_end_with_any_token(gpt2_folder) -> None:
    """A decoder classifier reads the last token that is not padding: no text's own last token may be taken for it."""
    folder = gpt2_folder()
    texts = ["the film <eos>", "good [PAD]", "bad [UNK]", "a slow dull plot [CLS]", "fine [SEP] good bad"]
    expected = [logits_of(folder, text).item() for text in texts]
    reward = ready(folder, text=CompletionOnly())
    assert reward.score(["p"] * len(texts), texts) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_scores_do_not_depend_on_the_batch_size(bert_folder, gpt2_folder, batch_size: int) -> None:
    for folder, label in ((bert_folder(), 0), (gpt2_folder(), None)):
        whole = ready(folder, label=label, batch_size=5).score(PROMPTS, COMPLETIONS)
        parts = ready(folder, label=label, batch_size=batch_size).score(PROMPTS, COMPLETIONS)
        assert parts == pytest.approx(whole, abs=1e-5)


def test_texts_of_similar_length_share_a_batch_the_longest_first(bert_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = ready(bert_folder(), label=0, batch_size=2)
    shapes = []
    forward = reward._model.forward

    def spy(input_ids: torch.Tensor, **rest: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(reward._model, "forward", spy)
    reward.score(["the "] * 4, ["good", "good " * 9, "bad", "bad " * 9])
    assert shapes == [(2, 12), (2, 4)]


def test_probability_of_several_labels_is_the_softmax(bert_folder) -> None:
    folder = bert_folder(("a", "b", "c"))
    logits_K = logits_of(folder, "the film")
    scores = [
        ready(folder, label=label, output=Probability()).score(["the "], ["film"])[0] for label in ("a", "b", "c")
    ]
    assert scores == pytest.approx(logits_K.softmax(-1).tolist(), abs=1e-6)
    assert sum(scores) == pytest.approx(1.0)


def test_probability_of_one_label_is_the_sigmoid(gpt2_folder) -> None:
    folder = gpt2_folder()
    (score,) = ready(folder, output=Probability()).score(["the "], ["film"])
    assert score == pytest.approx(logits_of(folder, "the film").sigmoid().item(), abs=1e-6)
    assert score != pytest.approx(1.0, abs=1e-3)


def test_probability_in_a_multi_label_model_is_the_sigmoid(bert_folder) -> None:
    folder = bert_folder(("toxic", "insult"), problem_type="multi_label_classification")
    (score,) = ready(folder, label="insult", output=Probability()).score(["the "], ["film"])
    logits_K = logits_of(folder, "the film")
    assert score == pytest.approx(logits_K.sigmoid()[1].item(), abs=1e-6)
    assert score != pytest.approx(logits_K.softmax(-1)[1].item(), abs=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
def test_weights_take_their_dtype_and_scores_are_plain_floats(bert_folder, dtype: str) -> None:
    folder = bert_folder()
    reward = ready(folder, label=1, dtype=dtype)
    assert reward._model.dtype == (torch.float32 if dtype == "auto" else getattr(torch, dtype))
    (score,) = reward.score(["the "], ["film"])
    assert type(score) is float
    assert score == pytest.approx(logits_of(folder, "the film")[1].item(), abs=0.1)


def test_the_trainers_precision_does_not_reach_the_classifier(bert_folder) -> None:
    folder = bert_folder()
    reward = ready(folder, label=1)
    plain = reward.score(PROMPTS, COMPLETIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert reward.score(PROMPTS, COMPLETIONS) == plain
    torch.set_default_dtype(torch.bfloat16)
    try:
        within = ready(folder, label=1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert within._model.dtype == torch.float32
    assert within.score(PROMPTS, COMPLETIONS) == plain


# What is read


def test_what_is_scored(bert_folder) -> None:
    folder = bert_folder()

    def score(**fields: Any) -> float | None:
        return ready(folder, label=1, **fields).score(["the film"], ["was good"])[0]

    expected = {
        "joined": logits_of(folder, "the film was good")[1].item(),
        "completion": logits_of(folder, "was good")[1].item(),
        "pair": logits_of(folder, "the film", "was good")[1].item(),
    }
    assert score(text=PromptAndCompletion(separator=" ")) == pytest.approx(expected["joined"], abs=1e-5)
    assert score(text=CompletionOnly()) == pytest.approx(expected["completion"], abs=1e-5)
    assert score(text=TextPair()) == pytest.approx(expected["pair"], abs=1e-5)
    assert len({round(value, 3) for value in expected.values()}) == 3


def test_chat_goes_through_the_classifiers_own_template(gpt2_folder) -> None:
    folder = gpt2_folder()
    assert "needs a chat template" in refused(folder, text=Chat())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'the ' if m.role == 'user' else 'a ' }}{{ m.content }} {% endfor %}<eos>"
    )
    tokenizer.save_pretrained(folder)
    expected = [logits_of(folder, f"the {p} a {c} <eos>").item() for p, c in (("film", "good"), ("slow plot", "bad"))]
    scores = ready(folder, text=Chat()).score(["film", "slow plot"], ["good", "bad"])
    assert scores == pytest.approx(expected, abs=1e-5)


def test_long_texts_keep_their_end(bert_folder) -> None:
    folder = bert_folder()
    reward = ready(folder, label=1, max_length=6)
    (score,) = reward.score(["the film was slow "], ["good plot dull fine"])
    assert score == pytest.approx(logits_of(folder, "good plot dull fine")[1].item(), abs=1e-5)


def test_without_max_length_the_models_own_limit_holds(bert_folder, gpt2_folder) -> None:
    for folder, text in ((bert_folder(), "good " * 22), (gpt2_folder(), "good " * 24)):
        expected = logits_of(folder, text)[-1].item()
        (score,) = ready(folder, label=len(logits_of(folder, text)) - 1).score(["bad " * 50], [text])
        assert score == pytest.approx(expected, abs=1e-5)


def test_a_text_without_tokens_has_no_score(gpt2_folder) -> None:
    reward = ready(gpt2_folder(), text=CompletionOnly())
    with_empty = reward.score(["p"] * 3, ["good", "", "bad"])
    assert with_empty[1] is None
    assert [with_empty[0], with_empty[2]] == pytest.approx(reward.score(["p"] * 2, ["good", "bad"]), abs=1e-5)
    assert reward.score(["p"], [""]) == [None]


def test_no_texts_no_scores(bert_folder) -> None:
    assert ready(bert_folder(), label=0).score([], []) == []


# Labels


def test_labels_by_name_and_by_index(bert_folder) -> None:
    folder = bert_folder(("NEGATIVE", "NEUTRAL", "POSITIVE"))
    for label in ("POSITIVE", 2, "2"):  # the command line cannot tell 2 from "2"
        reward = TextClassifier(str(folder), label=label)
        reward.check(set())
        assert reward.label_name == "POSITIVE"


@pytest.mark.parametrize("label", ["positiv", 3, -1, "3", True])
def test_an_unknown_label_is_refused_with_those_of_the_model(bert_folder, label: Any) -> None:
    message = refused(bert_folder(("NEGATIVE", "NEUTRAL", "POSITIVE")), label=label)
    assert f"has no label '{label}'; its labels are 0: NEGATIVE, 1: NEUTRAL, 2: POSITIVE" in message
    assert message.endswith("did you mean 'POSITIVE'?") == (label == "positiv")


def test_several_labels_need_a_choice(bert_folder) -> None:
    assert refused(bert_folder()).endswith("has several labels; set label to one of them (0: NEGATIVE, 1: POSITIVE)")


def test_one_label_needs_no_choice_and_takes_its_own(gpt2_folder) -> None:
    folder = gpt2_folder()
    for label in (None, 0, "LABEL_0"):
        TextClassifier(str(folder), label=label).check(set())
    assert "has no label '1'" in refused(folder, label=1)


# Checks


def test_the_check_reads_no_weights(bert_folder) -> None:
    folder = bert_folder()
    (folder / "model.safetensors").write_bytes(b"not weights")
    reward = TextClassifier(str(folder), label=1)
    reward.check(set())
    with pytest.raises(ValueError, match="does not open as a sequence classifier"):
        reward.setup(CPU)


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "~/no-such-folder", "a/b/c", ""])
def test_a_folder_that_does_not_exist_is_refused_in_one_line(path: str) -> None:
    assert refused(path) == f"folder '{path}' does not exist; give a folder in Hugging Face format, or a hub id"


def test_what_might_be_a_hub_id_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "'someone/model' does not open as a model config: there is no folder of that name" in refused(
        "someone/model"
    )


def test_a_folder_in_the_current_one_is_opened_by_its_name(bert_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bert_folder()
    monkeypatch.chdir(folder.parent)
    TextClassifier(folder.name, label=0).check(set())


def test_broken_and_missing_parts_are_named(bert_folder, tmp_path: Path) -> None:
    folder = bert_folder()
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text("{")
    assert "does not open as a model config" in refused(folder, label=0)
    (folder / "config.json").write_text(config)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert refused(folder, label=0).endswith(
        "has no tokenizer files; save the model's tokenizer there (tokenizer.save_pretrained(folder))"
    )
    (tmp_path / "empty").mkdir()
    assert "does not open as a model config" in refused(tmp_path / "empty")


def test_a_language_model_is_no_classifier(gpt2_folder) -> None:
    """Transformers would give it a head of random numbers."""
    reward = TextClassifier(str(gpt2_folder(causal=True)))
    with pytest.raises(ValueError, match=r"not a trained sequence classifier: it has no weights for score\.weight"):
        reward.setup(CPU)


@pytest.mark.parametrize(("max_length", "words"), [(25, "exceeds the 24 tokens"), (3, "leaves no room")])
def test_max_length_must_fit_the_model(bert_folder, max_length: int, words: str) -> None:
    assert words in refused(bert_folder(), label=0, max_length=max_length)


def test_the_tokenizers_limit_counts_too(bert_folder) -> None:
    folder = bert_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 10
    tokenizer.save_pretrained(folder)
    assert "exceeds the 10 tokens" in refused(folder, label=0, max_length=11)


@pytest.mark.parametrize("fields", [{"batch_size": 0}, {"max_length": 0}])
def test_sizes_must_be_positive(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        TextClassifier("path", **fields)


def test_code_of_the_checkpoint_is_not_run_unless_asked_for(bert_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bert_folder()
    asked = []
    original = AutoConfig.from_pretrained

    def spy(path: str, **arguments: Any) -> Any:
        asked.append(arguments["trust_remote_code"])
        return original(path, **arguments)

    monkeypatch.setattr(AutoConfig, "from_pretrained", spy)
    TextClassifier(str(folder), label=0).check(set())
    assert set(asked) == {False}
    TextClassifier(str(folder), label=0, trust_remote_code=True).check(set())
    assert set(asked) == {False, True}


# Life in a run


def test_the_model_is_frozen_in_evaluation_mode_and_outside_the_module_tree(bert_folder) -> None:
    reward = ready(bert_folder(), label=0)
    module = LightningModule()
    module.panel = RewardPanel({"sentiment": Objective(reward)})
    assert list(module.parameters()) == []
    assert module.state_dict() == {}
    module.train()
    assert not reward._model.training
    assert not any(parameter.requires_grad for parameter in reward._model.parameters())


def test_set_up_again_keeps_the_weights_and_moves_them(bert_folder) -> None:
    reward = ready(bert_folder(), label=0)
    model = reward._model
    reward.setup(torch.device("meta"))
    assert reward._model is model
    assert model.device.type == "meta"


def test_without_check_and_setup_it_scores_on_the_cpu(bert_folder) -> None:
    folder = bert_folder()
    assert TextClassifier(str(folder), label=1).score(["the "], ["film"]) == ready(folder, label=1).score(
        ["the "], ["film"]
    )


def test_two_rewards_with_the_same_fields_are_equal_whatever_they_have_loaded(bert_folder) -> None:
    folder = bert_folder()
    assert ready(folder, label=1) == TextClassifier(str(folder), label=1)
