"""A small neural policy, trained by MOPO's recipe on sampled comparisons.

Legend: K responses, N objectives.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from bench.mopo.structures import OTHER_PROMPTS, PROMPT, RESPONSES, Array, Structure, write_comparisons
from moa_lightning.combiners import MOPO, Projected
from moa_lightning.data import Preferences
from moa_lightning.losses import WeightedLikelihood
from moa_lightning.models import Encoder, FrozenCopy, Policy, PolicyConfig
from moa_lightning.module import AlignmentModule
from moa_lightning.rewards import FromLabels, Objective
from moa_lightning.sources import PreferenceRows


@dataclass(frozen=True)
class Recipe:
    """How a policy is trained."""

    tau: float = 0.1
    comparisons: int = 20_000  # of each pair, under each objective
    steps: int = 200
    learning_rate: float = 1e-2  # decays to 0
    dual_rate: float = 1.0


@dataclass(frozen=True)
class Learned:
    """A trained policy on the responses of the list."""

    policy_K: Array  # renormalised
    outside: float  # probability of everything that is not on the list
    duals_M: Array


def write_policy(folder: Path, seed: int = 0) -> Path:
    """A freshly initialised GPT-2 of one layer, and its word-level tokenizer."""
    words = sorted({word for text in (PROMPT, *OTHER_PROMPTS, *RESPONSES) for word in text.split()})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **ends).save_pretrained(folder)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": len(vocabulary)}
    # Wider than GPT-2's own, so that the prior over the responses is far from equal.
    config = GPT2Config(**sizes, initializer_range=0.1, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def listed(policy: Policy, encoder: Encoder, structure: Structure) -> tuple[Array, float]:
    """The policy on the structure's responses, renormalised, and the probability of everything else."""
    batch = encoder.encode([{"prompt": structure.prompt}])
    responses, _ = encoder.encode_candidates(batch, [structure.responses])
    with torch.no_grad():
        output = policy(responses.input_ids_BL, responses.attention_mask_BL, responses.mask_BT)
    mass_K = output.logprobs_BT.double().sum(1).exp().numpy()
    return mass_K / mass_K.sum(), 1 - float(mass_K.sum())


def prior(folder: Path, structure: Structure) -> Array:
    """The policy in a folder on the structure's responses: the reference of the exact problem."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    encoder = PreferenceRows(max_response_length=8).encoder(tokenizer, (tokenizer.eos_token_id,), 16)
    return listed(Policy(model, tokenizer), encoder, structure)[0]


def learn(
    folder: Path, structures: Sequence[Structure], thresholds_M: Array, recipe: Recipe, seed: int, workplace: Path
) -> list[Learned]:
    """Sample comparisons, write them as a preference file, and train on it.

    Args:
        folder: of the policy to start from, which is the reference too.
        structures: the true preferences, each under a prompt of its own; their objectives have the same names.
        thresholds_M: one for each secondary objective, on its mean over the prompts.
        recipe: how to train.
        seed: decides the comparisons.
        workplace: an empty folder for the file.

    Returns:
        The policy on the responses to each prompt.
    """
    file = workplace / "comparisons.jsonl"
    write_comparisons(structures, recipe.comparisons, seed, file)
    names = list(structures[0].wins)
    thresholds = dict(zip(names[1:], map(float, thresholds_M), strict=True))
    module = AlignmentModule(
        PolicyConfig(str(folder)),
        objectives={name: Objective(FromLabels(name)) for name in names},
        combiner=MOPO(
            thresholds=thresholds,
            tau=recipe.tau,
            dual=Projected(lr=recipe.dual_rate),
            dual_values="optimum",  # the labels are probabilities
        ),
        source=PreferenceRows(max_response_length=8, prior="listed"),
        loss=WeightedLikelihood(),
        reference=FrozenCopy(),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=recipe.learning_rate),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps),
    )
    data = Preferences(str(file), val_size=0, batch_size=len(structures))
    with _quiet():
        trainer = Trainer(
            accelerator="cpu",
            max_steps=recipe.steps,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=workplace,
        )
        trainer.fit(module, datamodule=data)
    duals_M = module.combiner_state["duals"][1:].numpy()
    module.policy.eval()
    return [Learned(*listed(module.policy, module.encoder, structure), duals_M) for structure in structures]


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's notes about devices and loaders say nothing here, hundreds of times."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)


def total_variation(one_K: Array, other_K: Array) -> float:
    """Half the sum of the absolute differences."""
    return float(np.abs(one_K - other_K).sum() / 2)
