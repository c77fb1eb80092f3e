"""Whether a threshold is met."""

import math

Z = 1.96
"""Half width of a normal 95 % interval in standard errors: evaluations are means over many prompts."""


def threshold_verdict(mean: float, std_error: float | None, threshold: float) -> str:
    """Whether the mean of a held-out evaluation meets a threshold: ``met``, ``missed`` or ``open``.

    It is ``met`` or ``missed`` where the 95 % interval of the mean lies on one side of the threshold, and ``open``
    where the interval holds it or is not known.

    Args:
        mean: of the objective's values, in the unit of the threshold.
        std_error: of the mean; ``None`` or NaN where one response was all there was.
        threshold: the least value that is wanted.

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
