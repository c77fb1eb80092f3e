"""The embedded task: its grammar, its objectives, and the policy that is taught it once."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa_lightning.data import Reviews, Stage, reviews
from moa_lightning.data.reviews import (
    VOCABULARY,
    distance_to_front,
    front,
    informative,
    is_grammatical,
    prompts,
    sentiment,
    warm_start,
    write_review,
)
from tests.helpers import tiny
from tests.test_module import module, trainer


def corpus(count, seed=0):
    generator = random.Random(seed)
    return [write_review(generator) for _ in range(count)]


def test_the_grammar_knows_what_it_writes_and_nothing_else():
    words = set(VOCABULARY)
    openings = set(prompts())
    assert len(openings) == len(prompts()) == 320
    for opening, review in corpus(500):
        assert opening in openings
        tokens = review.split()
        assert set(opening.split() + tokens) <= words
        assert is_grammatical(review)
        assert is_grammatical(f"  {review.replace(' ', '  ')} ")
        for broken in (tokens[1:], tokens[:-1], [*tokens, "."], tokens[::-1], ["film", *tokens]):
            assert not is_grammatical(" ".join(broken))


@pytest.mark.parametrize(
    ("text", "grammatical"),
    [
        ("was good .", False),  # no word of the grammar
        ("was great .", True),
        ("felt very great and so weak .", True),
        ("was very .", False),
        ("was great and .", False),
        ("was very truly great .", False),
        ("was great . it runs two hours .", True),
        ("it runs two hours .", False),  # the first sentence is the opening's
        ("was great . the plot seemed dull . the plot seemed dull .", True),
        ("was great . plot seemed dull .", False),
        ("was great . the film seemed dull .", False),
        ("", False),
    ],
)
def test_sentences(text, grammatical):
    assert is_grammatical(text) is grammatical


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", 0.0),
        (" . .", 0.0),
        ("was very great .", 1.0),
        ("was dull .", -1.0),
        ("was great and lovely and clever .", 1.0),  # piled up: no more
        ("was great but dull .", 0.0),
        ("was great . it runs two hours .", 0.5),
        ("was great . the plot was dull . the pace was weak . we saw it at home .", -0.25),
        ("was great . the plot was great and dull . the pace was great", 2 / 3),  # cut off before the full stop
        ("the film runs", 0.0),
    ],
)
def test_sentiment(text, value):
    assert sentiment(["the film"], [text]) == [pytest.approx(value)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", 0.0),
        (" . .", 0.0),
        ("was very great .", 0.0),
        ("was great . it runs two hours .", 0.5**0.5),
        ("was great . the plot was dull . the pace was weak . we saw it at home .", 0.5),
        (" it   runs two hours . it opened last week", 1.0),  # cut off before the full stop
        ("it runs two hours . it opened last", 0.5**0.5),  # cut off in the sentence: no fact
        ("it runs two great hours .", 0.0),
    ],
)
def test_informative(text, value):
    assert informative(["the film"], [text]) == [pytest.approx(value)]


def test_facts_cost_sentiment_as_much_as_the_front_says():
    """``sentiment <= 1 - informative^2``, reached by facts among praise."""
    texts = [review for _, review in corpus(1000)]
    scores = np.array([sentiment([], texts), informative([], texts)])
    assert (scores[0] <= 1 - scores[1] ** 2 + 1e-12).all()
    assert len(np.unique(scores[1])) > 4
    for facts in range(5):
        text = "was great . " * (4 - facts) + "it runs two hours . " * facts
        (s,), (f,) = sentiment([], [text]), informative([], [text])
        assert s == pytest.approx(1 - f**2)


def test_the_front_is_what_the_best_reviews_reach():
    """Over all reviews of up to five sentences, by the kinds of their sentences, and mixtures of them."""
    kinds = ("was great .", "was dull .", "was great but dull .", "it runs two hours .", "the film runs .")
    texts = [" ".join(text) for count in range(1, 6) for text in itertools.combinations_with_replacement(kinds, count)]
    points = np.array([sentiment([], texts), informative([], texts)])
    best = {f: points[0][points[1] == f].max() for f in np.unique(points[1])}
    assert len(best) == 11  # shares k/n with n up to 5
    assert best == pytest.approx({f: front(f) for f in best})
    for mixed in (points, np.array([[*best.values()], [*best]])):
        mixtures = mixed @ np.random.default_rng(0).dirichlet(np.full(mixed.shape[1], 0.1), size=2000).T
        assert (mixtures[0] <= front(mixtures[1]) + 1e-12).all()
    assert (mixtures[0] > front(mixtures[1]) - 0.05).any()


def test_distance_to_the_front():
    """By brute force, on both sides of the curve and beyond its ends."""
    curve = np.linspace(0, 1, 200_001)
    for s, f in itertools.product((-1.0, -0.05, 0.3, 0.5, 0.75, 1.0), (0.0, 0.12, 0.5, 1.0)):
        nearest = np.hypot(front(curve) - s, curve - f).min()
        assert distance_to_front(s, f) == pytest.approx(nearest, abs=1e-5)
    assert distance_to_front(0.75, 0.5) == pytest.approx(0, abs=1e-12)


def test_praise_is_short():
    """What makes it a task of two objectives: sentiment and length pull apart."""
    texts = [review for _, review in corpus(2000)]
    lengths = [len(text.split()) for text in texts]
    assert np.corrcoef(sentiment([], texts), lengths)[0, 1] < -0.3
    assert sentiment([], texts * 2) == sentiment([], texts) * 2


def test_openings_are_held_out():
    data = Reviews(val_size=5, val_repeats=3)
    train = [row["prompt"] for row in data.rows(Stage.TRAIN)]
    held_out = [row["prompt"] for row in data.rows(Stage.VALIDATE)]
    assert len(train) == 315
    assert held_out == held_out[:5] * 3
    assert set(train) | set(held_out) == set(prompts())
    assert not set(train) & set(held_out)
    assert Reviews(val_size=5, val_repeats=3, seed=4).rows(Stage.TEST) == data.rows(Stage.VALIDATE)
    for wrong in ({"val_size": 320}, {"val_size": 0}, {"val_repeats": 0}):
        with pytest.raises(ValueError, match=r"val_size must be from 1 to 319, and data\.val_repeats at least 1"):
            Reviews(**wrong)


def test_fixed_reviews_to_compare_with():
    """The grammar's, the same for an opening whatever is held out, and different ones for different openings."""
    assert Reviews().columns == set()
    data, other = Reviews(baseline_reviews=2, val_size=5), Reviews(baseline_reviews=2, val_size=50, seed=3)
    assert data.columns == {"baseline_reviews"}
    fixed = {row["prompt"]: row["baseline_reviews"] for row in data.rows(Stage.TRAIN) + data.rows(Stage.VALIDATE)}
    assert {row["prompt"]: row["baseline_reviews"] for row in other.rows(Stage.TRAIN) + other.rows(Stage.TEST)} == fixed
    texts = [text for pair in fixed.values() for text in pair]
    assert len(texts) == 640
    assert all(map(is_grammatical, texts))
    assert len(set(texts)) > 400
    with pytest.raises(ValueError, match="baseline_reviews must be at least 0, got -1"):
        Reviews(baseline_reviews=-1)


# The warm start


@pytest.fixture
def small(monkeypatch):
    """Six steps on a policy of a few thousand weights."""
    monkeypatch.setattr(reviews, "_TEXTS", 96)
    monkeypatch.setattr(reviews, "_BATCH", 16)
    monkeypatch.setattr(reviews, "_SHAPE", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64})


def files(folder):
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}


def test_the_policy_is_built_once(tmp_path, small, capsys):
    folder = tmp_path / "deep" / "policy"
    random_state = torch.get_rng_state()
    warm_start(str(folder))
    assert torch.equal(torch.get_rng_state(), random_state)  # a run that builds it goes on like one that finds it
    told = capsys.readouterr().out
    before, after = (float(x) for x in told.split("held-out loss ")[1].split(" nats")[0].split(" -> "))
    assert after < before
    assert np.log(len(VOCABULARY)) == pytest.approx(before, abs=0.3)  # knows nothing at first
    built = files(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["policy"]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(range(len(VOCABULARY))) == list(VOCABULARY)
    opening, review = corpus(1)[0]
    assert tokenizer.decode(tokenizer(f"{opening} {review}").input_ids) == f"{opening} {review}"
    assert AutoModelForCausalLM.from_pretrained(folder).config.eos_token_id == tokenizer.eos_token_id

    warm_start(str(folder))
    assert files(folder) == built
    assert capsys.readouterr().out == ""

    torch.manual_seed(7)  # whatever the run's own seed is
    for name, seed in {"again": 0, "other": 1}.items():
        warm_start(str(tmp_path / name), seed)
        weights = (tmp_path / name / "model.safetensors").read_bytes()
        assert (weights == built["model.safetensors"][1]) is (seed == 0)


def test_what_is_there_is_not_written_over(tmp_path, small, monkeypatch):
    foreign = tiny.policy_folder(tmp_path / "foreign")
    before = files(foreign)
    with pytest.raises(ValueError, match="holds something other than this task's warm-started policy; name a new"):
        warm_start(str(foreign))
    assert files(foreign) == before

    own = tmp_path / "own"
    own.mkdir()  # an empty folder is a new one
    warm_start(str(own))
    before = files(own)
    with pytest.raises(ValueError, match="holds something other"):
        warm_start(str(own), seed=1)
    monkeypatch.setattr(reviews, "_TEXTS", 128)  # as after an update of the recipe
    with pytest.raises(ValueError, match="holds something other"):
        warm_start(str(own))
    assert files(own) == before


def test_a_warm_start_that_fails_leaves_no_folder(tmp_path, small, monkeypatch):
    monkeypatch.setattr(json, "dumps", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        warm_start(str(tmp_path / "policy"))
    assert list(tmp_path.iterdir()) == []


def test_a_run_builds_the_policy_that_it_names(tmp_path, small):
    folder = tmp_path / "policy"
    running = trainer(tmp_path, max_steps=1, val_check_interval=1)
    data = Reviews(batch_size=4, val_size=4, val_repeats=1, policy_folder=str(folder))
    running.fit(module(folder), datamodule=data)
    assert (folder / "moa_reviews.json").is_file()
    assert running.global_step == 1


def test_a_misspelt_path_builds_no_other_policy(tmp_path, small, monkeypatch):
    monkeypatch.chdir(tmp_path)
    misspelt = trainer(tmp_path, max_steps=1)
    with pytest.raises(
        ValueError, match=r"'\./reveiws' holds no policy; data class Reviews builds its policy in '\.cache"
    ):
        misspelt.fit(module("./reveiws"), datamodule=Reviews(batch_size=4, val_size=4))
    assert list(tmp_path.iterdir()) == []

    warm_start("./elsewhere")  # one that is there is fine, wherever it lies
    warm_start("./elsewhere", only_in=".cache/moa/reviews")
    warm_start(str(tmp_path / "here"), only_in="./here")
    assert (tmp_path / "here" / "moa_reviews.json").is_file()
