"""No network, no log-ins, one thread: set before anything heavy is imported."""

import atexit
import os
import shutil
import sys
import tempfile

# Own, empty caches: a test must not pass because of a model or a log-in that this machine happens to have.
_caches = tempfile.mkdtemp(prefix="moa-tests-")
atexit.register(shutil.rmtree, _caches, ignore_errors=True)
os.environ.update(
    HF_HOME=f"{_caches}/hf",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    WANDB_CACHE_DIR=f"{_caches}/wandb",
    WANDB_CONFIG_DIR=f"{_caches}/wandb",
    WANDB_DATA_DIR=f"{_caches}/wandb",
    MPLBACKEND="Agg",
)

from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402 - only now may it read the environment

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_seed_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """``seed_everything`` of one test would otherwise seed whatever the next ones build."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(autouse=True)
def no_open_wandb_run() -> Iterator[None]:
    """A run that one test leaves open would be reused by the next one in the same process."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
