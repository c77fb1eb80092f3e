"""Where a chat answer ends, for templates of several kinds."""

from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from bench.peers.chat_dpo import TEMPLATES, chat_tokenizer
from moa_lightning.chat import TemplateError, answer_turn, closed_answer, end_tokens, render
from moa_lightning.commands.export.policy_folder import write_generation
from moa_lightning.models import Encoder
from moa_lightning.stages.supervised import encode
from tests.helpers import tiny

ASKED = [{"role": "user", "content": "the film was"}]
WITHOUT_END = {
    "white space": "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    "nothing": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "a phrase": "{% for m in messages %}<|user|>{{ m.content }}\nthe plot{% endfor %}",
    "refuses answers": "{% if messages[1:] %}{{ raise_exception('no') }}{% endif %}<|user|>{{ messages[0].content }}",
}


def words(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def encoder(tokenizer, **more):
    return Encoder(tokenizer, tuple(end_tokens(tokenizer)), 64, 16, with_candidates=True, **more)


@pytest.mark.parametrize(
    ("template", "closed"),
    [("newline", ["good", "film", "<|end|>", "\n"]), ("bare", ["good", "film", "<|end|>"])],
)
def test_an_answer_ends_as_the_template_ends_a_turn(template, closed):
    tokenizer = chat_tokenizer(template)
    turn = answer_turn(tokenizer)
    assert words(tokenizer, [turn.end_token]) == ["<|end|>"]
    assert words(tokenizer, end_tokens(tokenizer)) == ["<eos>", "<|end|>"]
    assert words(tokenizer, closed_answer(tokenizer, ASKED, "good film", turn)) == closed
    # An end that the data have already is not written twice.
    assert words(tokenizer, closed_answer(tokenizer, ASKED, "good film<|end|>", turn)) == closed
    assert words(tokenizer, encoder(tokenizer).response_tokens(ASKED, "good film")) == closed
    # Plain text keeps the tokenizer's end token.
    assert words(tokenizer, encoder(tokenizer).response_tokens("the film was", "good film")) == [
        "good",
        "film",
        "<eos>",
    ]


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_supervised_texts_and_preferences_end_alike(template):
    tokenizer = chat_tokenizer(template)
    example = encode(tokenizer, ASKED, "good film", 64)
    read = tokenizer(render(tokenizer, ASKED), add_special_tokens=False)["input_ids"]
    assert example.ids == [*read, *encoder(tokenizer).response_tokens(ASKED, "good film")]
    assert example.learnt_from == len(read)
    assert encode(tokenizer, "the film was", "good film", 64).ids[-1] == tokenizer.eos_token_id


def test_an_end_that_is_an_ordinary_token_is_found_too():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} . {% endfor %}"
    assert words(tokenizer, end_tokens(tokenizer)) == ["<eos>", "."]
    turn = answer_turn(tokenizer)
    assert words(tokenizer, closed_answer(tokenizer, ASKED, "good", turn)) == ["good", "."]


def test_the_first_of_several_end_tokens_ends_the_turn():
    tokenizer = chat_tokenizer("newline")
    tokenizer.chat_template = TEMPLATES["newline"] + "{% if not add_generation_prompt %}<eos>{% endif %}"
    assert words(tokenizer, end_tokens(tokenizer)) == ["<eos>", "<|end|>"]
    closed = closed_answer(tokenizer, ASKED, "good", answer_turn(tokenizer))
    assert words(tokenizer, closed) == ["good", "<|end|>", "\n", "<eos>"]
    again = closed_answer(tokenizer, ASKED, "good<|end|>", answer_turn(tokenizer))
    assert words(tokenizer, again) == words(tokenizer, closed), "the end token that the row had already is not doubled"


@pytest.mark.parametrize("template", list(WITHOUT_END.values()), ids=list(WITHOUT_END))
def test_without_an_end_of_its_own_a_turn_takes_the_tokenizers(template):
    tokenizer = chat_tokenizer("bare")
    tokenizer.chat_template = template
    assert answer_turn(tokenizer) is None
    assert end_tokens(tokenizer) == [tokenizer.eos_token_id]
    assert words(tokenizer, encoder(tokenizer).response_tokens(ASKED, "good film")) == ["good", "film", "<eos>"]
    assert answer_turn(tiny.tokenizer()) is None, "no template"


def test_where_a_template_writes_an_answered_prompt_differently_the_prompt_stays():
    tokenizer = chat_tokenizer("bare")
    tokenizer.chat_template = TEMPLATES["bare"].replace("<|assistant|>{% endif %}", "<|assistant|>the plot{% endif %}")
    turn = answer_turn(tokenizer)
    assert not turn.starts_answer(render(tokenizer, ASKED))
    assert words(tokenizer, closed_answer(tokenizer, ASKED, "good", turn)) == ["good", "<|end|>"]


def test_a_row_that_the_template_refuses_is_no_traceback():
    tokenizer = chat_tokenizer("bare")
    tokenizer.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('Start with the\nuser') }}{% endif %}"
        + (TEMPLATES["bare"])
    )
    asked = [{"role": "system", "content": "the plot"}]
    with pytest.raises(TemplateError, match="the chat template refuses the messages: Start with the user"):
        render(tokenizer, asked)
    problem = encoder(tokenizer).problem({"prompt": asked, "responses": ["good", "bad"]})
    assert problem == "the chat template refuses the messages: Start with the user; change or remove the row"
    assert encoder(tokenizer).problem({"prompt": ASKED, "responses": ["good", "bad"]}) is None


def test_an_exported_policy_stops_there_too(tmp_path):
    tokenizer = chat_tokenizer("newline")
    write_generation(tmp_path, GenerationConfig(eos_token_id=[1, 8]), SimpleNamespace(settings={}), tokenizer)
    saved = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert words(tokenizer, saved) == ["<eos>", "<|end|>", "film"]


def test_an_answer_of_white_space_alone_has_no_tokens():
    row = {"prompt": ASKED, "responses": ["good", " "]}
    assert encoder(chat_tokenizer("bare")).problem(row) == "response 1 has no tokens; remove the row"
