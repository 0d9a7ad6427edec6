"""Means with their standard errors, and no more digits than these bear."""

import math
from collections.abc import Mapping

import numpy as np


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """Mean of independent figures ``[N]`` and its standard error (None for a single one), summed in float64."""
    values = np.asarray(values, np.float64)
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(np.mean(values)), error


def means_and_errors(figures: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """``{name: mean, name_se: its standard error}`` of figures by name, ``[N]`` each."""
    result: dict[str, float | None] = {}
    for name, values in figures.items():
        result[name], result[f"{name}_se"] = mean_and_error(values)
    return result


def with_error(mean: float | None, error: float | None) -> str:
    """``99.12 ± 0.25``: the standard error to two digits, the mean as far as that; ``-`` where there is no mean."""
    if mean is None or not math.isfinite(mean):
        return "-"
    if error is None or not math.isfinite(error):
        return f"{mean:.4g}"
    if error == 0.0:
        return f"{mean:.6g} ± 0"
    if abs(mean) >= 1e6:
        return f"{mean:.4g} ± {error:.2g}"
    exponent = int(f"{error:.1e}".split("e")[1])
    digits = min(max(0, 1 - exponent), 12)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def student_t_quantile(probability: float, degrees: int) -> float:
    """The ``t`` that Student's distribution with so many degrees of freedom stays below with that probability.

    For whole degrees the distribution is a finite sum (Abramowitz & Stegun, 26.7.3 and 26.7.4), which grows with the
    angle ``arctan(t / sqrt(degrees))``: that is bisected.

    Raises:
        ValueError: the probability does not lie between 0 and 1, or there is no degree of freedom.
    """
    if not 0.0 < probability < 1.0 or degrees < 1:
        raise ValueError(f"wanted a probability between 0 and 1 and degrees >= 1; got {probability} and {degrees}")
    low, high = -math.pi / 2, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_t_cdf(middle, degrees) < probability else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _student_t_cdf(angle: float, degrees: int) -> float:
    odd = degrees % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for power in range(2 + odd, degrees + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power - 1) / power
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return 0.5 + 0.5 * inside


def mean_and_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float | None, float | None]:
    """Mean of independent figures ``[N]`` and its confidence interval by Student's t (None, None for a single one)."""
    mean, error = mean_and_error(values)
    if error is None:
        return mean, None, None
    reach = student_t_quantile(0.5 + confidence / 2, len(values) - 1) * error
    return mean, mean - reach, mean + reach


def with_interval(mean: float | None, low: float | None, high: float | None) -> str:
    """``-0.52 [-0.61, -0.43]``, with the digits that the interval bears; the mean alone where there is none."""
    if mean is None or low is None or high is None or not math.isfinite(high - low):
        return with_error(mean, None)
    if high == low:
        return f"{mean:.6g} [{low:.6g}, {high:.6g}]"
    _, _, reach = with_error(mean, (high - low) / 2).partition(" ± ")
    digits = len(reach.partition(".")[2]) if "e" not in reach else 0
    rounded = [round(value, digits) + 0.0 for value in (mean, low, high)]  # no -0.0
    return "{:.{digits}f} [{:.{digits}f}, {:.{digits}f}]".format(*rounded, digits=digits)
