"""Means with their errors, and comparisons of models that were trained with several seeds each.

``mean_and_error``, ``means_and_errors`` and ``mean_and_interval`` compute figures; ``with_error`` and ``with_interval``
format them with no more digits than the error supports. ``compare`` makes a table of models:

    rows = compare({0: [run, ...], 5: [run, ...]}, ("free_energy", "nll"))    # by flow length, one run for each seed

The same seeds train every model, so an effect that a seed has on all models alike drops out of their difference. The
interval is that of the paired differences, one for each seed; it is far narrower than the spreads of the two figures
suggest. ``tables`` returns the rows as texts in cells, ``markdown`` and ``comma_separated`` as one text.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# {"all": {figure: mean}, LABEL: {figure: mean}, ...}: over all test images, and over each class.
Run = Mapping[str, Mapping[str, Any]]
ONE_SEED = "One seed: there is no standard deviation over seeds, and no interval."


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """Returns the mean of independent figures ``[N]`` and its standard error (None if N = 1), computed in float64."""
    values = np.asarray(values, np.float64)
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(np.mean(values)), error


def means_and_errors(figures: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """Returns ``{name: mean, name_se: its standard error}`` for figures by name, each ``[N]``."""
    result: dict[str, float | None] = {}
    for name, values in figures.items():
        result[name], result[f"{name}_se"] = mean_and_error(values)
    return result


def with_error(mean: float | None, error: float | None) -> str:
    """Returns ``99.12 ± 0.25``: the error to two digits, the mean to the same place; ``-`` without a finite mean."""
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


def mean_and_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float | None, float | None]:
    """Returns ``(mean, low, high)`` of independent figures ``[N]``: their mean and its interval by Student's t.

    ``low`` and ``high`` are None if N = 1.
    """
    mean, error = mean_and_error(values)
    if error is None:
        return mean, None, None
    from scipy.stats import t as student_t  # takes half a second to import

    reach = float(student_t.ppf(0.5 + confidence / 2, len(values) - 1)) * error
    return mean, mean - reach, mean + reach


def with_interval(mean: float | None, low: float | None, high: float | None) -> str:
    """Returns ``-0.52 [-0.61, -0.43]``, to two digits of the half width; the mean alone without an interval."""
    if mean is None or low is None or high is None or not math.isfinite(high - low):
        return with_error(mean, None)
    if high == low:
        return f"{mean:.6g} [{low:.6g}, {high:.6g}]"
    _, _, reach = with_error(mean, (high - low) / 2).partition(" ± ")
    digits = len(reach.partition(".")[2]) if "e" not in reach else 0
    rounded = [round(value, digits) + 0.0 for value in (mean, low, high)]  # no -0.0
    return "{:.{digits}f} [{:.{digits}f}, {:.{digits}f}]".format(*rounded, digits=digits)


# --- Comparison of models over seeds


def compare(runs: Mapping[int, Sequence[Run]], figures: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row for each flow length, with differences to the first.

    Args:
        runs: for each flow length one run per seed, with the same seeds in the same order.
        figures: names of the figures to compare.

    Returns:
        ``{"flows", NAME: {"mean", "std", "by_seed"}, ..., "minus_first": {NAME: {"mean", "low", "high"}, ...},
        "per_class": {LABEL: {the same but for "flows" and "per_class"}}}``, where ``low`` and ``high`` bound the 95 %
        interval of the paired difference by Student's t. A value is None if it needs more than one seed, or is not
        finite.
    """
    first = next(iter(runs.values()))
    labels = [label for label in first[0] if label != "all"]
    return [
        {
            "flows": flows,
            **_group(ours, first, "all", figures),
            "per_class": {label: _group(ours, first, label, figures) for label in labels},
        }
        for flows, ours in runs.items()
    ]


def _group(ours: Sequence[Run], first: Sequence[Run], label: str, figures: Sequence[str]) -> dict[str, Any]:
    here, there = (
        {name: np.array([run[label].get(name) for run in runs], np.float64) for name in figures}
        for runs in (ours, first)
    )
    minus_first = {name: _interval(here[name] - there[name]) for name in figures}
    return {**{name: _spread(here[name]) for name in figures}, "minus_first": minus_first}


def _spread(values: np.ndarray) -> dict[str, Any]:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    by_seed = [_finite(value) for value in values.tolist()]
    return {"mean": _finite(float(np.mean(values))), "std": _finite(std), "by_seed": by_seed}


def _interval(differences: np.ndarray) -> dict[str, float | None]:
    return dict(zip(("mean", "low", "high"), map(_finite, mean_and_interval(differences)), strict=True))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def pooled(classes: Mapping[str, Mapping[str, Any]], figures: Sequence[str]) -> dict[str, float | None]:
    """Returns means over the images of all classes, from the means of each class and its number of ``"images"``."""
    weights = np.array([row["images"] for row in classes.values()], np.float64)
    means = {name: np.array([row.get(name) for row in classes.values()], np.float64) for name in figures}
    return {name: _finite(float(np.average(values, weights=weights))) for name, values in means.items()}


def latent_units(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the means over models of ``active_units`` and of ``kl_by_dimension`` of z_K (nats, largest first).

    Args:
        models: the entry ``active_units`` of each model's summary
            (:func:`planar_vae_jax.analysis.latent.active_units`).
    """
    return {
        "active_units": float(np.mean([model["count"] for model in models])),
        "kl_by_dimension": np.mean([sorted(model["kl"], reverse=True) for model in models], axis=0).tolist(),
    }


# --- Tables


class Table(NamedTuple):
    """A table for people: texts in cells."""

    title: str
    rows: Sequence[Sequence[Any]]  # the head first; a cell is a text, or what the page of a run takes for one


def tables(rows: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> list[Table]:
    """Returns the rows of :func:`compare` as tables: figures of all images, their differences, each figure by class."""
    seeds, first = len(rows[0][figures[0]]["by_seed"]), rows[0]["flows"]
    head = ["K", *(name.replace("_", " ") for name in figures)]
    spreads = [[f"{row['flows']}", *(_spread_text(row[name]) for name in figures)] for row in rows]
    found = [Table(f"Mean ± standard deviation over {seeds} seeds." if seeds > 1 else ONE_SEED, [head, *spreads])]
    if len(rows) > 1:
        interval = " and its 95 % interval by Student's t over seeds" if seeds > 1 else ""
        minus = [
            [f"{row['flows']}", *(_interval_text(row["minus_first"][name]) for name in figures)] for row in rows[1:]
        ]
        found.append(Table(f"Difference to K = {first}, paired by seed{interval}.", [head, *minus]))
    by_class = _known_by_class(rows, figures)
    return found + [Table(f"By class: {name.replace('_', ' ')}.", _by_class(rows, name)) for name in by_class]


def kl_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the KL of each latent dimension, one line for each flow length.

    Args:
        rows: rows with ``"flows"``, and with ``"kl_by_dimension"`` of each seed (:func:`latent_units`).
    """
    title = """KL of q(z_K|x) to the prior by latent dimension, largest first, as if normal and independent
(nats; mean over images and seeds; those below 0.01 are counted)."""
    lines = [[f"{row['flows']}", _spectrum(row["kl_by_dimension"])] for row in rows]
    return Table(title, [["K", "KL by dimension"], *lines])


def markdown(tables: Sequence[Table]) -> str:
    """Returns tables as Markdown, each below its title."""
    return "\n\n".join(part for table in tables for part in (table.title, _markdown(table.rows))) + "\n"


def _known_by_class(rows: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> list[str]:
    groups = [group for row in rows for group in row["per_class"].values()]
    return [name for name in figures if any(group[name]["mean"] is not None for group in groups)]


def _spectrum(by_seed: Sequence[Sequence[float]]) -> str:
    kl = np.mean(by_seed, axis=0)
    carried = " ".join(f"{value:.2f}" for value in kl if value >= 0.01)
    rest = int(np.sum(kl < 0.01))
    return f"{carried}{f' and {rest} below' * (rest > 0)}".strip()


def _by_class(rows: Sequence[Mapping[str, Any]], name: str) -> list[list[str]]:
    first = rows[0]["flows"]
    head = ["class", *(f"K = {row['flows']}" for row in rows), *(f"{row['flows']} minus {first}" for row in rows[1:])]
    lines = [head]
    for label in ("all", *rows[0]["per_class"]):
        groups = [row if label == "all" else row["per_class"][label] for row in rows]
        differences = [_interval_text(group["minus_first"][name]) for group in groups[1:]]
        lines.append([label, *(_spread_text(group[name]) for group in groups), *differences])
    return lines


def _spread_text(spread: Mapping[str, Any]) -> str:
    """Returns ``96.52 ± 0.24``: mean and standard deviation over seeds."""
    return with_error(spread["mean"], spread["std"])


def _interval_text(difference: Mapping[str, Any]) -> str:
    """Returns ``-0.52 [-0.61, -0.43]``: mean and interval of a difference."""
    return with_interval(difference["mean"], difference["low"], difference["high"])


def halves(differences: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """Returns ``{name: mean difference, name_se: half the width of its interval}``, for a table."""
    found: dict[str, float | None] = {}
    for name, difference in differences.items():
        low, high = difference["low"], difference["high"]
        found[name] = difference["mean"]
        found[f"{name}_se"] = None if low is None or high is None else (high - low) / 2
    return found


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])


def comma_separated(rows: Sequence[Mapping[str, Any]], figures: Sequence[str], seeds: Sequence[int]) -> str:
    """Returns the rows of :func:`compare` as CSV with all digits: a line for each class, length and figure.

    The class ``all`` comes first.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    by_seed = [f"seed={seed}" for seed in seeds]
    writer.writerow(["class", "flows", "figure", "mean", "std", "minus_first", "low", "high", *by_seed])
    by_class = _known_by_class(rows, figures)
    for label in ("all", *rows[0]["per_class"]):
        for row in rows:
            group = row if label == "all" else row["per_class"][label]
            for name in figures if label == "all" else by_class:
                spread, minus = group[name], group["minus_first"][name]
                writer.writerow(
                    [label, row["flows"], name, spread["mean"], spread["std"], *minus.values(), *spread["by_seed"]]
                )
    return text.getvalue()
