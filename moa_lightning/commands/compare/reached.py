"""What a finished run reached, read from its summary."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_lightning.errors import UserError


@dataclass(frozen=True)
class Reached:
    """The end of one run. Means are of values; NaN where a run recorded raw means only and values do not follow."""

    run: str
    combiner: str
    steps: int
    mean: dict[str, float]
    interval: dict[str, float]  # half width of the 95 % interval; NaN where it is not known
    raw: dict[str, float]  # means of raw scores, of objectives whose value is not the raw score
    transform: dict[str, str | None]  # how values follow from raw scores, in words; None where nobody knows
    thresholds: dict[str, float]
    verdict: dict[str, str]  # of each threshold: met, missed, open or unknown
    lacks: tuple[str, ...]  # lines on what an old run did not record

    def cell(self, name: str) -> str:
        """Mean and interval, and the raw mean where it is another number."""
        if math.isnan(self.mean[name]):
            return f"? (raw {self.raw[name]:.3f})"
        interval = "" if math.isnan(self.interval[name]) else f" ± {self.interval[name]:.3f}"
        raw = f" (raw {self.raw[name]:.3f})" if name in self.raw else ""
        return f"{self.mean[name]:.3f}{interval}{raw}"


def read(run: str) -> Reached:
    """The end of a run, from its folder or its ``summary.json``.

    Raises:
        UserError: it holds no summary.
    """
    import yaml

    from moa_lightning.commands.run_summary import in_values, verdict
    from moa_lightning.functional.verdict import Z

    path = Path(run) / "summary.json" if Path(run).is_dir() else Path(run)
    config = path.with_name("config.yaml")
    try:
        recorded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
        summary, lacks = in_values(recorded, settings)
        objectives = summary["objectives"]
        thresholds = {name: t for name, t in summary.get("thresholds", {}).items() if name in objectives}
        return Reached(
            run,
            summary["combiner"],
            summary["steps"],
            mean={name: _number(o["end"]) for name, o in objectives.items()},
            interval={name: Z * _number(o["std_error"]) for name, o in objectives.items()},
            raw={name: _number(o["raw_end"]) for name, o in objectives.items() if "raw_end" in o},
            transform={name: o["transform"] for name, o in objectives.items()},
            thresholds=thresholds,
            verdict={name: verdict(summary, name) for name in thresholds},
            lacks=tuple(lacks),
        )
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"'{run}' holds no summary.json of a run; give folders that moa fit wrote") from error


def _number(recorded: float | None) -> float:
    return math.nan if recorded is None else recorded
