"""What preference rows become, against numbers worked out by hand with a policy of two layers."""

import dataclasses
import math
import random

import pytest
import torch

from moa_lightning.losses import RewardKL
from moa_lightning.models import FrozenCopy, LaggedCopy, Policy, PolicyConfig
from moa_lightning.models.loading import load_model, load_tokenizer
from moa_lightning.rewards import FromLabels, FunctionReward, Objective, RewardPanel
from moa_lightning.sources import Actors, PreferenceRows
from tests.helpers import tiny

# The panel says so once, which one test looks at.
pytestmark = pytest.mark.filterwarnings("ignore:objective '(h|seen)' did not score")

NAN = math.nan
ROWS = [
    {"prompt": "the film was", "responses": ["good", "very very bad", "dull"], "wins/h": [0.9, 0.1, 0.5]},
    {"prompt": "the very long plot and the film", "responses": ["fine and good", "bad"], "wins/h": [NAN, NAN]},
    {"prompt": "dull", "responses": ["bad", "fine", "long and short", "good"], "wins/h": [0.2, NAN, 0.6, 0.7]},
]
SIZES = [3, 2, 4]


def words(prompts, completions, **columns):
    return [float(len(text.split())) for text in completions]


def without_dull(prompts, completions, **columns):
    return [None if text == "dull" else float(len(text)) for text in completions]


OBJECTIVES = {
    "h": Objective(FromLabels("h")),
    "short": Objective(FunctionReward(words), scale=-1.0),
    "seen": Objective(FunctionReward(without_dull), eval_only=True),
}


def move(policy, seed, size=0.05):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.backbone.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def actors(tmp_path):
    """A policy that has moved on from a lagged reference, which has moved on from the policy that was loaded."""
    config = PolicyConfig(str(tiny.policy_folder(tmp_path / "policy", scale=1.0)))
    policy = Policy(load_model(config), load_tokenizer(config)).eval()
    reference = LaggedCopy(1)
    reference.setup(policy)
    encoder = PreferenceRows().encoder(policy.tokenizer, tuple(policy.end_ids), 32)
    kl = RewardKL()
    return Actors(policy, reference, RewardPanel(OBJECTIVES), encoder, kl, kl.init())


def go_on(actors):
    """Two steps of the policy and a refresh after each."""
    for number in (1, 2):
        move(actors.policy, number)
        actors.reference.advance(actors.policy, number)
    move(actors.policy, 3)


def alone(policy, row, response):
    """Log-probability of one response, without batch, padding or any code of this package but the weights."""
    tokenizer = policy.tokenizer
    prompt, tokens = tokenizer(row["prompt"])["input_ids"], [*tokenizer(response)["input_ids"], 1]
    ids = torch.tensor([prompt + tokens])
    with torch.no_grad():
        logprobs = policy.backbone(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(logprobs.gather(1, torch.tensor(tokens).unsqueeze(1)).sum())


def every(policy, rows=ROWS):
    return [alone(policy, row, response) for row in rows for response in row["responses"]]


def softmax(logits):
    return [math.exp(x - max(logits)) / sum(math.exp(y - max(logits)) for y in logits) for x in logits]


def versions(actors):
    """Log-probabilities of all candidates under the policy as loaded, the reference, and the present policy."""
    then = {}
    present = [p.detach().clone() for p in actors.policy.trainable()[0]]
    held = actors.reference.state_dict()["lagged"]
    for name, weights in {"loaded": actors.reference._first, "reference": held, "policy": present}.items():
        with torch.no_grad():
            for parameter, weight in zip(actors.policy.trainable()[0], weights, strict=True):
                parameter.copy_(weight)
        then[name] = every(actors.policy)
    return then


def collect(actors, source=None, rows=ROWS):
    return (source or PreferenceRows()).collect(actors.encoder.encode(rows), actors, seed=0)


def evaluate(actors, source=None, rows=ROWS):
    return (source or PreferenceRows()).evaluate(actors.encoder.encode(rows), actors, seed=0)


def close(tensor, numbers, **tolerances):
    tolerances = tolerances or {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(tensor, torch.tensor(numbers), equal_nan=True, **tolerances)


def test_responses_are_the_datas_with_their_end_token(actors):
    experience = collect(actors)
    responses = experience.responses
    tokenizer = actors.policy.tokenizer
    texts = [response for row in ROWS for response in row["responses"]]
    assert responses.completions == texts
    assert experience.group_B.tolist() == [0] * 3 + [1] * 2 + [2] * 4
    for i, text in enumerate(texts):
        row = ROWS[experience.group_B[i]]
        real = responses.input_ids_BL[i][responses.attention_mask_BL[i].bool()].tolist()
        assert real == [*tokenizer(row["prompt"])["input_ids"], *tokenizer(text)["input_ids"], 1]
        assert int(responses.lengths_B[i]) == len(text.split()) + 1
    assert not responses.truncated_B.any()
    close(experience.behaviour_logprobs_BT.sum(1), every(actors.policy))
    assert (experience.behaviour_logprobs_BT[~experience.responses.mask_BT] == 0).all()


def test_labels_are_taken_and_scores_become_wins(actors):
    experience = collect(actors, PreferenceRows(win_scale=2.0))
    expected = []
    for row in ROWS:
        lengths = [len(text.split()) for text in row["responses"]]
        for i, label in enumerate(row["wins/h"]):
            others = [1 / (1 + math.exp((lengths[i] - n) / 2.0)) for j, n in enumerate(lengths) if j != i]
            expected.append([label, sum(others) / len(others)])
    close(experience.wins_BN, expected)  # the objective that is only watched is not among them
    wins_BN = torch.tensor(expected)
    assert torch.equal(experience.valid_BN, wins_BN.isfinite())
    advantages = (wins_BN - 0.5).nan_to_num(0).unsqueeze(1) * experience.responses.mask_BT.unsqueeze(-1)
    torch.testing.assert_close(experience.advantages_BTN, advantages)
    assert experience.rewards.names == ("h", "short", "seen")
    assert experience.rewards.trained == (True, True, False)
    close(experience.rewards.value_BN[:3, 1], [-1.0, -3.0, -1.0])
    assert experience.values_BTN is experience.returns_BTN is None


def test_a_candidate_without_any_label_is_not_trained_on(actors):
    labels_alone = dataclasses.replace(actors, panel=RewardPanel({"h": OBJECTIVES["h"]}))
    with pytest.warns(UserWarning, match="'h' did not score 3 of 9"):
        experience = collect(labels_alone)
    known = torch.tensor([True] * 3 + [False] * 2 + [True, False, True, True])
    assert torch.equal(experience.mask_BT.any(1), known)
    trained = sum(len(t.split()) + 1 for r in ROWS for t, w in zip(r["responses"], r["wins/h"], strict=True) if w == w)
    assert experience.tokens_per_row == pytest.approx(trained / 9)
    assert experience.tokens == sum(len(t.split()) + 1 for r in ROWS for t in r["responses"])
    assert experience.sequences == 9
    assert experience.kl is None
    assert experience.metrics == {}


@pytest.mark.parametrize(("prior", "before"), [("sampled", None), ("listed", "loaded")])
def test_the_prior_before_the_reference_has_moved(actors, prior, before):
    move(actors.policy, 1)
    log_prior_B = collect(actors, PreferenceRows(prior=prior)).log_prior_B
    if before is None:
        assert log_prior_B is None
    else:
        with torch.no_grad():
            for parameter, weight in zip(actors.policy.trainable()[0], actors.reference._first, strict=True):
                parameter.copy_(weight)
        close(log_prior_B, every(actors.policy))


def test_the_prior_is_the_ratio_of_reference_and_loaded_policy(actors):
    go_on(actors)
    limit = 0.2
    free, held, listed = (
        collect(actors, source).log_prior_B
        for source in (PreferenceRows(), PreferenceRows(max_log_ratio=limit), PreferenceRows(prior="listed"))
    )
    then = versions(actors)
    ratios = [a - b for a, b in zip(then["reference"], then["loaded"], strict=True)]
    assert free.min() < -limit and free.max() > limit and (free.abs() < limit).any(), free
    start = 0
    for size in SIZES:  # only differences among a prompt's candidates count
        rows = slice(start, start + size)
        mean = sum(ratios[rows]) / size
        close(free[rows], [r - mean for r in ratios[rows]])
        close(held[rows], [min(max(r - mean, -limit), limit) for r in ratios[rows]])
        start += size
    close(listed, then["reference"])


@pytest.mark.parametrize("prior", ["sampled", "listed"])
@pytest.mark.parametrize("lagged", [True, False])
def test_evaluation_is_the_win_probability_of_the_policys_choice(actors, prior, lagged):
    if not lagged:
        reference = FrozenCopy()
        reference.setup(actors.policy)
        actors = dataclasses.replace(actors, reference=reference)
        loaded = every(actors.policy)
        move(actors.policy, 1)
    else:
        go_on(actors)
    evaluation = evaluate(actors, PreferenceRows(prior=prior))
    wins_BN = [[*row] for row in collect(actors).wins_BN.tolist()]
    policy = every(actors.policy)
    loaded = loaded if not lagged else versions(actors)["loaded"]
    ratio = [a - b for a, b in zip(policy, loaded, strict=True)]
    start, table, kl, best = 0, [], [], []
    for row, size in zip(ROWS, SIZES, strict=True):
        own = slice(start, start + size)
        weights = softmax((ratio if prior == "sampled" else policy)[own])
        # The policy's value among the others alone would lie nearer to 1/2: without all labels there is none.
        line = [sum(w * p[n] for w, p in zip(weights, wins_BN[own], strict=True)) for n in (0, 1)]
        table.append(line)
        kl.append(sum(w * r for w, r in zip(weights, ratio[own], strict=True)))
        best.append(row["responses"][weights.index(max(weights))])
        start += size
    close(evaluation.rewards.raw_BN[:, :2], table)
    close(evaluation.kl_B, kl)
    assert evaluation.responses.completions == best
    assert evaluation.responses.prompts == [row["prompt"] for row in ROWS]
    assert evaluation.rewards.names == ("h", "short", "seen")
    assert max(abs(p - 0.5) for _, p in table) > 0.001, "the policy has not moved enough for this test"
    assert [p == p for p, _ in table] == [True, False, False]
    close(collect(actors, PreferenceRows(prior=prior)).log_policy_B, ratio if prior == "sampled" else policy)


def test_the_loaded_policy_wins_half(actors):
    rows = [{**ROWS[0], "wins/h": [0.75, 0.25, 0.5]}, {**ROWS[1], "wins/h": [0.9, 0.1]}]
    evaluation = evaluate(actors, rows=rows)
    close(evaluation.rewards.raw_BN[:, :2], [[0.5, 0.5], [0.5, 0.5]])
    close(evaluation.kl_B, [0.0, 0.0])


def test_neither_order_nor_company_changes_anything(actors):
    go_on(actors)
    whole = collect(actors)
    evaluated = evaluate(actors)
    start = 0
    for number, row in enumerate(ROWS):
        size = SIZES[number]
        rows = torch.arange(start, start + size)
        order = random.Random(number).sample(range(size), size)
        shuffled = {**row, **{name: [row[name][i] for i in order] for name in ("responses", "wins/h")}}
        single = collect(actors, rows=[shuffled])
        picked = rows[order]
        for field in ("wins_BN", "log_prior_B"):
            torch.testing.assert_close(
                getattr(single, field), getattr(whole, field)[picked], equal_nan=True, rtol=1e-4, atol=1e-5
            )
        for field in ("behaviour_logprobs_BT", "reference_logprobs_BT"):
            torch.testing.assert_close(
                getattr(single, field).sum(1), getattr(whole, field)[picked].sum(1), rtol=1e-4, atol=1e-5
            )
        again = evaluate(actors, rows=[shuffled])
        torch.testing.assert_close(
            again.rewards.raw_BN[0], evaluated.rewards.raw_BN[number], equal_nan=True, rtol=1e-4, atol=1e-5
        )
        assert again.responses.completions == [evaluated.responses.completions[number]]
        start += size


def test_nothing_is_left_behind(actors):
    """An evaluation changes neither the mode nor the weights, and draws no random numbers."""
    go_on(actors)
    actors.policy.train()
    before = [p.clone() for p in actors.policy.parameters()], torch.get_rng_state()
    evaluation = evaluate(actors)
    assert actors.policy.training
    assert not evaluation.kl_B.requires_grad
    torch.testing.assert_close(([*actors.policy.parameters()], torch.get_rng_state()), before, rtol=0, atol=0)


def test_dropout_plays_no_part(tmp_path, actors):
    noisy = tiny.gpt2_config(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    config = PolicyConfig(str(tiny.policy_folder(tmp_path / "noisy", noisy)), disable_dropout=False)
    policy = Policy(load_model(config), load_tokenizer(config)).train()
    reference = LaggedCopy(1)
    reference.setup(policy)
    actors = dataclasses.replace(actors, policy=policy, reference=reference)
    go_on(actors)
    for of in (lambda: evaluate(actors).rewards.raw_BN, lambda: collect(actors).log_prior_B):
        torch.testing.assert_close(of(), of(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_response_length": 1}, r"source\.max_response_length must be at least 2 \(a token and the end\), got 1"),
        ({"win_scale": 0.0}, r"source\.win_scale must be above 0, got 0\.0"),
        ({"max_log_ratio": NAN}, r"source\.max_log_ratio must be above 0, got nan"),
        ({"max_prompt_length": -3}, r"source\.max_prompt_length must be at least 1 or null, got -3"),
    ],
)
def test_fields_out_of_range(settings, says):
    with pytest.raises(ValueError, match=says):
        PreferenceRows(**settings)


def test_a_label_stays_a_probability():
    turned = Objective(FromLabels("h"), scale=-1.0, shift=1.0)
    close(turned.value(torch.tensor([0.2, NAN])), [0.8, NAN])
    for changes in ({"scale": -1.0}, {"scale": 2.0}, {"shift": 0.1}):
        with pytest.raises(ValueError, match=r"FromLabels gives win probabilities, which scale .* out of \[0, 1\]"):
            Objective(FromLabels("h"), **changes)
