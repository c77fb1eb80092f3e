import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, GenerationConfig, GraniteConfig

from moa_lightning.models import LoRA, Policy, PolicyConfig, ValueHeads
from moa_lightning.models.loading import load_model, load_tokenizer
from tests.helpers import tiny

ARCHITECTURES = {
    "gpt2": tiny.gpt2_config(),
    "llama": tiny.llama_config(),
    "gemma2": Gemma2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        vocab_size=len(tiny.VOCABULARY),
        final_logit_softcapping=2.0,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    ),
    "granite": GraniteConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        vocab_size=len(tiny.VOCABULARY),
        logits_scaling=4.0,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    ),
}


def load(path, lora=None, heads=("a", "b"), **options):
    config = PolicyConfig(str(path), lora=lora, **options)
    model = load_model(config)
    return Policy(model, load_tokenizer(config), ValueHeads(model.config.hidden_size, heads))


@pytest.fixture(params=ARCHITECTURES)
def folder(request, tmp_path):
    return tiny.policy_folder(tmp_path / "policy", ARCHITECTURES[request.param])


@pytest.fixture
def gpt2(tmp_path):
    return tiny.policy_folder(tmp_path / "policy")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_those_of_transformers(folder, temperature):
    policy = load(folder).eval()
    policy.check_logits()
    ids_BL, attention_BL, mask_BT = tiny.padded_batch()
    output = policy(ids_BL, attention_BL, mask_BT, temperature)
    for row in range(len(ids_BL)):  # one by one and without padding, as transformers alone would do it
        real = ids_BL[row][attention_BL[row].bool()].unsqueeze(0)
        count = int(mask_BT[row].sum())
        logits = policy.causal_lm(real).logits[0, -count - 1 : -1].float() / temperature
        expected = logits.log_softmax(-1)
        chosen = expected.gather(-1, real[0, -count:].unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(output.logprobs_BT[row, :count], chosen, rtol=1e-4, atol=1e-5)
        entropy = -(expected.exp() * expected).sum(-1)
        torch.testing.assert_close(output.entropy_BT[row, :count], entropy, rtol=1e-4, atol=1e-5)
    assert (output.logprobs_BT[~mask_BT] == 0).all()


def test_left_padding_changes_nothing(folder):
    policy = load(folder).eval()
    torch.nn.init.normal_(policy.value_heads.linear.weight)
    ids_BL, attention_BL, mask_BT = tiny.padded_batch()
    output = policy(ids_BL, attention_BL, mask_BT)
    zeros = torch.zeros(len(ids_BL), 7, dtype=ids_BL.dtype)
    wider = policy(torch.cat([zeros, ids_BL], 1), torch.cat([zeros, attention_BL], 1), mask_BT)
    torch.testing.assert_close(wider.logprobs_BT, output.logprobs_BT, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wider.values_BTN[mask_BT], output.values_BTN[mask_BT], rtol=1e-4, atol=1e-5)


def test_an_unknown_scaling_of_the_logits_is_refused(gpt2):
    policy = load(gpt2)
    model = policy.causal_lm
    plain = type(model).forward

    class Scaled(type(model)):
        def forward(self, *args, **kwargs):
            output = plain(self, *args, **kwargs)
            output.logits = output.logits * 3
            return output

    model.__class__ = Scaled
    with pytest.raises(ValueError, match="changes its logits"):
        policy.check_logits()


def test_the_whole_log_softmax_is_never_materialised(gpt2):
    """No tensor with as many elements as all tokens times the vocabulary appears, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from moa_lightning.functional import token_logprobs

    tokens, vocabulary, hidden_size = 64, 500, 8
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    hidden = torch.randn(4, tokens // 4, hidden_size, requires_grad=True)
    ids, mask = torch.randint(vocabulary, (4, tokens // 4)), torch.ones(4, tokens // 4, dtype=torch.bool)
    with Watch():
        logprobs, entropy = token_logprobs(hidden, lambda h: h @ weight.T, ids, mask, chunk_size=8)
        (logprobs.sum() + entropy.sum()).backward()
    assert largest < tokens * vocabulary / 2
    chunked = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    whole = (hidden @ weight.T).log_softmax(-1)
    (whole.gather(-1, ids.unsqueeze(-1)).sum() - (whole.exp() * whole).sum()).backward()
    torch.testing.assert_close(chunked, (hidden.grad, weight.grad), rtol=1e-4, atol=1e-4)


def test_value_heads_are_saved_and_restored_by_name(gpt2, tmp_path):
    policy = load(gpt2)
    assert not policy.value_heads.linear.weight.any()
    torch.nn.init.normal_(policy.value_heads.linear.weight)
    torch.nn.init.normal_(policy.value_heads.linear.bias)
    policy.save_pretrained(tmp_path / "saved")
    other = load(tmp_path / "saved", heads=("b", "a"))
    assert other.value_heads.restore(tmp_path / "saved")
    torch.testing.assert_close(other.value_heads.linear.weight.flip(0), policy.value_heads.linear.weight)
    torch.testing.assert_close(other.value_heads.linear.bias.flip(0), policy.value_heads.linear.bias)
    with pytest.raises(ValueError, match="value heads for a, b, not for a, c"):
        ValueHeads(32, ["a", "c"]).restore(tmp_path / "saved")
    with pytest.raises(ValueError, match="hidden size 32"):
        ValueHeads(16, ["a", "b"]).restore(tmp_path / "saved")
    assert not ValueHeads(32, ["a"]).restore(gpt2)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_an_adapter_is_saved_alone_and_opens_with_peft(architecture, tmp_path):
    from peft import AutoPeftModelForCausalLM

    folder = tiny.policy_folder(tmp_path / "policy", ARCHITECTURES[architecture])
    policy = load(folder, LoRA(r=2)).eval()
    ids_BL, attention_BL, mask_BT = tiny.padded_batch()
    with torch.no_grad():
        for name, parameter in policy.backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    plain = load(folder).eval()(ids_BL, attention_BL, mask_BT).logprobs_BT
    adapted = policy(ids_BL, attention_BL, mask_BT).logprobs_BT
    assert (adapted - plain).abs().max() > 0.01
    with policy.adapter_off():
        torch.testing.assert_close(policy(ids_BL, attention_BL, mask_BT).logprobs_BT, plain, rtol=0, atol=0)

    policy.save_pretrained(tmp_path / "saved")
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    reopened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    theirs = reopened(ids_BL, attention_mask=attention_BL).logits
    assert torch.equal(theirs, policy.backbone(ids_BL, attention_mask=attention_BL).logits)
    merged = policy.backbone.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(ids_BL, attention_mask=attention_BL).logits, theirs, rtol=1e-4, atol=1e-4)


def test_only_the_adapter_and_the_heads_are_trained(gpt2):
    backbone, heads = load(gpt2, LoRA(r=2)).trainable()
    assert 0 < sum(p.numel() for p in backbone) < 5000
    assert len(heads) == 2


def test_dropout_is_off_by_default(tmp_path):
    folder = tiny.policy_folder(tmp_path / "policy", tiny.gpt2_config(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5))
    ids_BL, attention_BL, mask_BT = tiny.padded_batch()
    policy = load(folder).train()
    first, second = (policy(ids_BL, attention_BL, mask_BT).logprobs_BT for _ in range(2))
    assert torch.equal(first, second)
    noisy = load(folder, disable_dropout=False).train()
    first, second = (noisy(ids_BL, attention_BL, mask_BT).logprobs_BT for _ in range(2))
    assert not torch.equal(first, second)


def test_gradient_checkpointing_gives_the_same_gradients(gpt2):
    ids_BL, attention_BL, mask_BT = tiny.padded_batch()
    gradients = []
    for checkpointing in (False, True):
        policy = load(gpt2, gradient_checkpointing=checkpointing).train()
        policy(ids_BL, attention_BL, mask_BT).logprobs_BT.sum().backward()
        gradients.append([p.grad for p in policy.backbone.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "folder './nowhere' does not exist"),
        ("no-such/model", "does not open as a model config"),
    ],
)
def test_a_wrong_path_is_one_clear_line(path, message):
    from moa_lightning.models.loading import load_config

    with pytest.raises(ValueError, match=message) as caught:
        load_config(PolicyConfig(path))
    assert "\n" not in str(caught.value)


def test_quantisation_needs_an_adapter(gpt2):
    with pytest.raises(ValueError, match="quantization needs"):
        load_model(PolicyConfig(str(gpt2), quantization={"load_in_4bit": True}))


@pytest.mark.parametrize("quantization", [None, {"load_in_4bit": True}])
def test_training_goes_on_from_a_saved_adapter(tmp_path, quantization):
    from moa_lightning.models.loading import load_config

    folder = tiny.policy_folder(tmp_path / "llama", tiny.llama_config(hidden_size=64, intermediate_size=128), scale=1.0)
    policy = load(folder, LoRA(r=2, lora_dropout=0.3))
    with torch.no_grad():
        for parameter in policy.trainable()[0]:
            parameter.normal_(std=0.1)
    saved = {name: p.detach().clone() for name, p in policy.backbone.named_parameters() if p.requires_grad}
    policy.save_pretrained(tmp_path / "adapter")

    assert load_config(PolicyConfig(str(tmp_path / "adapter"))).model_type == "llama"
    again = load(tmp_path / "adapter", quantization=quantization)
    trained = {name: p for name, p in again.backbone.named_parameters() if p.requires_grad}
    assert trained.keys() == saved.keys()
    assert all(torch.equal(trained[name], saved[name]) for name in saved)
    dropouts = {name: m.p for name, m in again.backbone.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {p for name, p in dropouts.items() if "lora" in name} == {0.3}  # the adapter's own, not switched off


def test_an_adapter_whose_base_is_gone_is_one_clear_line(tmp_path):
    from moa_lightning.models.loading import load_config

    folder = tiny.policy_folder(tmp_path / "policy")
    load(folder, LoRA(r=2)).save_pretrained(tmp_path / "adapter")
    folder.rename(tmp_path / "moved")
    with pytest.raises(
        ValueError, match=r"the adapter in '.*adapter' is for the base model .*does not exist"
    ) as caught:
        load_config(PolicyConfig(str(tmp_path / "adapter")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lora", [None, LoRA(r=2)], ids=["full", "lora"])
def test_the_models_own_generation_settings_do_not_change_what_is_sampled(gpt2, tmp_path, lora):
    policy = load(gpt2, lora).eval()
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=8, eos_token_id=policy.end_ids, pad_token_id=0, temperature=1.0
    )
    ids_BP = torch.tensor([[5, 6, 7]] * 16)

    def sample():
        torch.manual_seed(0)
        return policy.generate(ids_BP, torch.ones_like(ids_BP), config)

    plain = sample()
    for name, value in {"repetition_penalty": 5.0, "min_new_tokens": 8, "suppress_tokens": [4, 5, 6]}.items():
        setattr(policy.causal_lm.generation_config, name, value)
    assert torch.equal(sample(), plain)
    assert policy.causal_lm.generation_config.repetition_penalty == 5.0  # what is saved with the policy
    torch.manual_seed(0)  # and they do change what transformers alone would sample
    assert not torch.equal(policy.causal_lm.generate(ids_BP, generation_config=config), plain)


def test_generation_stops_early_and_pads(gpt2):
    from transformers import GenerationConfig

    policy = load(gpt2).eval()
    with torch.no_grad():  # a bias towards the end token, through the tied embedding's last layer norm
        policy.causal_lm.transformer.ln_f.weight.zero_()
        policy.causal_lm.transformer.ln_f.bias.copy_(policy.causal_lm.get_output_embeddings().weight[1] * 100)
    ids_BP = torch.tensor([[0, 3], [3, 4]])
    config = GenerationConfig(do_sample=True, max_new_tokens=20, eos_token_id=policy.end_ids, pad_token_id=0, top_k=0)
    out = policy.generate(ids_BP, (ids_BP > 0).long(), config)
    assert out.shape[1] == 3
    assert AutoConfig.from_pretrained(gpt2).vocab_size == len(tiny.VOCABULARY)


def test_greedy_generation_does_not_depend_on_left_padding(folder):
    policy = load(folder)
    config = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=policy.end_ids, pad_token_id=0)
    prompts = [[5, 6, 7, 8, 9], [10, 11], [12]]
    width = max(map(len, prompts))
    ids_BP = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask_BP = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    together_BL = policy.generate(ids_BP, mask_BP, config)[:, width:]
    for row_T, prompt in zip(together_BL, prompts, strict=True):
        alone_T = policy.generate(torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long), config)
        answer_T = alone_T[0, len(prompt) :]
        assert row_T[: len(answer_T)].tolist() == answer_T.tolist()
        assert (row_T[len(answer_T) :] == 0).all()


@pytest.mark.parametrize("quantization", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}])
def test_quantised_weights_are_loaded_frozen_below_an_adapter(tmp_path, quantization):
    folder = tiny.policy_folder(tmp_path / "llama", tiny.llama_config(hidden_size=64, intermediate_size=128), scale=1.0)
    model = load_model(PolicyConfig(str(folder), lora=LoRA(r=4), quantization=quantization))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype in {torch.int8, torch.uint8}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    ids_BL = torch.tensor([[5, 6, 7, 8]])
    logits_BLV = model(ids_BL).logits
    whole_BLV = load_model(PolicyConfig(str(folder)))(ids_BL).logits
    assert 0 < (logits_BLV - whole_BLV).abs().max() < 0.5 * whole_BLV.abs().max()  # rounded, not lost
    logits_BLV.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"r": 0}, r"policy\.lora\.r must be at least 1, got 0"),
        ({"lora_alpha": -4}, r"policy\.lora\.lora_alpha must be at least 1, got -4"),
        ({"lora_dropout": 1.0}, r"policy\.lora\.lora_dropout must lie in \[0, 1\), got 1\.0"),
        ({"lora_dropout": float("nan")}, r"policy\.lora\.lora_dropout must lie in \[0, 1\), got nan"),
    ],
)
def test_adapter_fields_out_of_range(fields, says):
    with pytest.raises(ValueError, match=says):
        LoRA(**fields)


def test_an_adapter_of_layers_that_are_not_there_is_refused_in_one_line(folder):
    with pytest.raises(
        ValueError, match=r"^policy\.lora does not fit .*: Target modules .*'q_prok'.* not found"
    ) as caught:
        load(folder, LoRA(target_modules=["q_prok"]))
    assert "\n" not in str(caught.value)
