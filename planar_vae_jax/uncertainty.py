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
