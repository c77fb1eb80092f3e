"""Chat data whose turns end with another token than the tokenizer's: what is trained, sampled and scored."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bench.peers.chat_dpo import BETA, ROWS, TEMPLATES, chat_model, chat_tokenizer
from moa_lightning.chat import end_tokens
from moa_lightning.combiners import Linear
from moa_lightning.losses import PairwiseLogistic, RewardKL
from moa_lightning.models import FrozenCopy, Policy
from moa_lightning.rewards import FromLabels, ImplicitReward, Objective, RewardPanel
from moa_lightning.sources import Actors, PreferenceRows, Rollout

LABELLED = [{"prompt": row["prompt"], "responses": row["answers"], "wins/h": [1.0, 0.0]} for row in ROWS]

# Printed by `python -m bench.peers.chat_dpo` under TRL 1.16.0, torch 2.13.0 and transformers 5.23.0 on a CPU.
TRL = {
    ("newline", "sigmoid"): 0.80197716,
    ("newline", "ipo"): 3.61906624,
    ("newline", "sigmoid_norm"): 0.72136354,
    ("bare", "sigmoid"): 0.67178172,
    ("bare", "ipo"): 2.48664951,
    ("bare", "sigmoid_norm"): 0.67567825,
}


def actors(template):
    tokenizer = chat_tokenizer(template)
    tokenizer.padding_side = "left"
    policy = Policy(chat_model(0.0), tokenizer).eval()
    reference = FrozenCopy()
    reference.setup(Policy(chat_model(math.pi / 5), tokenizer))
    kl = RewardKL()
    encoder = PreferenceRows().encoder(tokenizer, tuple(policy.end_ids), 64)
    return Actors(policy, reference, RewardPanel({"h": Objective(FromLabels("h"))}), encoder, kl, kl.init())


def dpo(template, loss):
    """The loss of one minibatch that holds all rows, by the way that training takes."""
    they, source, combiner = actors(template), PreferenceRows(), Linear()
    experience = source.collect(they.encoder.encode(LABELLED), they, seed=0)
    responses = experience.responses
    output = they.policy(responses.input_ids_BL, responses.attention_mask_BL, responses.mask_BT)
    signals = source.signals(experience, output, loss.clip_range)
    combined = combiner.combine(signals, combiner.init(["h"], torch.ones(1)))
    return float(loss(combined, experience, output, they.kl).loss.detach())


@pytest.mark.parametrize("template", list(TEMPLATES))
@pytest.mark.parametrize(
    ("trls", "loss"),
    [
        ("sigmoid", PairwiseLogistic(BETA)),
        ("ipo", PairwiseLogistic(BETA, "ipo", average_log_prob=True)),
        ("sigmoid_norm", PairwiseLogistic(BETA, "sigmoid", average_log_prob=True)),
    ],
)
def test_the_loss_is_trls(template, trls, loss):
    assert dpo(template, loss) == pytest.approx(TRL[template, trls], abs=1e-6)


def test_sampling_stops_at_the_end_of_a_turn():
    they = actors("newline")
    tokenizer, policy = they.policy.tokenizer, they.policy
    good, end, newline = tokenizer.convert_tokens_to_ids(["good", "<|end|>", "\n"])
    head = torch.nn.Linear(32, len(tokenizer))  # good, the end of a turn and a newline are equally likely; nothing else
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-1e4)[[good, end, newline]] = 0.0
    policy.causal_lm.set_output_embeddings(head)
    batch = they.encoder.encode(LABELLED * 8)
    responses = Rollout(max_new_tokens=40)._respond(batch, they, seed=0, count=1)
    assert not responses.truncated_B.any()
    for ids, mask, text in zip(
        responses.input_ids_BL[:, batch.input_ids_BP.shape[1] :], responses.mask_BT, responses.completions, strict=True
    ):
        said = ids[mask].tolist()
        assert said.count(end) == 1 and said[-1] == end
        assert (ids[~mask] == tokenizer.pad_token_id).all(), "nothing is sampled behind it"
        assert text.count("good") == said.count(good) and "<|end|>" not in text
    assert responses.lengths_B.max() > 3


def test_the_end_of_a_turn_is_no_part_of_the_text_even_if_it_is_no_special_token():
    tokenizer = chat_tokenizer("bare")
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m.content }}\n{% endfor %}".replace("\n", " . ")
    encoder = PreferenceRows().encoder(tokenizer, tuple(end_tokens(tokenizer)), 64)
    batch = encoder.encode(LABELLED[:1])
    sampled_BT = torch.tensor([tokenizer.convert_tokens_to_ids(["good", "film", ".", "<pad>"])])
    assert encoder.decode(batch, torch.cat([batch.input_ids_BP, sampled_BT], 1)).completions == ["good film"]


def test_the_reward_in_a_dpo_adapter_reads_the_end_that_dpo_trained(tmp_path):
    tokenizer = chat_tokenizer("newline")
    chat_model(0.0).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    reward = ImplicitReward(str(tmp_path / "adapter"))
    reward.check(set())
    encoder = PreferenceRows().encoder(tokenizer, tuple(end_tokens(tokenizer)), 64)
    for row in LABELLED:
        for answer in row["responses"]:
            text = encoder.response_tokens(row["prompt"], answer)
            read = encoder.tokens(row["prompt"])
            assert reward._tokens(encoder.render(row["prompt"]), answer) == ([*read, *text], len(read))
    eos = tokenizer.eos_token_id
    assert reward._tokens("the film was", "good")[0][-1] == eos, "plain text"
