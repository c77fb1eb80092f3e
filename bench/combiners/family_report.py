"""The rows of ``bench.combiners.family``, and how they are printed."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One combiner with N objectives. Seconds and bytes are of one step."""

    combiner: str
    kind: str
    loss: str
    objectives: int
    added_seconds: float
    step_seconds: float  # with Linear and the same loss
    added_bytes: int
    step_bytes: int
    limit: float | None

    @property
    def time_share(self) -> float:
        """Of the step's time."""
        return self.added_seconds / self.step_seconds

    @property
    def memory_share(self) -> float:
        """Of the step's peak."""
        return self.added_bytes / self.step_bytes

    @property
    def holds(self) -> bool | None:
        """Whether what is claimed was measured; ``None`` where nothing is."""
        return None if self.limit is None else max(self.time_share, self.memory_share) <= self.limit

    def numbers(self) -> dict[str, Any]:
        """For a JSON file."""
        shares = {"time_share": self.time_share, "memory_share": self.memory_share, "holds": self.holds}
        return asdict(self) | shares


HEAD = f"{'combiner':26}{'kind':28}{'N':>3}{'time':>11}{'':>9}{'memory':>11}{'':>9}{'limit':>8}"
UNITS = f"{'':26}{'':28}{'':>3}{'ms':>11}{'/step':>9}{'MB':>11}{'/step':>9}"


def table_line(row: Row) -> str:
    """One row of the printed table."""
    limit = "" if row.limit is None else f"{row.limit:.0%}"
    return (
        f"{row.combiner:26}{row.kind:28}{row.objectives:3}{1e3 * row.added_seconds:11,.2f}{row.time_share:9.2%}"
        f"{row.added_bytes / 1e6:11,.3f}{row.memory_share:9.2%}{limit:>8}{'  FAILS' if row.holds is False else ''}"
    )


def step_lines(rows: Sequence[Row]) -> list[str]:
    """What the rows of one number of objectives are compared with."""
    of_loss = {row.loss: row for row in rows}
    return [
        f"  a step with Linear and {loss}: {row.step_seconds:.3g} s, {row.step_bytes / 1e6:,.0f} MB"
        for loss, row in of_loss.items()
    ]


def claims_line(rows: Sequence[Row]) -> str:
    """How many claims hold, and which do not."""
    claimed = [row for row in rows if row.holds is not None]
    failed = [f"{row.combiner} with N = {row.objectives}" for row in claimed if not row.holds]
    but = f"; not {', '.join(failed)}" if failed else ""
    return f"{len(claimed) - len(failed)} of {len(claimed)} claims hold{but}."
