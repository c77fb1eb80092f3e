"""What ``summary.json`` says of a run, read again: means of values, and which thresholds they meet."""

from collections.abc import Mapping, Sequence
from typing import Any

from moa_lightning.functional.verdict import threshold_verdict


def verdict(summary: Mapping[str, Any], name: str) -> str:
    """Whether the last held-out evaluation meets an objective's threshold; empty without one.

    ``unknown`` where the run recorded no mean in the threshold's unit.
    """
    threshold = summary.get("thresholds", {}).get(name)
    numbers = (summary.get("objectives") or {}).get(name)
    if threshold is None or numbers is None:
        return ""
    if numbers["end"] is None:
        return "unknown"
    return threshold_verdict(numbers["end"], numbers["std_error"], threshold)


def in_values(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A summary whose numbers are means of values, and what it lacks if it is an old one.

    Old summaries hold means of raw scores alone. Where value and raw score are the same nothing changes; with a scale
    and a shift the means of values follow exactly; with a clip they do not, and are None.

    Args:
        summary: as in ``summary.json``.
        settings: the run's ``config.yaml``; empty without one.

    Returns:
        The summary, and a line for each thing that was recomputed or is missing.
    """
    found, objectives = dict(summary), summary.get("objectives") or {}
    old = [name for name, numbers in objectives.items() if "transform" not in numbers]
    if not old:
        return found, []
    upgraded = {name: _upgraded(objectives[name], settings, name) for name in old}
    found["objectives"] = {name: upgraded.get(name, numbers) for name, numbers in objectives.items()}
    recomputed = [n for n, numbers in upgraded.items() if numbers["transform"] and numbers["end"] is not None]
    missing = [n for n, numbers in upgraded.items() if numbers["end"] is None]
    if recomputed or missing:
        found["hypervolume"] = None  # it is of raw scores
    lines = []
    if recomputed:
        how = ", ".join(f"{name} = {upgraded[name]['transform']}" for name in recomputed)
        lines.append(f"recorded raw means only; means of values follow from its config.yaml ({how})")
    if missing:
        lines.append(
            f"recorded raw means only, from which the values of {', '.join(missing)} do not follow ("
            + ("clipped" if all(upgraded[n]["transform"] for n in missing) else "no config.yaml says their scale")
            + "): no verdict, no place on the front"
        )
    return found, lines


def _upgraded(numbers: Mapping[str, Any], settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One objective's numbers of an old summary, as a new one would have them."""
    from moa_lightning.rewards.base import transform_in_words

    raw = {f"raw_{key}": numbers.get(key) for key in ("start", "end", "std_error", "start_std_error")}
    unit = _unit(settings, name)
    words = None if unit is None else transform_in_words(*unit)
    if words == "":
        return {**numbers, "transform": ""}
    if unit is None or unit[2] is not None:
        return {**raw, "start": None, "end": None, "std_error": None, "start_std_error": None, "transform": words}
    scale, shift, _ = unit
    return {
        **raw,
        "start": scale * numbers["start"] + shift,
        "end": scale * numbers["end"] + shift,
        "std_error": _times(abs(scale), numbers["std_error"]),
        "start_std_error": _times(abs(scale), numbers.get("start_std_error")),
        "transform": words,
    }


def _times(factor: float, number: float | None) -> float | None:
    return None if number is None else factor * number


def _unit(settings: Mapping[str, Any], name: str) -> tuple[float, float, Sequence[float] | None] | None:
    """Scale, shift and clip between the recorded means of an objective and its values; None where nobody knows."""
    from moa_lightning.sources import PreferenceRows, Rollout
    from moa_lightning.utils.import_path import import_dotted

    model = settings.get("model") or {}
    if name not in model.get("objectives", {}):
        return None
    try:
        source = import_dotted((model.get("source") or {}).get("class_path", "moa_lightning.sources.Rollout"))
    except ValueError:  # of the user's own, and not here
        return None
    asked = model["objectives"][name]
    if issubclass(source, PreferenceRows):  # it evaluates win probabilities, which are made of values
        return 1.0, 0.0, None
    if issubclass(source, Rollout):
        return asked.get("scale", 1.0), asked.get("shift", 0.0), asked.get("clip")
    return None
