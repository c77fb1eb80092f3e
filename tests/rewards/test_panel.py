"""Objectives and the panel."""

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
import yaml

from moa_lightning.errors import RewardError, UserError
from moa_lightning.rewards import FunctionReward, Length, Objective, Reward, RewardPanel, Words

CPU = torch.device("cpu")


@dataclass
class Fixed(Reward):
    """Returns what it was given, and remembers what it was asked."""

    answer: Any
    seen: list[dict[str, Any]] = field(default_factory=list)
    devices: list[torch.device] = field(default_factory=list)

    def check(self, columns: set[str]) -> None:
        if "forbidden" in columns:
            raise UserError("cannot work with 'forbidden'")

    def setup(self, device: torch.device) -> None:
        if device.type == "meta":
            raise UserError("cannot work on meta")
        self.devices.append(device)

    def score(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        self.seen.append({"prompts": prompts, "completions": completions, **columns})
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def panel_of(*answers: Any, **changes: Any) -> RewardPanel:
    return RewardPanel({f"o{i}": Objective(Fixed(answer), **changes) for i, answer in enumerate(answers)})


# Objective


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"weight": -0.1}, "weight"),
        ({"weight": math.nan}, "weight"),
        ({"weight": math.inf}, "weight"),
        ({"scale": 0.0}, "scale"),
        ({"scale": math.inf}, "scale"),
        ({"scale": math.nan}, "scale"),
        ({"shift": math.nan}, "shift"),
        ({"clip": (1.0, 1.0)}, "clip"),
        ({"clip": (2.0, 1.0)}, "clip"),
        ({"clip": (math.nan, 1.0)}, "clip"),
    ],
)
def test_objective_refuses_values_without_meaning(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=f"objective's {word} must be") as error:
        Objective(Fixed([]), **changes)
    assert "\n" not in str(error.value)


def test_objective_scales_then_shifts_then_clips() -> None:
    objective = Objective(Fixed([]), scale=-2.0, shift=1.0, clip=(-3.0, 2.0))
    assert objective.value(torch.tensor([0.0, 1.0, 10.0, -10.0])).tolist() == [1.0, -1.0, -3.0, 2.0]
    assert objective.value(torch.tensor([math.nan])).isnan().all()


def test_objective_clips_on_one_side() -> None:
    objective = Objective(Fixed([]), clip=(-math.inf, 1.0))
    assert objective.value(torch.tensor([-1e9, 7.0])).tolist() == [-1e9, 1.0]


# What a panel is


def test_panel_keeps_order_and_separates_trained_from_eval_only() -> None:
    panel = RewardPanel(
        {
            "zeal": Objective(Fixed([1.0]), weight=2.0),
            "watch": Objective(Fixed([2.0]), weight=9.0, eval_only=True),
            "calm": Objective(Fixed([3.0]), weight=0.0),
        }
    )
    assert panel.names == ("zeal", "watch", "calm")
    assert panel.trained == (True, False, True)
    assert panel.trained_names == ("zeal", "calm")
    assert panel.weights_N.dtype == torch.float32
    assert panel.weights_N.tolist() == [2.0, 0.0]
    table = panel.score(["p"], ["c"], {})
    assert table.names == panel.names
    assert table.trained == panel.trained
    assert table.raw_BN.tolist() == [[1.0, 2.0, 3.0]]
    assert table.trained_BN.tolist() == [[1.0, 3.0]]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a/b",
        "a.b",
        "a b",
        "a\tb",
        "a\n",
        " a",
        "a=b",
        "=1+1",
        "-a",
        "@a",
        "a|b",
        "<b>",
        "a[x]",
        "a&b",
        "$a$",
        "a,b",
        "`a`",
    ],
)
def test_panel_refuses_names_that_break_metric_keys(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name an objective"):
        RewardPanel({"fine": Objective(Fixed([])), name: Objective(Fixed([]))})


@pytest.mark.parametrize("names", [("step",), ("non_dominated",), ("a", "a_std_error"), ("a_raw_std_error", "a")])
def test_panel_refuses_names_of_columns(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"'({'|'.join(names)})' cannot name an objective"):
        RewardPanel({name: Objective(Fixed([])) for name in names})


@pytest.mark.parametrize("name", ["a", "a_std_error", "a_b", "a-b", "Länge", "2nd"])
def test_panel_accepts_single_words(name: str) -> None:
    assert RewardPanel({name: Objective(Fixed([]))}).names == (name,)


def test_panel_refuses_no_objectives() -> None:
    with pytest.raises(ValueError, match="no objectives"):
        RewardPanel({})


def test_panel_refuses_eval_only_objectives_alone() -> None:
    with pytest.raises(ValueError, match=r"every objective is eval_only \(a, b\)"):
        RewardPanel({n: Objective(Fixed([]), eval_only=True) for n in "ab"})


# Checks and set-up


def test_check_names_the_objective() -> None:
    with pytest.raises(ValueError, match=r"^objective 'o0': cannot work with 'forbidden'$"):
        panel_of([]).check({"forbidden"})


@pytest.mark.parametrize("column", ["prompts", "completions", "self"])
def test_check_refuses_columns_that_collide_with_arguments(column: str) -> None:
    with pytest.raises(ValueError, match=f"column '{column}'.*rename"):
        panel_of([]).check({column})


def test_setup_reaches_eval_only_objectives_and_names_the_objective_on_error() -> None:
    rewards = [Fixed([]), Fixed([])]
    panel = RewardPanel({"a": Objective(rewards[0]), "b": Objective(rewards[1], eval_only=True)})
    panel.setup(CPU)
    assert [reward.devices for reward in rewards] == [[CPU], [CPU]]
    with pytest.raises(ValueError, match=r"^objective 'a': cannot work on meta$"):
        panel.setup(torch.device("meta"))


# Scores


def test_score_passes_every_column_by_keyword() -> None:
    panel = panel_of([1.0, 2.0])
    panel.score(["p", "q"], ["c", "d"], {"answer": [3, 4], "a column": ["x", "y"]})
    (reward,) = [objective.reward for objective in panel.objectives.values()]
    assert isinstance(reward, Fixed)
    assert reward.seen == [{"prompts": ["p", "q"], "completions": ["c", "d"], "answer": [3, 4], "a column": ["x", "y"]}]


def test_one_reward_cannot_disturb_the_arguments_of_the_next() -> None:
    def spoil(prompts: list[str], completions: list[str], answer: list[int]) -> list[float]:
        for values in (prompts, completions, answer):
            values.clear()
        return [0.0, 0.0]

    after = Fixed([1.0, 1.0])
    panel = RewardPanel({"a": Objective(FunctionReward(spoil)), "b": Objective(after)})
    panel.score(["p", "q"], ["c", "d"], {"answer": [3, 4]})
    assert after.seen == [{"prompts": ["p", "q"], "completions": ["c", "d"], "answer": [3, 4]}]


def test_value_is_the_transform_of_raw() -> None:
    table = panel_of([-5.0, 0.0, 5.0], scale=2.0, shift=1.0, clip=(-1.0, 4.0)).score(["p"] * 3, ["c"] * 3, {})
    assert table.raw_BN.squeeze(1).tolist() == [-5.0, 0.0, 5.0]
    assert table.value_BN.squeeze(1).tolist() == [-1.0, 1.0, 4.0]


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2],
        (1.0, 2.0),
        torch.tensor([1.0, 2.0]),
        torch.tensor([1.0, 2.0]).numpy(),
        [torch.tensor(1.0), torch.tensor([2.0])],
        (score for score in (1.0, 2.0)),
    ],
    ids=["int", "tuple", "tensor", "array", "tensors", "generator"],
)
def test_scores_may_come_as_any_sequence_of_numbers(answer: Any) -> None:
    table = panel_of(answer).score(["p"] * 2, ["c"] * 2, {})
    assert table.raw_BN.tolist() == [[1.0], [2.0]]


def test_tables_are_float32_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        panel = panel_of([1.001])
        table = panel.score(["p"], ["c"], {})
        weights_N = panel.weights_N
    finally:
        torch.set_default_dtype(torch.float32)
    assert (table.raw_BN.dtype, table.value_BN.dtype, weights_N.dtype) == (torch.float32,) * 3
    assert table.raw_BN.item() == pytest.approx(1.001, abs=1e-7)


def test_no_responses_make_an_empty_table() -> None:
    table = panel_of([], []).score([], [], {})
    assert table.raw_BN.shape == table.value_BN.shape == (0, 2)


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf, 1e300, 10**400], ids=str)
def test_a_missing_score_is_nan_for_its_objective_and_row_alone(missing: Any) -> None:
    panel = panel_of([1.0, missing, 3.0], [4.0, 5.0, 6.0], clip=(0.0, 5.5))
    with pytest.warns(UserWarning, match="objective 'o0' did not score 1 of 3 responses"):
        table = panel.score(["p"] * 3, ["c"] * 3, {})
    assert table.raw_BN.isnan().tolist() == [[False, False], [True, False], [False, False]]
    assert table.value_BN.isnan().tolist() == table.raw_BN.isnan().tolist()
    assert table.valid_BN.tolist() == [[True, True], [False, True], [True, True]]
    assert table.value_BN[~table.value_BN.isnan()].tolist() == [1.0, 4.0, 5.0, 3.0, 5.5]


def test_a_value_that_overflows_is_missing_while_its_raw_score_stays() -> None:
    panel = panel_of([1e30, 1.0], scale=1e30)
    with pytest.warns(UserWarning, match=r"1 of 2 responses \(1 of them infinite\)"):
        table = panel.score(["p"] * 2, ["c"] * 2, {})
    assert table.raw_BN.isfinite().all()
    assert table.value_BN.isnan().squeeze(1).tolist() == [True, False]


def test_each_objective_warns_once() -> None:
    panel = panel_of([None, math.inf], [0.0, 1.0], [math.nan, 1.0])
    with pytest.warns(UserWarning, match="did not score") as caught:
        panel.score(["p"] * 2, ["c"] * 2, {})
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert messages[0].startswith("objective 'o0' did not score 2 of 2 responses (1 of them infinite)")
    assert messages[1].startswith("objective 'o2' did not score 1 of 2 responses;")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        panel.score(["p"] * 2, ["c"] * 2, {})


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_scores_is_named_with_both_lengths(count: int) -> None:
    with pytest.raises(ValueError, match=f"objective 'o0': Fixed returned {count} scores for 2 completions"):
        panel_of([0.0] * count).score(["p"] * 2, ["c"] * 2, {})


def test_a_wrong_number_of_scores_names_the_function() -> None:
    def brevity(completions: list[str]) -> list[float]:
        return [1.0]

    panel = RewardPanel({"short": Objective(FunctionReward(brevity))})
    with pytest.raises(ValueError, match="'short': function 'brevity' returned 1 scores for 2 completions"):
        panel.score(["p"] * 2, ["c"] * 2, {})


@pytest.mark.parametrize(
    ("answer", "kind"),
    [(["1.5"], "str"), (["nan"], "str"), ([b"1"], "bytes"), ([[1.0]], "list"), ([1j], "complex"), ([{}], "dict")],
)
def test_what_is_not_a_number_is_named(answer: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"objective 'o0': Fixed returned .*\({kind}\) for completion 0") as error:
        panel_of(answer).score(["p"], ["c"], {})
    assert "\n" not in str(error.value)


def test_a_tensor_of_several_numbers_is_not_a_number() -> None:
    with pytest.raises(ValueError, match=r"\(Tensor\) for completion 0"):
        panel_of([torch.zeros(2)]).score(["p"], ["c"], {})


@pytest.mark.parametrize(("answer", "kind"), [(None, "NoneType"), (1.0, "float")])
def test_what_is_not_a_list_is_named(answer: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=f"objective 'o0': Fixed returned {kind} instead of a list of 1 numbers"):
        panel_of(answer).score(["p"], ["c"], {})


@pytest.mark.parametrize("mine", [KeyError("mine"), SystemExit(0)])
def test_an_error_inside_a_reward_is_the_cause_of_one_that_says_where(mine: BaseException) -> None:
    with pytest.raises(RewardError, match=f"objective 'o0': Fixed raised {type(mine).__name__}") as error:
        panel_of(mine).score(["p"], ["c"], {})
    assert error.value.__cause__ is mine


# YAML and command line


class Panel:
    """Stands for the module: takes objectives by name.

    Args:
        objectives: by name.
    """

    def __init__(self, objectives: dict[str, Objective]) -> None:
        self.panel = RewardPanel(objectives)


@pytest.fixture
def parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Panel, "model")
    return parser


CONFIG = """
model:
  objectives:
    length:
      reward:
        class_path: moa_lightning.rewards.Length
        init_args: {divisor: 10, low: null, unit: {class_path: Tokens, init_args: {path: a-tokenizer}}}
      clip: [0, 2]
      scale: -1
    custom:
      reward: {class_path: FunctionReward, init_args: {function: my_rewards.f}}
      weight: 3
      eval_only: true
    sentiment:
      reward:
        class_path: TextClassifier
        init_args: {path: a-classifier, label: 1, output: Probability, text: CompletionOnly}
"""


def test_objectives_are_read_from_yaml_and_edited_by_flags(parser: jsonargparse.ArgumentParser, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    flags = [
        "--model.objectives.length.weight=0.25",
        "--model.objectives.length.reward.divisor=70",
        "--model.objectives.length.reward.unit=Words",
        "--model.objectives.custom.reward.init_args.function=my_rewards.g",
        "--model.objectives.sentiment.reward.init_args.label=POSITIVE",
    ]
    read = parser.parse_args(["--config", str(config), *flags])
    objectives = parser.instantiate(read).model.panel.objectives
    assert list(objectives) == ["length", "custom", "sentiment"]
    assert objectives["length"] == Objective(
        Length(divisor=70.0, low=None, unit=Words()), weight=0.25, scale=-1.0, clip=(0.0, 2.0)
    )
    assert objectives["custom"] == Objective(FunctionReward("my_rewards.g"), weight=3.0, eval_only=True)
    assert objectives["sentiment"].reward.label == "POSITIVE"
    # What is saved beside a run (by Lightning, nothing skipped) reads back as the same panel.
    saved = parser.parse_string(parser.dump(read, skip_unset=False))
    assert parser.instantiate(saved).model.panel.objectives == objectives


def test_objectives_are_added_and_replaced_by_flags(parser: jsonargparse.ArgumentParser, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model: {objectives: {length: {reward: Length, weight: 2}}}")
    flags = [
        "--model.objectives.length.reward=FunctionReward",
        "--model.objectives.length.reward.function=my_rewards.f",
        "--model.objectives.short.reward=Length",
        "--model.objectives.short.scale=-1",
    ]
    read = parser.parse_args(["--config", str(config), *flags])
    assert parser.instantiate(read).model.panel.objectives == {
        "length": Objective(FunctionReward("my_rewards.f"), weight=2.0),
        "short": Objective(Length(), scale=-1.0),
    }


def test_an_unknown_field_is_refused(parser: jsonargparse.ArgumentParser) -> None:
    with pytest.raises(jsonargparse.ArgumentError, match="weigth"):
        parser.parse_object(yaml.safe_load("model: {objectives: {a: {reward: Length, weigth: 2}}}"))
