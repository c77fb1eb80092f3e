"""Rewards written as functions."""

import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moa_lightning.rewards import FunctionReward, Objective, RewardPanel

REWARDS = """
import math


def brevity(prompts, completions, **kwargs):
    return [-len(text) for text in completions]


def exact(completions, answer, **kwargs):
    return [float(text == right) for text, right in zip(completions, answer)]


def strict(completions, answer):
    return [float(text == right) for text, right in zip(completions, answer)]


def lenient(completions, answer=None, trainer_state=None):
    return [answer is not None] * len(completions)


def of_trl(prompts, completions, completion_ids, **kwargs):
    return [0.0] * len(completions)


async def slowly(prompts, completions, **kwargs):
    return [0.0] * len(completions)


class Scorer:
    @staticmethod
    def score(completions, **kwargs):
        return [7.0] * len(completions)


constant = 3.0
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder of its own; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    (tmp_path / "film_rewards.py").write_text(REWARDS)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
    sys.modules.pop("film_package", None)


def checked(function: str | Callable[..., Any], columns: set[str] | None = None, **changes: Any) -> FunctionReward:
    reward = FunctionReward(function, **changes)
    reward.check(columns or set())
    return reward


def refused(function: str | Callable[..., Any], columns: set[str] | None = None) -> str:
    with pytest.raises(ValueError, match="function '") as error:
        checked(function, columns)
    assert "\n" not in str(error.value)
    return str(error.value)


# Calling


def test_a_function_in_the_current_folder_is_found(folder: Path) -> None:
    assert checked("film_rewards.brevity").score(["p", "p"], ["a", "abc"]) == [-1, -3]


def test_a_static_method_and_a_module_in_a_package_are_found(folder: Path) -> None:
    (folder / "film_package").mkdir()
    (folder / "film_package" / "__init__.py").touch()
    (folder / "film_package" / "deep.py").write_text(REWARDS)
    assert checked("film_rewards.Scorer.score").score(["p"], ["c"]) == [7.0]
    assert checked("film_package.deep.brevity").score(["p"], ["c"]) == [-1]
    assert checked("film_package.deep.Scorer.score").score(["p"], ["c"]) == [7.0]


def test_columns_arrive_as_trl_passes_them(folder: Path) -> None:
    reward = checked("film_rewards.exact", {"answer", "source"})
    assert reward.score(["p", "p"], ["x", "y"], answer=["x", "z"], source=[1, 2]) == [1.0, 0.0]


def test_a_function_without_kwargs_gets_only_what_it_names(folder: Path) -> None:
    reward = checked("film_rewards.strict", {"answer", "source"})
    assert reward.score(["p"], ["x"], answer=["x"], source=[1]) == [1.0]


def test_kwargs_get_every_column() -> None:
    seen: dict[str, Any] = {}

    def spy(completions: list[str], **kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [0.0] * len(completions)

    checked(spy, {"answer", "source"}).score(["p"], ["c"], answer=["x"], source=[1])
    assert seen == {"prompts": ["p"], "answer": ["x"], "source": [1]}


def test_defaults_make_columns_optional(folder: Path) -> None:
    assert checked("film_rewards.lenient").score(["p"], ["c"]) == [False]
    assert checked("film_rewards.lenient", {"answer"}).score(["p"], ["c"], answer=["a"]) == [True]


def test_without_a_check_the_function_is_found_at_setup_or_first_score(folder: Path) -> None:
    reward = FunctionReward("film_rewards.strict")
    reward.setup(torch.device("cpu"))
    assert reward.score(["p"], ["x"], answer=["x"], source=[1]) == [1.0]
    assert FunctionReward("film_rewards.strict").score(["p"], ["x"], answer=["x"], source=[1]) == [1.0]


class Offset:
    """A callable with state, as library users write them."""

    def __init__(self, offset: float) -> None:
        self.offset = offset

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return [self.offset + len(text) for text in completions]


def test_python_callables_are_taken_as_they_are() -> None:
    def scaled(completions: list[str], factor: float) -> list[float]:
        return [factor * len(text) for text in completions]

    assert checked(Offset(1.0)).score(["p"], ["abc"]) == [4.0]
    assert checked(functools.partial(scaled, factor=2.0)).score(["p"], ["abc"]) == [6.0]
    assert checked(lambda completions, **_: [1.0]).score(["p"], ["abc"]) == [1.0]


def test_conversational_functions_of_trl_read_messages() -> None:
    def polite(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        assert prompts[0][-1]["content"] == "hello"
        assert completions[0][0]["role"] == "assistant"
        return [float("please" in completion[0]["content"]) for completion in completions]

    reward = checked(polite, conversational=True)
    assert reward.score(["hello", "hello"], ["yes please", "no"]) == [1.0, 0.0]


def test_a_panel_scores_trl_functions_unchanged(folder: Path) -> None:
    panel = RewardPanel({"exact": Objective(FunctionReward("film_rewards.exact"))})
    panel.check({"answer"})
    panel.setup(torch.device("cpu"))
    assert panel.score(["p", "p"], ["x", "y"], {"answer": ["x", "z"]}).raw_BN.tolist() == [[1.0], [0.0]]


# Importing


def test_the_current_folder_stays_importable_but_comes_last(folder: Path) -> None:
    (folder / "film_lazy.py").write_text(
        "def f(completions):\n    import film_help\n    return film_help.score(completions)"
    )
    (folder / "film_help.py").write_text("def score(completions):\n    return [5.0 for _ in completions]")
    reward = checked("film_lazy.f")
    assert reward.score(["p"], ["c"]) == [5.0]
    assert sys.path[-1] == str(folder)
    checked("film_rewards.brevity")
    assert sys.path.count(str(folder)) == 1


def test_the_current_folder_wins_over_what_is_installed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    installed = tmp_path_factory.mktemp("installed")
    (installed / "film_twice.py").write_text("def f(completions): return ['installed']")
    (folder / "film_twice.py").write_text("def f(completions): return ['current']")
    sys.path.insert(0, str(installed))
    assert checked("film_twice.f").score(["p"], ["c"]) == ["current"]


def test_a_path_entry_that_was_there_keeps_its_place(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    before = list(sys.path)
    checked("film_rewards.brevity")
    assert sys.path == before


@pytest.mark.parametrize("path", ["", "brevity", "rewards.py:brevity", "./rewards.brevity", "rewards.", "a b.c", "1.f"])
def test_what_is_no_dotted_path_is_refused(path: str) -> None:
    assert "is not a dotted path; write 'rewards.f' for 'def f' in rewards.py" in refused(path)


def test_an_unknown_module_is_refused_with_the_nearest_name(folder: Path) -> None:
    message = refused("film_reward.brevity")
    assert message.startswith("function 'film_reward.brevity': there is no module 'film_reward' installed or in the")
    assert message.endswith("did you mean 'film_rewards'?")
    assert str(folder) in message


def test_an_unknown_module_far_from_any_name_gets_no_suggestion(folder: Path) -> None:
    assert "did you mean" not in refused("qqqqzzzzxxxx.f")


def test_an_unknown_module_in_a_package_is_refused_with_the_nearest_name(folder: Path) -> None:
    (folder / "film_package").mkdir()
    (folder / "film_package" / "__init__.py").touch()
    (folder / "film_package" / "deep.py").touch()
    message = refused("film_package.deeep.f")
    assert message.endswith("there is no module 'deeep' in package 'film_package'; did you mean 'deep'?")


def test_an_unknown_function_is_refused_with_the_nearest_name(folder: Path) -> None:
    message = refused("film_rewards.brevty")
    assert message == "function 'film_rewards.brevty': 'film_rewards' has no 'brevty'; did you mean 'brevity'?"
    assert refused("film_rewards.Scorer.scor").endswith("'Scorer' has no 'scor'; did you mean 'score'?")
    assert refused("film_rewards.Unknown.score").endswith("'film_rewards' is a module and has no 'Unknown' in it")


def test_a_module_that_does_not_import_says_why(folder: Path) -> None:
    (folder / "film_needs.py").write_text("import film_missing_dependency")
    (folder / "film_broken.py").write_text("def f(:\n")
    (folder / "film_raises.py").write_text("raise RuntimeError('first line\\nsecond line')")
    assert refused("film_needs.f").endswith("importing 'film_needs' failed: No module named 'film_missing_dependency'")
    assert "importing 'film_broken' failed: SyntaxError" in refused("film_broken.f")
    assert refused("film_raises.f").endswith("importing 'film_raises' failed: RuntimeError: first line")


@pytest.mark.parametrize(
    ("path", "kind"), [("constant", "of type float"), ("Scorer", "a class"), ("math", "of type module")]
)
def test_what_is_no_function_is_refused(folder: Path, path: str, kind: str) -> None:
    assert f"function 'film_rewards.{path}' is {kind}, not a function" in refused(f"film_rewards.{path}")


def test_async_functions_are_refused(folder: Path) -> None:
    class Slow:
        async def __call__(self, completions: list[str]) -> list[float]:
            return []

    async def stream(completions: list[str]) -> Any:
        yield 0.0

    assert "is async" in refused("film_rewards.slowly")
    assert "is async" in refused(Slow())
    assert "is async" in refused(stream)
    assert "is async" in refused(functools.partial(stream))


# Parameters


def test_a_missing_column_is_named_with_those_that_exist(folder: Path) -> None:
    panel = RewardPanel({"right": Objective(FunctionReward("film_rewards.exact"))})
    expected = (
        "objective 'right': function 'film_rewards.exact' needs column 'answer', which the data does not have; "
        "columns: solution, source"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        panel.check({"source", "solution"})
    assert refused("film_rewards.strict").endswith("columns: none beside the prompt")


def test_what_only_trl_passes_is_named_as_such(folder: Path) -> None:
    message = refused("film_rewards.of_trl")
    assert "needs column 'completion_ids'" in message
    assert message.endswith("only TRL's trainer passes that: give the parameter a default")


def test_positional_only_parameters_are_refused() -> None:
    def f(prompts: list[str], completions: list[str], /) -> list[float]:
        return []

    assert "takes 'prompts' by position only" in refused(f)


def test_a_function_without_a_signature_is_refused() -> None:
    assert "no signature" in refused("builtins.iter")
