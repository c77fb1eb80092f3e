"""What a rollout puts where, checked on a policy whose responses are known."""

import dataclasses
import math

import pytest
import torch

from moa_lightning.combiners import Combined
from moa_lightning.functional import bradley_terry_wins
from moa_lightning.losses import ClippedSurrogate, LossKL, RewardKL
from moa_lightning.models import Encoder, FrozenCopy, Policy, PolicyConfig, ValueHeads
from moa_lightning.models.loading import load_model, load_tokenizer
from moa_lightning.rewards import FunctionReward, Objective, PairwisePreference, RewardPanel, WinProbability
from moa_lightning.signals import ClipRange
from moa_lightning.sources import GAE, Actors, GroupRelative, Rollout
from moa_lightning.sources.advantages import standardize
from tests.helpers import tiny


def words(prompts, completions, **columns):
    return [float(len(c.split())) for c in completions]


def minus_words(prompts, completions, **columns):
    return [-float(len(c.split())) for c in completions]


@pytest.fixture
def actors(tmp_path):
    config = PolicyConfig(str(tiny.policy_folder(tmp_path / "policy", scale=1.0)))
    policy = Policy(load_model(config), load_tokenizer(config), ValueHeads(32, ["up", "down"]))
    torch.nn.init.normal_(policy.value_heads.linear.weight)
    reference = FrozenCopy()
    reference.setup(policy)
    with torch.no_grad():
        for parameter in policy.backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    panel = RewardPanel({"up": Objective(FunctionReward(words)), "down": Objective(FunctionReward(minus_words))})
    encoder = Encoder(policy.tokenizer, tuple(policy.end_ids), 32, 8)
    kl = RewardKL(0.5, target=None)
    return Actors(policy, reference, panel, encoder, kl, kl.init())


ROWS = [{"prompt": "the film was", "id": 7}, {"prompt": "very", "id": 8}] * 8


def test_rewards_arrive_on_the_last_real_token(actors):
    source = Rollout(max_new_tokens=8, advantages=GAE(lam=1.0, standardize=False))
    experience = source.collect(actors.encoder.encode(ROWS), actors, seed=1)
    responses = experience.responses
    lengths = responses.lengths_B
    assert len(set(lengths.tolist())) > 2
    # With lambda 1 and gamma 1, advantage + value is the sum of the rewards from here on.
    kl_BT = experience.behaviour_logprobs_BT - experience.reference_logprobs_BT
    for row in range(len(ROWS)):
        n = int(lengths[row])
        count = len(responses.completions[row].split())
        for i, reward in enumerate((count, -count)):
            to_come = reward - 0.5 * kl_BT[row, :n].flip(0).cumsum(0).flip(0)
            torch.testing.assert_close(experience.returns_BTN[row, :n, i], to_come, rtol=1e-4, atol=1e-4)
        assert (experience.advantages_BTN[row, n:] == 0).all()
    assert responses.columns["id"] == [7, 8] * 8


def test_the_mask_ends_with_the_end_token(actors):
    experience = Rollout(max_new_tokens=8).collect(actors.encoder.encode(ROWS), actors, seed=1)
    responses = experience.responses
    tokens_BT = responses.input_ids_BL[:, responses.prompt_length :]
    for row in range(len(ROWS)):
        real = tokens_BT[row][responses.mask_BT[row]].tolist()
        assert (real[-1] == 1) != bool(responses.truncated_B[row])
        assert 1 not in real[:-1]
        assert len(real) == 8 or real[-1] == 1


def test_the_same_seed_gives_the_same_responses_and_leaves_the_generator_alone(actors):
    source, batch = Rollout(max_new_tokens=8), actors.encoder.encode(ROWS)
    before = torch.get_rng_state()
    first, second, other = (source.collect(batch, actors, seed=s).responses.input_ids_BL for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert first.shape != other.shape or not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_several_responses_to_a_prompt_stand_together(actors):
    source = Rollout(max_new_tokens=8, num_generations=4, advantages=GroupRelative(standardize=False))
    experience = source.collect(actors.encoder.encode(ROWS[:2]), actors, seed=1)
    assert experience.responses.prompts == ["the film was"] * 4 + ["very"] * 4
    assert experience.returns_BTN is None
    first_token_BN = experience.advantages_BTN[:, 0]
    torch.testing.assert_close(first_token_BN[:4].sum(0), torch.zeros(2), rtol=0, atol=1e-4)


def test_sampling_follows_top_k_and_temperature(actors):
    batch = actors.encoder.encode(ROWS)
    greedy = [Rollout(max_new_tokens=8, top_k=1).collect(batch, actors, seed=s).responses.input_ids_BL for s in (1, 2)]
    assert torch.equal(*greedy)
    cold = Rollout(max_new_tokens=8, temperature=1e-3).collect(batch, actors, seed=1)
    width = min(cold.responses.input_ids_BL.shape[1], greedy[0].shape[1])
    assert torch.equal(cold.responses.input_ids_BL[:, :width], greedy[0][:, :width])
    chosen = cold.behaviour_logprobs_BT[cold.responses.mask_BT]
    assert (chosen > -0.1).all()  # log-probabilities are those of the tempered distribution


def test_a_huge_divergence_stays_finite(actors):
    with torch.no_grad():  # a policy that is certain of what its reference thinks impossible
        actors.policy.causal_lm.transformer.ln_f.weight.mul_(1e4)
    for kl in (RewardKL(0.5), LossKL(0.5)):
        those = Actors(actors.policy, actors.reference, actors.panel, actors.encoder, kl, kl.init())
        source = Rollout(max_new_tokens=8)
        experience = source.collect(actors.encoder.encode(ROWS), those, seed=1)
        responses = experience.responses
        output = actors.policy(responses.input_ids_BL, responses.attention_mask_BL, responses.mask_BT)
        combined = Combined(experience.advantages_BTN[..., 0], torch.ones(2))
        result = ClippedSurrogate()(combined, experience, output, kl)
        result.loss.backward()
        assert torch.isfinite(result.loss)
        assert all(torch.isfinite(p.grad).all() for p in actors.policy.parameters() if p.grad is not None)
        actors.policy.zero_grad()


def test_the_gram_matrix_of_a_rollout_is_that_of_the_hidden_state(actors):
    source = Rollout(max_new_tokens=8)
    experience = source.collect(actors.encoder.encode(ROWS), actors, seed=1)
    responses = experience.responses
    output = actors.policy(responses.input_ids_BL, responses.attention_mask_BL, responses.mask_BT)
    signals = source.signals(experience, output, ClipRange(0.2, 0.2))
    slopes_BTN = signals.advantages_BTN
    gradients = [
        torch.autograd.grad((output.logprobs_BT * slopes_BTN[..., i]).sum(), output.hidden_BTD, retain_graph=True)[0]
        for i in range(2)
    ]
    stacked = torch.stack([g.flatten() for g in gradients])
    torch.testing.assert_close(signals.gramian(slopes_BTN), stacked @ stacked.T, rtol=1e-3, atol=1e-4)


def test_a_constant_objective_has_no_advantage():
    values = torch.full((4, 5, 2), 1000.1)
    values[..., 1] = torch.randn(4, 5)
    mask = torch.ones(4, 5, 1, dtype=torch.bool)
    standard = standardize(values, mask)
    assert standard[..., 0].abs().max() < 0.01
    assert standard[..., 1].std(correction=0) == pytest.approx(1, abs=1e-3)


def test_wins_carry_the_ratio_of_the_reference_to_the_policy_that_sampled(actors):
    source = Rollout(max_new_tokens=8, num_generations=4, win_scale=2.0, max_log_ratio=0.1)
    batch = actors.encoder.encode(ROWS[:4])
    experience = source.collect(batch, actors, seed=1)
    ratio_PK = (experience.reference_logprobs_BT - experience.behaviour_logprobs_BT).sum(1).view(4, 4)
    centred_PK = ratio_PK - ratio_PK.mean(1, keepdim=True)
    torch.testing.assert_close(experience.log_prior_B.view(4, 4), centred_PK.clamp(-0.1, 0.1))
    cut = float((centred_PK.abs() > 0.1).float().mean())
    assert 0 < cut < 1
    assert experience.metrics["prior_truncated"] == pytest.approx(cut)
    weights_PK = centred_PK.clamp(-0.1, 0.1).softmax(1)
    assert experience.metrics["prior_ess"] == pytest.approx(float((1 / weights_PK.square().sum(1) / 4).mean()))


def test_a_truncated_response_is_penalised_in_its_wins_too(actors):
    plain, penalised = (
        Rollout(max_new_tokens=2, num_generations=4, missing_eos_penalty=p).collect(
            actors.encoder.encode(ROWS), actors, seed=1
        )
        for p in (None, 1000.0)
    )
    truncated_B = penalised.responses.truncated_B
    mixed_B = truncated_B.view(-1, 4).any(1).logical_and(~truncated_B.view(-1, 4).all(1)).repeat_interleave(4)
    assert mixed_B.any()
    assert not torch.equal(plain.wins_BN[mixed_B], penalised.wins_BN[mixed_B])
    # A finished response wins against every truncated one.
    finished_B = mixed_B & ~truncated_B
    rivals_B = truncated_B.view(-1, 4).sum(1).repeat_interleave(4)
    assert (penalised.wins_BN[finished_B].min(1).values >= rivals_B[finished_B] / 3 - 1e-6).all()


def test_scores_of_whole_responses_know_the_penalty_and_the_kl_charge(actors):
    source = Rollout(max_new_tokens=4, num_generations=2, missing_eos_penalty=0.25, advantages=GroupRelative())
    experience = source.collect(actors.encoder.encode(ROWS), actors, seed=1)
    truncated_B = experience.responses.truncated_B
    assert truncated_B.any()
    assert not truncated_B.all()
    expected_BN = experience.rewards.trained_BN - 0.25 * truncated_B.unsqueeze(1)
    torch.testing.assert_close(experience.scores_BN, expected_BN)
    kl_BT = experience.behaviour_logprobs_BT - experience.reference_logprobs_BT
    torch.testing.assert_close(experience.kl_penalty_B, 0.5 * kl_BT.sum(1))
    # Together they are what each objective's advantages are made of.
    total_BN = experience.scores_BN - experience.kl_penalty_B.unsqueeze(1)
    plain_BN = GroupRelative().estimate(
        total_BN.unsqueeze(1), None, torch.ones(len(total_BN), 1, dtype=torch.bool), experience.valid_BN, 2
    )[0][:, 0]
    torch.testing.assert_close(experience.advantages_BTN[:, 0], plain_BN, rtol=1e-4, atol=1e-5)
    assert torch.equal(experience.select(torch.tensor([3])).scores_BN, experience.scores_BN[[3]])


def test_what_knows_which_win_probabilities_move_with_the_policy(actors):
    """Against fixed responses, or among the prompt's own: then a policy's mean is .5, whatever it is worth."""

    def longer(prompts, completions):
        return [0.5 + 0.25 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in completions]

    rewards = {
        "among": PairwisePreference(longer),
        "score": FunctionReward(words),
        "fixed": PairwisePreference(longer, baseline="old"),
        "wins": WinProbability(FunctionReward(words), baseline="old"),
    }
    panel = RewardPanel({name: Objective(reward) for name, reward in rewards.items()})
    rows = [row | {"old": "one two three"} for row in ROWS[:2]]
    those = dataclasses.replace(actors, panel=panel)
    experience = Rollout(max_new_tokens=8, num_generations=3, advantages=GroupRelative()).collect(
        actors.encoder.encode(rows), those, seed=1
    )
    assert experience.moving_BN.tolist() == [[True, True, False, False]] * 6
    assert experience.log_policy_B.tolist() == [0.0] * 6
    torch.testing.assert_close(experience.wins_BN[:, :2].mean(0), torch.full((2,), 0.5))
    torch.testing.assert_close(experience.wins_BN[:, 2:], experience.rewards.trained_BN[:, 2:])
    alone = Rollout(max_new_tokens=8).collect(actors.encoder.encode(rows), actors, seed=1)
    assert alone.log_policy_B is None


def test_a_preference_models_probabilities_are_the_wins(actors):
    def longer(prompts, completions):
        return [0.5 + 0.25 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in completions]

    panel = RewardPanel({"judged": Objective(PairwisePreference(longer)), "up": Objective(FunctionReward(words))})
    those = dataclasses.replace(actors, panel=panel)
    experience = Rollout(max_new_tokens=8, num_generations=3).collect(actors.encoder.encode(ROWS[:2]), those, seed=1)
    for prompt in range(2):
        texts = experience.responses.completions[3 * prompt : 3 * prompt + 3]
        for i in range(3):
            beaten = [0.5 + 0.25 * ((len(texts[i]) > len(o)) - (len(texts[i]) < len(o))) for o in texts]
            expected = (sum(beaten) - 0.5) / 2
            assert float(experience.wins_BN[3 * prompt + i, 0]) == pytest.approx(expected)
    scores_PKN = experience.rewards.trained_BN[:, 1:].view(2, 3, 1)
    torch.testing.assert_close(experience.wins_BN[:, 1], bradley_terry_wins(scores_PKN).flatten())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temperature": 0.0}, r"source\.temperature must be a finite number above 0 .*, got 0\.0"),
        ({"temperature": math.nan}, "source.temperature must be a finite number above 0 .*, got nan"),
        ({"temperature": math.inf}, "source.temperature must be a finite number above 0 .*, got inf"),
        ({"top_p": math.nan}, r"source\.top_p must lie in \(0, 1\], got nan"),
        ({"top_k": -1}, "source.top_k must be at least 0, got -1"),
        ({"win_scale": math.nan}, "source.win_scale must be above 0, got nan"),
        ({"max_log_ratio": 0.0}, r"source\.max_log_ratio must be above 0, got 0\.0"),
        ({"missing_eos_penalty": math.nan}, "source.missing_eos_penalty must be a finite number or null, got nan"),
        ({"max_prompt_length": 0}, "source.max_prompt_length must be at least 1 or null, got 0"),
        ({"num_generations": 0}, "source.num_generations must be at least 1, got 0"),
    ],
)
def test_fields_out_of_range(fields, says):
    with pytest.raises(ValueError, match=says):
        Rollout(**fields)
