"""Whether a threshold is met."""

import math

Z = 1.96
"""Half width of a normal 95 % interval in standard errors: evaluations are means over many prompts."""


def threshold_verdict(mean: float, std_error: float | None, threshold: float) -> str:
    """Whether the mean of a held-out evaluation meets a threshold: ``met``, ``missed`` or ``open``.

    It is ``met`` or ``missed`` if the 95 % interval of the mean is on one side of the threshold, and ``open`` if the
    interval contains it or is unknown.

    Args:
        mean: of the objective's values, in the unit of the threshold.
        std_error: of the mean; ``None`` or NaN if there was only one response.
        threshold: lower bound of the mean.

    Example:
        >>> threshold_verdict(-0.7, 0.01, -0.1)
        'missed'
        >>> threshold_verdict(0.59, 0.01, 0.6)
        'open'
    """
    distance, half_width = mean - threshold, math.nan if std_error is None else Z * std_error
    if math.isnan(distance) or not abs(distance) > half_width:  # an unknown half width compares as False
        return "open"
    return "met" if distance > 0 else "missed"
