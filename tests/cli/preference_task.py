"""A run of MOPO on labelled pairs, as a YAML that tests change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.helpers import pairs, tiny

LABEL = {"class_path": "FromLabels"}


def settings(folder: Path) -> dict[str, Any]:
    """A run of MOPO."""

    def label(name: str) -> dict[str, Any]:
        return {"reward": {**LABEL, "init_args": {"label": name}}}

    return {
        "seed_everything": 7,
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "max_steps": 6,
            "val_check_interval": 3,
            "accelerator": "cpu",
            "enable_progress_bar": False,
        },
        "data": {
            "class_path": "Preferences",
            "init_args": {"path": str(folder / "data.jsonl"), "val_size": 4, "batch_size": 4},
        },
        "model": {
            "policy": {"path": str(folder / "tiny")},
            "objectives": {
                "good": label("good"),
                "kind": label("kind"),
                "short": {
                    "reward": {
                        "class_path": "FunctionReward",
                        "init_args": {"function": f"{pairs.__name__}.shortness"},
                    }
                },
            },
            "combiner": {
                "class_path": "MOPO",
                "init_args": {
                    "primary": "good",
                    "thresholds": {"kind": 0.6, "short": 0.45},
                    "dual": {"class_path": "Projected", "init_args": {"lr": 1.0}},
                },
            },
            "loss": {"class_path": "WeightedLikelihood", "init_args": {"max_weight": 4.0}},
            "source": {"class_path": "PreferenceRows", "init_args": {"max_response_length": 8}},
            "reference": {"class_path": "LaggedCopy", "init_args": {"interval": 2}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
        },
    }


def make(folder: Path) -> Path:
    tiny.policy_folder(folder / "tiny", scale=1.0)
    pairs.write(folder / "data.jsonl")
    (folder / "run.yaml").write_text(yaml.safe_dump(settings(folder), sort_keys=False))
    return folder


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    given = settings(folder)
    change(given)
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path
