"""The tiny task, fresh for a test or shared by the tests of a file."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import transformers

from tests.cli.task import Task, make


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """A fresh task."""
    return make(tmp_path)


@pytest.fixture
def no_weights(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a model is opened, once the task has built its own."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("moa_lightning.training.strategies.load_model", refuse)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", refuse)


@pytest.fixture(autouse=True)
def _process_as_before() -> Iterator[None]:
    """``moa`` owns its process; here it shares one with other tests."""
    loggers = [
        logging.getLogger(f"lightning.{name}") for name in ("pytorch.utilities.rank_zero", "fabric.utilities.seed")
    ]
    levels, verbosity, environment = (
        [logger.level for logger in loggers],
        transformers.logging.get_verbosity(),
        os.environ.copy(),
    )
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    transformers.logging.set_verbosity(verbosity)
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
