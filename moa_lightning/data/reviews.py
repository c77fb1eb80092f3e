"""The embedded task: short film reviews from a seeded grammar, and a small policy that writes them.

Two of its objectives conflict: a sentence that states a fact does not praise, so more ``informative`` means less
``sentiment``; :func:`front` is the exact trade-off. Sentiment and length, the objectives of the IMDb experiment in
arXiv 2508.07768, conflict only in the reviews that the policy learns from, where long ones become critical. A policy
can still maximise both, with a long review of praise.
"""

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from moa_lightning.data.base import PromptData, Row, Stage
from moa_lightning.errors import UserError
from moa_lightning.utils.console import one_thread

_SUBJECTS = ("film", "movie", "drama", "comedy", "thriller", "western", "sequel", "documentary", "musical", "remake")
_KINDS = ("new", "old", "french", "latest", "first", "silent", "short", "famous")
_OPENERS = ("the", "this", "that", "their")
_ASPECTS = ("plot", "acting", "music", "ending", "script", "dialogue", "pace", "camera")
_VERBS = ("was", "felt", "seemed")
_DEGREES = ("very", "truly", "rather", "so")
_POSITIVE = ("wonderful", "brilliant", "charming", "great", "moving", "funny", "clever", "lovely")
_NEGATIVE = ("awful", "boring", "clumsy", "terrible", "dull", "weak", "silly", "tedious")
_FACTS = ("it runs two hours .", "we saw it at home .", "it opened last week .", "the seats were full .")
_LINKS = ("and", "but")
_POLARITY = {**dict.fromkeys(_POSITIVE, 1), **dict.fromkeys(_NEGATIVE, -1)}

# Probability that a sentence praises, by the number of sentences in the review.
_PRAISE = {1: 0.8, 2: 0.5, 3: 0.3, 4: 0.1}
_SENTENCES = (1, 1, 2, 2, 2, 3, 3, 4)

VOCABULARY = (
    "<pad>", "<eos>", "<unk>", ".", "is", "it", "runs", "two", "hours", "we", "saw", "at", "home", "opened", "last",
    "week", "seats", "were", "full", *_SUBJECTS, *_KINDS, *_OPENERS, *_ASPECTS, *_VERBS, *_DEGREES, *_POSITIVE,
    *_NEGATIVE, *_LINKS,
)  # fmt: skip

_OPINION = rf"(?:(?:{'|'.join(_DEGREES)}) )?(?:{'|'.join(_POLARITY)})"
_CLAUSE = rf"(?:{'|'.join(_VERBS)}) {_OPINION}(?: (?:{'|'.join(_LINKS)}) {_OPINION})?"
_REVIEW = re.compile(
    rf"{_CLAUSE} \.(?: (?:the (?:{'|'.join(_ASPECTS)}) {_CLAUSE} \.|{'|'.join(map(re.escape, _FACTS))}))*"
)


def sentiment(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Praise minus criticism, divided by the number of sentences, in [-1, 1]; 0 for a text without opinions.

    Each sentence counts as the mean of its opinion words, so repeating them has no effect. A sentence that states a
    fact counts as 0.
    """
    return [_sentiment(text) for text in completions]


def _sentiment(text: str) -> float:
    sentences = [part.split() for part in text.split(".") if part.strip()]
    if not sentences:
        return 0.0
    opinions = [[_POLARITY[word] for word in sentence if word in _POLARITY] for sentence in sentences]
    return sum(sum(o) / len(o) for o in opinions if o) / len(sentences)


def informative(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Square root of the share of sentences that state a fact, in [0, 1]; 0 for a text without sentences.

    It has an exact trade-off with :func:`sentiment`: a fact counts as 0 there, so a share x of facts leaves a sentiment
    of at most 1 - x. The Pareto front of the two is ``sentiment = 1 - informative^2``.
    """
    return [_informative(text) for text in completions]


def _informative(text: str) -> float:
    sentences = [" ".join(part.split()) for part in text.split(".") if part.strip()]
    if not sentences:
        return 0.0
    return math.sqrt(sum(f"{sentence} ." in _FACTS for sentence in sentences) / len(sentences))


def front(informative: float) -> float:
    """The exact Pareto front: the highest mean :func:`sentiment` of any policy with this mean :func:`informative`.

    A response with a share x of facts has at most ``(1 - x, sqrt(x))``, which lies on ``1 - informative^2``. The curve
    is concave, so no mixture of responses lies above it.
    """
    return 1.0 - informative**2


def distance_to_front(sentiment: float, informative: float) -> float:
    """Euclidean distance of two means from the curve :func:`front`, for informative from 0 to 1."""

    def distance(f: float) -> float:
        return math.hypot(front(f) - sentiment, f - informative)

    # Where the derivative of the squared distance is 0: 2 f^3 + (2 s - 1) f = informative.
    roots = np.roots([2.0, 0.0, 2.0 * sentiment - 1.0, -informative])
    inside = [float(root.real) for root in roots if abs(root.imag) < 1e-9 and 0 <= root.real <= 1]
    return min(map(distance, [0.0, 1.0, *inside]))


def is_grammatical(completion: str) -> bool:
    """Whether the grammar can generate this continuation of a prompt."""
    return _REVIEW.fullmatch(" ".join(completion.split())) is not None


def prompts() -> list[str]:
    """All openings of the grammar, in a fixed shuffled order."""
    openings = [f"{opener} {kind} {subject}" for opener in _OPENERS for kind in _KINDS for subject in _SUBJECTS]
    random.Random(0).shuffle(openings)
    return openings


def write_review(generator: random.Random) -> tuple[str, str]:
    """Generate a prompt and a review that continues it."""
    opening = f"{generator.choice(_OPENERS)} {generator.choice(_KINDS)} {generator.choice(_SUBJECTS)}"
    count = generator.choice(_SENTENCES)
    praise = _PRAISE[count]
    sentences = [_clause(generator, praise) + " ."]
    for _ in range(count - 1):
        if generator.random() < 0.2:
            sentences.append(generator.choice(_FACTS))
        else:
            sentences.append(f"the {generator.choice(_ASPECTS)} {_clause(generator, praise)} .")
    return opening, " ".join(sentences)


def _reviews(opening: str, count: int) -> list[str]:
    """Generate reviews that continue an opening; deterministic."""
    generator = random.Random(opening)
    return [write_review(generator)[1] for _ in range(count)]


def _clause(generator: random.Random, praise: float) -> str:
    first = generator.random() < praise
    clause = f"{generator.choice(_VERBS)} {_opinion(generator, first)}"
    if generator.random() < 0.25:
        second = generator.random() < praise
        clause += f" {'and' if first == second else 'but'} {_opinion(generator, second)}"
    return clause


def _opinion(generator: random.Random, positive: bool) -> str:
    degree = f"{generator.choice(_DEGREES)} " if generator.random() < 0.4 else ""
    return degree + generator.choice(_POSITIVE if positive else _NEGATIVE)


class Reviews(PromptData):
    """Openings of film reviews. If the policy that continues them does not exist yet, it is built and warm-started.

    The policy is written to ``policy_folder`` once, and later runs reuse it. A ``model.policy.path`` other than this
    folder is refused unless it already holds such a policy, so that a misspelt path does not train another one.

    Args:
        batch_size: prompts per collected batch, on each process.
        val_batch_size: prompts per evaluation batch; ``None`` is ``batch_size``.
        val_size: openings held out for evaluation, of 320.
        val_repeats: times each held-out opening is answered in an evaluation.
        seed: of the order of prompts, and of the responses that are sampled for them; ``None`` is the run's
            (``seed_everything``).
        warm_start_seed: of the policy's initial weights and of the reviews it learns from. It is independent of the
            run's seed, so runs with different seeds start from the same policy.
        baseline_reviews: number of reviews from the grammar for each opening, the same in each run, as a list in column
            ``baseline_reviews`` for ``WinProbability``. 0 adds no column.
        policy_folder: folder to build the policy in if it does not exist yet; ``model.policy.path`` must be the same.
    """

    def __init__(
        self,
        batch_size: int = 16,
        val_batch_size: int | None = None,
        val_size: int = 64,
        val_repeats: int = 2,
        seed: int | None = None,
        warm_start_seed: int = 0,
        baseline_reviews: int = 0,
        policy_folder: str = ".cache/moa/reviews",
    ) -> None:
        super().__init__(batch_size, val_batch_size, seed)
        openings = prompts()
        if not 1 <= val_size < len(openings) or val_repeats < 1:
            raise UserError(f"data.val_size must be from 1 to {len(openings) - 1}, and data.val_repeats at least 1")
        if baseline_reviews < 0:
            raise UserError(f"data.baseline_reviews must be at least 0, got {baseline_reviews}")
        self.warm_start_seed, self.policy_folder = warm_start_seed, policy_folder
        rows: list[Row] = [{"prompt": text} for text in openings]
        if baseline_reviews > 0:
            # Each opening has its own generator, so the held-out rows do not affect the others.
            rows = [row | {"baseline_reviews": _reviews(row["prompt"], baseline_reviews)} for row in rows]
        self._held_out = rows[:val_size] * val_repeats
        self._train = rows[val_size:]

    one_thread: ClassVar[bool] = True

    def rows(self, stage: Stage) -> Sequence[Row]:
        """The openings of a stage."""
        return self._train if stage == Stage.TRAIN else self._held_out

    def prepare(self) -> None:
        """Build and warm-start the policy, unless its folder already holds it."""
        assert self.trainer is not None
        path: str = self.trainer.lightning_module.policy_config.path  # type: ignore[assignment,union-attr]  # ours
        warm_start(path, self.warm_start_seed, self.policy_folder)


_MARK = "moa_reviews.json"
_SHAPE = {"n_embd": 96, "n_layer": 3, "n_head": 4, "n_positions": 64}
_TEXTS, _BATCH, _LEARNING_RATE = 25_600, 64, 3e-3


def warm_start(path: str, seed: int = 0, only_in: str | None = None) -> None:
    """Build the embedded task's policy in a folder: a word-level tokenizer and a small GPT-2, trained on the grammar.

    If the folder already holds that policy, nothing happens.

    Args:
        path: of the folder.
        seed: of the initial weights and of the reviews.
        only_in: the only folder in which to build one; ``None`` allows any.

    Raises:
        UserError: the folder holds something else, or it holds no policy and is not ``only_in``.
    """
    folder = Path(path).expanduser()
    recipe = {"seed": seed, "texts": _TEXTS, "batch": _BATCH, "lr": _LEARNING_RATE, **_SHAPE, "words": [*VOCABULARY]}
    if (folder / _MARK).is_file() and json.loads((folder / _MARK).read_text(encoding="utf-8")) == recipe:
        return
    if not path.startswith((".", "/", "~")) and path.count("/") < 2:
        raise UserError(
            f"policy.path '{path}' is no folder, and reads like a model on the hub; data class Reviews works with the "
            "policy that it builds in a folder such as .cache/moa/reviews, data class Prompts with any"
        )
    # Do not overwrite a policy from an older recipe, or an aligned one.
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"policy.path '{path}' holds something other than this task's warm-started policy; name a new folder, or "
            "use data class Prompts for a policy of your own"
        )
    if only_in is not None and folder.resolve() != Path(only_in).expanduser().resolve():
        raise UserError(
            f"policy.path '{path}' holds no policy; data class Reviews builds its policy in '{only_in}' alone. Give "
            "that path, or another folder by --data.policy_folder as well"
        )
    _build(folder, seed, recipe)


def _build(folder: Path, seed: int, recipe: dict[str, Any]) -> None:
    from lightning.pytorch.utilities import rank_zero_only
    from lightning.pytorch.utilities.seed import isolate_rng
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from moa_lightning.stages.fitting import Fitting
    from moa_lightning.stages.supervised import NewModel, build_model, encode, train
    from moa_lightning.utils.atomic_folder import atomic_folder

    rank_zero_only(print)(f"warm start: teaching a small policy to write film reviews (kept in {folder})")
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    generator = random.Random(seed)
    examples = [encode(tokenizer, *write_review(generator), max_length=64) for _ in range(_TEXTS + 256)]
    fit = Fitting(batch_size=_BATCH, learning_rate=_LEARNING_RATE, seed=seed, accelerator="cpu", weight_decay=0.0)
    # The policy depends only on its seed, and building it does not change the run's random numbers.
    with isolate_rng(), one_thread():
        torch.manual_seed(seed)
        model = build_model(NewModel("gpt2", len(VOCABULARY), _SHAPE), tokenizer)
        before, after = train(model, examples[256:], examples[:256], int(tokenizer.pad_token_id or 0), fit)
    rank_zero_only(print)(f"warm start: held-out loss {before:.3f} -> {after:.3f} nats per token")
    with atomic_folder(folder) as finished:
        model.save_pretrained(finished)
        tokenizer.save_pretrained(finished)
        (finished / _MARK).write_text(json.dumps(recipe), encoding="utf-8")
