"""The cases of ``bench.fuzz.run``: wrong and right input of every kind, each with what should become of it."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

Expected = Literal["refuse", "accept", "either"]
"""``either`` is for random damage, which may leave something that is right: a traceback it must never be."""
Settings = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call of ``moa``.

    Args:
        kind: of input.
        name: within its kind.
        expected: what should become of it.
        flags: behind the config.
        config: text in place of the good config's; ``{folder}`` is where the case may write.
        prepare: writes further files into the case's folder.
        late: it can be refused only after a run folder is there.
        command: of ``moa``.
        preferences: starts from the config on preference rows.
        resumed: resumes from a checkpoint of the good config's run.
    """

    kind: str
    name: str
    expected: Expected = "refuse"
    flags: tuple[str, ...] = ()
    config: str | bytes | None = None
    prepare: Callable[[Path], object] = field(default=lambda folder: None)
    late: bool = False
    command: str = "fit"
    preferences: bool = False
    resumed: bool = False


def all_cases(rollouts: Settings, preferences: Settings, seed: int) -> list[Case]:
    """Every case, in a fixed order."""
    numbers = random.Random(seed)
    return [
        *_good(),
        *_flags(),
        *_yaml(rollouts, numbers),
        *_prompts(numbers),
        *_preferences(preferences, numbers),
        *_rewards(),
        *_policies(),
        *_resumed(),
    ]


def _good() -> Iterator[Case]:
    for name, flags in {
        "as it is": (),
        "accumulation": ("--trainer.accumulate_grad_batches=2",),
        "clipping": ("--trainer.gradient_clip_val=0.5",),
        "clipping by value": ("--trainer.gradient_clip_val=0.5", "--trainer.gradient_clip_algorithm=value"),
        "evaluation by share": ("--trainer.val_check_interval=0.5",),
        "learning rate 0": ("--model.optimizer.lr=0",),
        "another optimiser": ("--model.optimizer=SGD", "--model.optimizer.lr=0.1"),
        "a schedule": ("--model.lr_scheduler=StepLR", "--model.lr_scheduler.step_size=1"),
        "value learning rate": ("--model.value_learning_rate=1e-4",),
        "adapter": ("--model.policy.lora={r: 2}",),
        "adapter's targets": ("--model.policy.lora={r: 2, target_modules: [c_attn]}",),
        "all layers": ("--model.policy.lora={r: 2, target_modules: all-linear}",),
        "no checkpoints kept": ("--checkpoint.save_top_k=0",),
        "all checkpoints kept": ("--checkpoint.save_top_k=-1",),
        "monitor": ("--checkpoint.monitor=val/rewards/good/mean", "--checkpoint.mode=max"),
        "seed 0": ("--seed_everything=0",),
        "largest seed": ("--seed_everything=4294967295",),
        "cpu": ("--trainer.accelerator=cpu", "--trainer.devices=1"),
        "bfloat16": ("--trainer.precision=bf16-mixed",),
        "linear": ("--model.combiner=Linear",),
        "temperature": ("--model.source.temperature=0.7",),
        "greedy evaluation limits": ("--trainer.limit_val_batches=1",),
        "no evaluation": ("--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0"),
        "quiet": ("--trainer.log_every_n_steps=50",),
        # On the command line it is text, and a folder may be called so; in a config it is a list (see _yaml).
        "a folder called [1]": ("--trainer.default_root_dir={folder}/[1]",),
        # PAMA with Noon, its default, leaves no negative advantage: its score is a weight.
        "PAMA's score as a weight": ("--model.loss=WeightedLikelihood",),
        "options of an adapter": ("--model.policy.lora={r: 2, modules_to_save: [lm_head], options: {bias: all}}",),
        "null where it is a value": ("--model.source.missing_eos_penalty=null", "--data.limit=null"),
    }.items():
        yield Case("flags", f"good: {name}", "accept", flags)
    yield Case("preferences", "good: as it is", "accept", preferences=True)
    yield Case("flags", "good: validate", "accept", command="validate")
    yield Case("flags", "good: predict", "accept", command="predict")


_NEITHER_NEGATIVE_NOR_NAN = ("-1", ".nan", ".inf", "-.inf", "x", "[1]")
_POSITIVE = ("0", "-1", ".nan", ".inf", "x", "null")
_COUNT = ("0", "-1", "1.5", "x", "1" * 400)


def _flags() -> Iterator[Case]:
    for flag, values in {
        "trainer.val_check_interval": ("0", "-1", ".nan", "1.5", "x", "[1]"),
        "trainer.accumulate_grad_batches": ("0", "-1", "1.5", "x"),
        "trainer.gradient_clip_val": _NEITHER_NEGATIVE_NOR_NAN,
        "trainer.gradient_clip_algorithm": ("x", "1"),
        "trainer.max_steps": ("-2", "1.5", "x", "1" * 400),
        "trainer.max_epochs": ("-2", "x"),
        "trainer.limit_val_batches": ("-1", ".nan", "x"),
        "trainer.limit_train_batches": ("-1", ".nan", "x"),
        "trainer.num_sanity_val_steps": ("-2", "x"),
        "trainer.log_every_n_steps": ("-1", "x"),
        "trainer.accelerator": ("tpu", "cuda", "x", "mps"),
        "trainer.devices": ("-3", "0", "x", "[7]", "[]"),
        "trainer.num_nodes": ("0", "-1", "x"),
        "trainer.strategy": ("x", "fsdp", "deepspeed"),
        "trainer.precision": ("8", "x"),
        "trainer.default_root_dir": ("null", "/proc/none/run"),
        "trainer.callbacks": ("x", "[Nothing]"),
        "trainer.logger": ("x",),
        "trainer.profiler": ("x",),
        "trainer.plugins": ("x",),
        "trainer.fast_dev_run": ("x", "-1"),
        "trainer.max_time": ("x", "1"),
        "trainer.overfit_batches": ("-1", "x"),
        "checkpoint.save_top_k": ("-5", "2", "x"),
        "checkpoint.monitor": ("nothing", "val/rewards/god/mean"),
        "checkpoint.mode": ("x",),
        "checkpoint.every_n_train_steps": ("-1", "x"),
        "checkpoint.every_n_epochs": ("-1", "x"),
        "seed_everything": ("-1", "4294967296", "1" * 400, "x", "1.5"),
        "model.seed": ("x", "1.5", "1" * 400),
        "model.optimizer.lr": ("-1", ".nan", ".inf", "x"),
        "model.optimizer.weight_decay": ("-1", ".nan", "x"),
        "model.optimizer.betas": ("[2, 3]", "[-1, 0]", "x"),
        "model.optimizer.eps": ("-1", ".nan"),
        "model.value_learning_rate": ("-1", ".nan", ".inf", "x"),
        "model.source.temperature": _POSITIVE,
        "model.source.max_new_tokens": _COUNT,
        "model.source.num_generations": _COUNT,
        "model.source.num_iterations": _COUNT,
        "model.source.num_mini_batches": _COUNT,
        "model.source.top_k": ("-1", "x", "1.5"),
        "model.source.top_p": ("0", "-1", "2", ".nan", "x"),
        "model.source.max_prompt_length": ("0", "-1", "x"),
        "model.kl.init_kl_coef": ("-1", ".nan", ".inf", "x"),
        "model.kl.target": ("0", "-1", ".nan", "x"),
        "model.kl.horizon": ("0", "-1", "x"),
        "model.policy.path": ("", "./nowhere", "{folder}/a-file", "a b", "/", "no/such/thing"),
        "model.policy.dtype": ("float8", "1"),
        "model.policy.lora": (
            "{r: 0}",
            "{r: -1}",
            "{r: 2, target_modules: [nothing]}",
            "{r: 2, target_modules: []}",
            "{r: 2, lora_dropout: 2}",
            "{r: 2, lora_dropout: -1}",
            "{r: 2, lora_alpha: 0}",
            "{r: 2, modules_to_save: [nothing]}",
            "{r: 2, options: {nothing: 1}}",
            "{q: 1}",
            "x",
        ),
        "model.policy.attn_implementation": ("nothing",),
        "model.policy.options": ("{nothing: 1}", "x", "[1]"),
        "model.policy.quantization": ("{load_in_4bit: true}", "{nothing: 1}"),
        "model.policy.chat_template": ("{% if %}",),
        "model.combiner": ("Nothing", "1", "os.system", "torch.nn.Linear", "[PAMA]"),
        "model.loss": ("Nothing", "PairwiseLogistic"),
        "model.reference": ("Nothing", "AdapterOff"),
        "model.objectives.good.weight": ("-1", ".nan", ".inf", "x"),
        "model.objectives.good.scale": ("0", ".nan", ".inf", "x"),
        "model.objectives.good.shift": (".nan", ".inf", "x"),
        "model.objectives.good.clip": ("[1, 0]", "[.nan, 1]", "[1]", "x"),
        "model.objectives.good.reward.function": ("", "x", "os", "os.nothing", "1.2", "bench.nothing.f", "os.sep"),
        "data.batch_size": _COUNT,
        "data.val_batch_size": ("0", "-1", "x"),
        "data.val_size": ("-1", "12", "99", "x"),
        "data.limit": ("0", "-1", "x"),
        "data.seed": ("x", "1.5"),
        "data.path": ("", "nothing.jsonl", "{folder}", "/", "x.xyz"),
        "data.prompt_column": ("nothing", ""),
        "data.prompt_function": ("x", "os.nothing", "os.sep"),
        "data": ("Nothing", "1", "[Prompts]"),
        "ckpt_path": ("nothing.ckpt", "{folder}/a-file", "{folder}", ""),
        "wandb": ("x", "on"),
        "config": ("nothing.yaml", "{folder}", ""),
        "pareto_front.reference": ("{good: 0}", "{x: 1}", "{good: .nan, short: 0}", "x"),
        "sample_table.rows": ("-1", "x"),
        "nothing": ("1",),
        "modle.policy.path": ("x",),
        "trainer.max_step": ("1",),
    }.items():
        for value in values:
            yield Case("flags", f"{flag}={value[:40]}", flags=(f"--{flag}={value}",))
    for name in ("model.source.top_p", "model.kl.init_kl_coef", "model.objectives.good.scale", "data.batch_size"):
        yield Case("flags", f"{name}=null", flags=(f"--{name}=null",))
    signed = ("--model.combiner=Linear", "--model.loss=WeightedLikelihood")
    yield Case("flags", "a score of either sign as a weight", flags=signed)
    yield Case("flags", "a policy that would be trained under a misspelt path", flags=_misspelt(".cache/moa/reveiws"))
    yield Case("flags", "the same in an absolute folder", flags=_misspelt("{folder}/reveiws"))
    for words in (("extra",), ("--",), ("--=",), ("-x",), ("--config",), ("--trainer",), ("--model.policy.path",)):
        yield Case("flags", " ".join(words), flags=words)


def _misspelt(path: str) -> tuple[str, ...]:
    """The embedded task, with a policy that is not there."""
    return "--data=Reviews", f"--model.policy.path={path}"


def _yaml(good: Settings, numbers: random.Random) -> Iterator[Case]:
    text = yaml.safe_dump(good, sort_keys=False)
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
    )
    for name, content in {
        "empty": "",
        "list": "- a\n",
        "text": "abc",
        "number": "3",
        "null": "null",
        "open bracket": text + "x: [1\n",
        "tab": text.replace("  ", "\t"),
        "two documents": text + "---\n" + text,
        "unknown top-level key": text + "trainr:\n  max_steps: 1\n",
        "unknown top-level scalar": text + "note: 1\n",
        "key twice": text + "trainer:\n  max_steps: 1\n",
        "a number for a mapping": text.replace("trainer:", "trainer: 3\nold:"),
        "a list for a mapping": "model: [1, 2]\n" + text.replace("model:", "old:"),
        "a mapping for a number": text.replace("max_steps: 1", "max_steps: {a: 1}"),
        "a list for a folder": text.replace("default_root_dir: '{folder}/run'", "default_root_dir: [1]"),
        "deep lists": text + "x: " + "[" * 3000 + "]" * 3000 + "\n",
        "deep mappings": text + "x: " + "{a: " * 3000 + "1" + "}" * 3000 + "\n",
        "an alias bomb": text + bomb,
        "an alias to itself": text + "x: &x [*x]\n",
        "an alias of nothing": text + "x: *nothing\n",
        "a Python object": text + "x: !!python/object/apply:os.system [true]\n",
        "an unknown tag": text + "x: !thing 1\n",
        "a key that is a list": text + "? [a, b]\n: 1\n",
        "a key that is a mapping": text + "? {a: b}\n: 1\n",
        "a key that is a number": text + "3: 1\n",
        "a null key": text + "~: 1\n",
        "a merge of nothing": text + "<<: 3\n",
        "a control character": text + "x: \x01\n",
        "no objectives": yaml.safe_dump(_changed(good, "model.objectives", {})),
        "objectives as a list": yaml.safe_dump(_changed(good, "model.objectives", ["good"])),
        "objectives as null": yaml.safe_dump(_changed(good, "model.objectives", None)),
        "an objective as null": yaml.safe_dump(_changed(good, "model.objectives.good", None)),
        "an objective without reward": yaml.safe_dump(_changed(good, "model.objectives.good", {"weight": 1.0})),
        "no policy": yaml.safe_dump(_changed(good, "model.policy", None)),
        "no model": yaml.safe_dump({k: v for k, v in good.items() if k != "model"}),
        "no data": yaml.safe_dump({k: v for k, v in good.items() if k != "data"}),
        "400 digits": text.replace("max_steps: 1", "max_steps: " + "1" * 400),
        "400 digits in a seed": text.replace("seed_everything: 7", "seed_everything: " + "1" * 400),
    }.items():
        yield Case("YAML", name, config=content)
    for name, bad in {
        "UTF-16": text.encode("utf-16"),
        "Latin-1": (text + "# ü\n").encode("latin-1"),
        "NUL": text.encode() + b"x: \0\n",
        "binary": bytes(range(256)),
    }.items():
        yield Case("YAML", name, config=bad)
    for name in ("step", "non_dominated", "=1+1", "a|b", "<b>", "[x]", "a.b", "a b", "", "good_std_error"):
        objectives = {**good["model"]["objectives"], name: good["model"]["objectives"]["good"]}
        config = yaml.safe_dump(_changed(good, "model.objectives", objectives))
        yield Case("YAML", f"objective called '{name}'", config=config)
    lines = text.splitlines(keepends=True)
    for i in range(25):
        damaged = list(lines)
        for _ in range(numbers.randint(1, 2)):
            at = numbers.randrange(len(damaged))
            damaged[at] = numbers.choice(
                [
                    "",
                    damaged[at].lstrip(),
                    damaged[at] * 2,
                    damaged[at].replace(":", "", 1),
                    damaged[at].rstrip("\n") + numbers.choice([" x", " [", " ,", ":"]) + "\n",
                ]
            )
        yield Case("YAML", f"random damage {i}", "either", config="".join(damaged), late=True)
    for i in range(15):
        characters = list(text)
        for _ in range(3):
            characters[numbers.randrange(len(characters))] = numbers.choice("{}[]:,&*!|>'\"%@` \n-\\")
        yield Case("YAML", f"random characters {i}", "either", config="".join(characters), late=True)


def _prompts(numbers: random.Random) -> Iterator[Case]:
    row = {"prompt": "the film was", "wish": 3}
    good = [json.dumps(row)] * 12
    deep = "[" * 3000 + "]" * 3000
    for name, lines in {
        "empty file": [],
        "empty lines": ["", "", ""],
        "no JSON": ["hello"] * 12,
        "cut off": [*good, '{"prompt": "the'],
        "a list a line": ["[1]"] * 12,
        "prompt a number": [json.dumps({"prompt": 3, "wish": 3})] * 12,
        "prompt null": [*good, json.dumps({"prompt": None, "wish": 3})],
        "prompt empty": [*good, json.dumps({"prompt": "", "wish": 3})],
        "no prompt": [json.dumps({"promt": "x", "wish": 3})] * 12,
        "a column missing that a reward names": [json.dumps({"prompt": "the film"})] * 12,
        "a column that rewards have": [json.dumps({**row, "completions": "x"})] * 12,
        "messages without role": [json.dumps({"prompt": [{"content": "x"}], "wish": 3})] * 12,
        "messages without template": [json.dumps({"prompt": [{"role": "user", "content": "x"}], "wish": 3})] * 12,
        "too long": [json.dumps({"prompt": "good " * 100, "wish": 3})] * 12,
        "deep JSON": [*good, f'{{"prompt": "the film", "wish": 3, "x": {deep}}}'],
        "400 digits": [*good, f'{{"prompt": "the film", "wish": {"1" * 400}}}'],
        "NaN": [*good, '{"prompt": "the film", "wish": NaN}'],
        "too few": good[:3],
        # Columns that no reward reads by name are the user's: what is in them is handed on as it is.
        "good: a column missing that no reward names": [json.dumps({"prompt": "the film"})] * 12,
        "good: text beside numbers": [*good, json.dumps({"prompt": "the film", "wish": "many"})],
        "good: numbers of 25 digits": [*good, f'{{"prompt": "the film", "wish": {"1" * 25}}}'],
    }.items():
        reads = "--model.objectives.good.reward.function=bench.fuzz_rewards.wishes"
        yield Case(
            "prompts",
            name,
            "accept" if name.startswith("good: ") else "refuse",
            flags=("--data.path={folder}/p.jsonl", *([reads] if name.endswith("that a reward names") else [])),
            prepare=lambda folder, lines=lines: (folder / "p.jsonl").write_text("\n".join(lines) + "\n"),
        )
    for name, content in {
        "NUL": b"\0" * 50,
        "Latin-1": '{"prompt": "ü"}\n'.encode("latin-1") * 12,
        "gzip that is none": b"hello",
    }.items():
        file = "p.jsonl.gz" if "gzip" in name else "p.jsonl"
        yield Case(
            "prompts",
            name,
            flags=(f"--data.path={{folder}}/{file}",),
            prepare=lambda folder, file=file, content=content: (folder / file).write_bytes(content),
        )
    for name, file, content in (
        ("CSV without prompt", "p.csv", b"a,b\n1,2\n"),
        ("CSV with one row", "p.csv", b"prompt,wish\nx,1\n"),
        ("CSV with rows of other lengths", "p.csv", b"prompt,wish\n" + b"x,1,2,3\n" * 12),
        ("JSON object", "p.json", b'{"a": 1}'),
        ("JSON number", "p.json", b"3"),
        ("Parquet that is none", "p.parquet", b"hello"),
    ):
        yield Case(
            "prompts",
            name,
            flags=(f"--data.path={{folder}}/{file}",),
            prepare=lambda folder, file=file, content=content: (folder / file).write_bytes(content),
        )
    for i in range(12):
        lines = list(good)
        at = numbers.randrange(len(lines))
        cut = numbers.randrange(1, len(lines[at]))
        lines[at] = numbers.choice(
            [lines[at][:cut], lines[at] + lines[at], lines[at].replace('"', "'"), lines[at][cut:]]
        )
        yield Case(
            "prompts",
            f"random damage {i}",
            "either",
            flags=("--data.path={folder}/p.jsonl",),
            late=True,
            prepare=lambda folder, lines=lines: (folder / "p.jsonl").write_text("\n".join(lines) + "\n"),
        )


def _preferences(settings: Settings, numbers: random.Random) -> Iterator[Case]:
    def rows(change: Callable[[dict[str, Any]], object], which: Sequence[int] = range(16)) -> list[str]:
        written = []
        for i in range(16):
            row = preference_row(i)
            if i in which:
                change(row)
            written.append(json.dumps(row))
        return written

    def label(value: Any) -> Callable[[dict[str, Any]], object]:
        return lambda row: row["preferences"].update(good=value)

    for name, lines in {
        "winner beside the responses": rows(label({"winner": 7}), [9]),
        "winner negative": rows(label({"winner": -1}), [9]),
        "winner a text": rows(label({"winner": "a"}), [9]),
        "winner a fraction": rows(label({"winner": 0.5}), [9]),
        "winner a bool": rows(label({"winner": True}), [9]),
        "winner a list": rows(label({"winner": [0]}), [9]),
        "probability above 1": rows(label({"probability": 1.5}), [9]),
        "probability negative": rows(label({"probability": -0.5}), [9]),
        "probability a text": rows(label({"probability": "x"}), [9]),
        "probability NaN": rows(label({"probability": float("nan")}), [9]),
        "label a number": rows(label(3), [9]),
        "label a list": rows(label([0]), [9]),
        "unknown field": rows(label({"wins": 1}), [9]),
        "labels a list": rows(lambda row: row.update(preferences=[1]), [9]),
        "labels missing everywhere": rows(lambda row: row.pop("preferences")),
        "one response": rows(lambda row: row.update(responses=["a"]), [9]),
        "no responses": rows(lambda row: row.update(responses=[]), [9]),
        "responses a text": rows(lambda row: row.update(responses="ab"), [9]),
        "response a number": rows(lambda row: row.update(responses=[1, 2]), [9]),
        "response null": rows(lambda row: row.update(responses=["a", None]), [9]),
        "response too long": rows(lambda row: row.update(responses=["a", "very " * 60]), [9]),
        "no prompt": rows(lambda row: row.pop("prompt"), [9]),
        "prompt a number": rows(lambda row: row.update(prompt=3), [9]),
        "400 digits": rows(label({"winner": int("1" * 400)}), [9]),
        "cut off": [*rows(lambda row: None), '{"prompt": "x"'],
    }.items():
        yield Case(
            "preferences",
            name,
            flags=("--data.path={folder}/d.jsonl",),
            preferences=True,
            prepare=lambda folder, lines=lines: (folder / "d.jsonl").write_text("\n".join(lines) + "\n"),
        )
    for flag, values in {
        "model.combiner.thresholds": ("{kind: 1.2}", "{kind: .nan}", "{nothing: 0.5}", "{good: 0.5}", "x"),
        "model.combiner.primary": ("nothing", "1"),
        "model.combiner.tau": ("0", "-1", ".nan", "x"),
        "model.combiner.radius": ("-1", ".nan", "x"),
        "model.combiner.beta": ("0", "2", ".nan"),
        "model.combiner.dual.lr": ("0", "-1", ".nan", ".inf"),
        "model.loss.max_weight": ("0", "-1", ".nan"),
        "model.reference.interval": ("0", "-1", "1.5"),
        "model.source.max_response_length": ("0", "1", "4", "x"),
        "model.source.win_scale": ("0", "-1", ".nan"),
        "data.format": ("Nothing", "SafeRLHF", "ChosenRejected", "1"),
        "data.on_bad_row": ("ignore",),
        "data.val_size": ("99", "-1"),
    }.items():
        for value in values:
            yield Case("preferences", f"{flag}={value}", flags=(f"--{flag}={value}",), preferences=True)
    good = [json.dumps(preference_row(i)) for i in range(16)]
    for i in range(8):
        lines = list(good)
        at = numbers.randrange(len(lines))
        characters = list(lines[at])
        for _ in range(3):
            characters[numbers.randrange(len(characters))] = numbers.choice('{}[]:,"0ax')
        lines[at] = "".join(characters)
        yield Case(
            "preferences",
            f"random damage {i}",
            "either",
            flags=("--data.path={folder}/d.jsonl",),
            late=True,
            preferences=True,
            prepare=lambda folder, lines=lines: (folder / "d.jsonl").write_text("\n".join(lines) + "\n"),
        )


def preference_row(i: int) -> dict[str, Any]:
    """The ith row of good preference data."""
    return {
        "prompt": ["the film was", "the plot was very"][i % 2],
        "responses": ["good and fine", "bad and dull and long"],
        "preferences": {"good": {"winner": i % 2}, "kind": {"probability": 0.25 * (i % 5)}},
    }


def _rewards() -> Iterator[Case]:
    for name, late in {
        "raises_value_error": True,
        "raises_key_error": True,
        "raises_type_error": True,
        "exits_0": True,
        "exits_1": True,
        "asserts": True,
        "one_too_few": True,
        "one_too_many": True,
        "none_at_all": True,
        "a_number": True,
        "a_text": True,
        "texts": True,
        "lists": True,
        "complexes": True,
        "a_generator_too_short": True,
        "silent": True,
        "always_nan": True,
        "always_infinite": True,
        "no_arguments": True,
        "needs_another_column": False,
        "not_a_function": False,
    }.items():
        flag = f"--model.objectives.good.reward.function=bench.fuzz.rewards.{name}"
        steps = ("--trainer.max_steps=40", "--trainer.val_check_interval=40", "--checkpoint.every_n_train_steps=40")
        yield Case("rewards", name, flags=(flag, *steps), late=late)
    for name in (
        "no_completions",
        "generator",
        "integers",
        "booleans",
        "tensors",
        "huge",
        "mostly_none",
        "array",
        "sorts_in_place",
    ):
        flag = f"--model.objectives.good.reward.function=bench.fuzz.rewards.{name}"
        yield Case("rewards", f"good: {name}", "accept", flags=(flag,))
    module = "--model.objectives.good.reward.function=own_rewards.f"
    for name, text in {
        "module with a syntax error": "def f(:\n",
        "module that raises": "raise KeyError('x')\n",
        "module that exits": "import sys\nsys.exit(0)\n",
        "module that imports nothing": "import there_is_no_such_module\n",
        "module without the function": "def g(prompts, completions, **columns): return [0.0] * len(prompts)\n",
        "module with a class": "class f: pass\n",
        "empty module": "",
    }.items():
        yield Case(
            "rewards",
            name,
            flags=(module,),
            late=name.endswith("class"),
            prepare=lambda folder, text=text: (folder / "own_rewards.py").write_text(text),
        )


def _policies() -> Iterator[Case]:
    def damage(change: Callable[[Path], object]) -> Callable[[Path], object]:
        def prepare(folder: Path) -> None:
            copy_policy(folder / "policy")
            change(folder / "policy")

        return prepare

    def half(name: str) -> Callable[[Path], object]:
        return lambda policy: (policy / name).write_bytes(
            (policy / name).read_bytes()[: (policy / name).stat().st_size // 2]
        )

    def text(name: str, content: str) -> Callable[[Path], object]:
        return lambda policy: (policy / name).write_text(content)

    def setting(name: str, value: Any) -> Callable[[Path], object]:
        def change(policy: Path) -> None:
            config = json.loads((policy / "config.json").read_text())
            (policy / "config.json").write_text(json.dumps({**config, name: value}))

        return change

    for name, change in {
        "no config": lambda policy: (policy / "config.json").unlink(),
        "no weights": lambda policy: (policy / "model.safetensors").unlink(),
        "no tokenizer": lambda policy: [(policy / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        "config cut off": half("config.json"),
        "weights cut off": half("model.safetensors"),
        "tokenizer cut off": half("tokenizer.json"),
        "config no JSON": text("config.json", "hello"),
        "config a list": text("config.json", "[]"),
        "config empty": text("config.json", "{}"),
        "weights are text": text("model.safetensors", "hello"),
        "weights empty": text("model.safetensors", ""),
        "unknown architecture": setting("model_type", "nothing"),
        "another size": setting("n_embd", 64),
        "negative size": setting("n_layer", -1),
        "a text for a size": setting("n_head", "x"),
        "vocabulary too small": setting("vocab_size", 4),
        "adapter of nothing": text(
            "adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "/no/where"}'
        ),
        "adapter no JSON": text("adapter_config.json", "hello"),
        "adapter of an unknown kind": text("adapter_config.json", '{"peft_type": "NOTHING"}'),
        "deep config": text("config.json", '{"a": ' * 3000 + "1" + "}" * 3000),
    }.items():
        yield Case("policies", name, flags=("--model.policy.path={folder}/policy",), prepare=damage(change))
    yield Case("policies", "a file", flags=("--model.policy.path={folder}/a-file",))
    yield Case(
        "policies",
        "an empty folder",
        flags=("--model.policy.path={folder}/e",),
        prepare=lambda folder: (folder / "e").mkdir(),
    )
    yield Case("policies", "a pickle", flags=("--model.policy.path={folder}/policy",), prepare=damage(_pickled))


def _pickled(policy: Path) -> None:
    (policy / "model.safetensors").unlink()
    (policy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


def copy_policy(target: Path) -> None:
    """The good policy, to be damaged."""
    import shutil

    shutil.copytree(target.parents[1] / "policy", target)


def _resumed() -> Iterator[Case]:
    steps = "--trainer.max_steps=2"
    yield Case("resumed", "good: as it was", "accept", (steps,), resumed=True)
    for name, flags in {
        "another combiner": ("--model.combiner=Linear",),
        "another reference": ("--model.reference=LaggedCopy", "--model.reference.interval=1"),
        "another adapter": ("--model.policy.lora={r: 2}",),
        "another KL": ("--model.kl=LossKL",),
        "another optimiser": ("--model.optimizer=SGD", "--model.optimizer.lr=0.1"),
        "another objective": ("--model.objectives.more.reward=Length",),
    }.items():
        yield Case("resumed", name, flags=(steps, *flags), resumed=True)


def _changed(settings: Settings, path: str, value: Any) -> Settings:
    """A copy with one setting replaced."""
    first, _, rest = path.partition(".")
    return {**settings, first: _changed(settings[first], rest, value) if rest else value}
