"""The rows of ``bench.combiners.combine``, the ratios that follow from them, and how both are printed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Row:
    """One policy with N objectives. Seconds are for one update on all the plan's sequences."""

    policy: str
    parameters: int
    objectives: int
    shape: tuple[int, int, int]  # of the tensor that PAMA reads
    measured_sequences: int
    scaled: bool  # step, MGDA-UB and full gradient were measured on fewer sequences than stated
    step_seconds: float
    pama_seconds: float
    mgda_ub_seconds: float
    full_gradient_seconds: float
    gradient_bytes: int  # of the N gradients that the full-gradient solve holds

    @property
    def ratios(self) -> dict[str, float]:
        """The comparisons that survive another machine."""
        return {
            "pama_of_step": self.pama_seconds / self.step_seconds,
            "mgda_ub_over_pama": self.mgda_ub_seconds / self.pama_seconds,
            "full_gradient_over_pama": self.full_gradient_seconds / self.pama_seconds,
            "full_gradient_of_step": self.full_gradient_seconds / self.step_seconds,
        }


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The ratios that carry the claims: over N, over the policies, against the step and the full gradient."""
    over_n: dict[str, dict[str, float]] = {}
    for policy in dict.fromkeys(row.policy for row in rows):
        counts, seconds = zip(*((r.objectives, r.pama_seconds) for r in rows if r.policy == policy), strict=True)
        slope, start = np.polyfit(counts, seconds, 1)
        line = slope * np.array(counts) + start
        over_n[policy] = {
            "seconds_per_objective": float(slope),
            "seconds_at_0": float(start),
            "largest_distance_from_line": float(np.abs(np.array(seconds) / line - 1).max()),
            "last_over_first": seconds[-1] / seconds[0],
        }
    over_policies = {}
    for n in dict.fromkeys(row.objectives for row in rows):
        of_n = [row.pama_seconds for row in rows if row.objectives == n]
        over_policies[str(n)] = max(of_n) / min(of_n)
    sizes = [row.parameters for row in rows]
    return {
        "pama_over_n": over_n,
        "pama_over_policies": over_policies,
        "objectives_last_over_first": rows[-1].objectives / rows[0].objectives,
        "parameters_over_policies": max(sizes) / min(sizes),
        "largest_pama_seconds": max(row.pama_seconds for row in rows),
        "largest_pama_of_step": max(row.ratios["pama_of_step"] for row in rows),
        "smallest_full_gradient_over_pama": min(row.ratios["full_gradient_over_pama"] for row in rows),
        "largest_full_gradient_of_step": max(row.ratios["full_gradient_of_step"] for row in rows),
    }


HEAD = f"{'':34}{'step':>10}{'PAMA':>10}{'':8}{'MGDA-UB':>11}{'':8}{'full MGDA':>12}{'':18}{'held':>8}"
UNITS = (
    f"{'policy':8}{'parameters':>12}{'N':>4}{'measured':>10}{'s':>10}{'ms':>10}{'/step':>8}{'ms':>11}{'/PAMA':>8}"
    f"{'s':>12}{'/PAMA':>10}{'/step':>8}{'GB':>8}"
)


def table_line(row: Row) -> str:
    """One row of the printed table."""
    tilde, ratios = "~" if row.scaled else "", row.ratios
    measured = f"{row.measured_sequences}/{row.shape[0]}"
    return (
        f"{row.policy:8}{row.parameters:12,}{row.objectives:4}{measured:>10}"
        f"{tilde + format(row.step_seconds, '.3g'):>10}"
        f"{1e3 * row.pama_seconds:10.2f}{ratios['pama_of_step']:8.3%}"
        f"{tilde + format(1e3 * row.mgda_ub_seconds, ',.1f'):>11}{ratios['mgda_ub_over_pama']:7,.0f}x"
        f"{tilde + format(row.full_gradient_seconds, '.3g'):>12}{ratios['full_gradient_over_pama']:9,.0f}x"
        f"{ratios['full_gradient_of_step']:7.1f}x{row.gradient_bytes / 1e9:8.3f}"
    )


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The claims, each with its ratio."""
    fits = summary["pama_over_n"]
    lines = ["PAMA over N, least-squares line:"]
    lines += [
        f"  {policy:8} {1e3 * fit['seconds_at_0']:6.2f} ms + {1e3 * fit['seconds_per_objective']:.3f} ms x N, "
        f"at most {fit['largest_distance_from_line']:.0%} off that line; "
        f"N grows {summary['objectives_last_over_first']:.0f}x, the time {fit['last_over_first']:.1f}x"
        for policy, fit in fits.items()
    ]
    spread = ", ".join(f"N = {n}: {ratio:.2f}x" for n, ratio in summary["pama_over_policies"].items())
    parameters = f"{summary['parameters_over_policies']:,.0f}x"
    least = f"{summary['smallest_full_gradient_over_pama']:,.0f}x"
    most = f"{1e3 * summary['largest_pama_seconds']:.1f} ms"
    lines += [
        f"PAMA over policies: parameters grow {parameters}; its slowest over fastest, {spread}",
        f"PAMA at most: {most}; {summary['largest_pama_of_step']:.2%} of a step",
        f"Full MGDA: {least} PAMA or more; up to {summary['largest_full_gradient_of_step']:.1f}x a step",
    ]
    return lines
