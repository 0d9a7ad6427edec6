"""Figures of models that were trained with several seeds each: spread, paired differences, tables of them.

The same seeds train every model, so what a seed does to all of them alike drops out of a difference: its interval is
that of the differences seed by seed, far narrower than two figures with their spreads suggest.

    rows = compare({0: [run, ...], 5: [run, ...]}, ("free_energy", "nll"))    # a run for each seed

A run is ``{"all": {figure: mean}, LABEL: {figure: mean}, ...}``: over all test images, and over each class alone.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from planar_vae_jax.statistics import mean_and_interval, with_error, with_interval

Run = Mapping[str, Mapping[str, Any]]
ONE_SEED = "One seed: there is no standard deviation over seeds, and no interval."


def compare(runs: Mapping[int, Sequence[Run]], figures: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each flow length, the differences being to the first.

    Args:
        runs: flow length -> a run for each seed, the same seeds in the same order.
        figures: names of what is compared.

    Returns:
        ``{"flows", NAME: {"mean", "std", "by_seed"}, ..., "minus_first": {NAME: {"mean", "low", "high"}, ...},
        "per_class": {LABEL: {the same but for "flows" and "per_class"}}}``, where ``low`` and ``high`` bound the 95 %
        interval of the paired difference by Student's t. What one seed does not tell, or is not finite, is ``None``.
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
    """Means over the images of all classes, from those of each class and its number of ``"images"``."""
    weights = np.array([row["images"] for row in classes.values()], np.float64)
    means = {name: np.array([row.get(name) for row in classes.values()], np.float64) for name in figures}
    return {name: _finite(float(np.average(values, weights=weights))) for name, values in means.items()}


def latent_units(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``active_units``, and ``kl_by_dimension`` of z_K (largest first; ``None``: not known), the mean over models.

    Args:
        models: ``active_units`` of the summary of each, see :func:`planar_vae_jax.analysis.latent.active_units`.
    """
    kl = [sorted(model["kl"], reverse=True) for model in models if "kl" in model]
    return {
        "active_units": float(np.mean([model["count"] for model in models])),
        "kl_by_dimension": np.mean(kl, axis=0).tolist() if len(kl) == len(models) else None,
    }


# --- Tables


def markdown(rows: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> str:
    """The rows of :func:`compare` as Markdown: all images, then each figure by class."""
    seeds, first = len(rows[0][figures[0]]["by_seed"]), rows[0]["flows"]
    head = ["K", *(name.replace("_", " ") for name in figures)]
    parts = [
        f"Mean ± standard deviation over {seeds} seeds." if seeds > 1 else ONE_SEED,
        _markdown([head, *([f"{row['flows']}", *(spread_text(row[name]) for name in figures)] for row in rows)]),
    ]
    if len(rows) > 1:
        interval = " and its 95 % interval by Student's t over seeds" if seeds > 1 else ""
        minus = [
            [f"{row['flows']}", *(interval_text(row["minus_first"][name]) for name in figures)] for row in rows[1:]
        ]
        parts += [f"Difference to K = {first}, paired by seed{interval}.", _markdown([head, *minus])]
    for name in _known_by_class(rows, figures):
        parts += [f"By class: {name.replace('_', ' ')}.", _by_class(rows, name)]
    return "\n\n".join(parts) + "\n"


def _known_by_class(rows: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> list[str]:
    groups = [group for row in rows for group in row["per_class"].values()]
    return [name for name in figures if any(group[name]["mean"] is not None for group in groups)]


def kl_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: what each latent dimension carries, for each length; empty for runs of older versions."""
    known = [row for row in rows if None not in row["kl_by_dimension"]]
    head = """KL of q(z_K|x) to the prior by latent dimension, largest first, as if normal and independent
(nats; mean over images and seeds; those below 0.01 are counted).

| K | KL by dimension |
|---|---|
"""
    return head * bool(known) + "".join(f"| {row['flows']} | {_spectrum(row['kl_by_dimension'])} |\n" for row in known)


def _spectrum(by_seed: Sequence[Sequence[float]]) -> str:
    kl = np.mean(by_seed, axis=0)
    carried = " ".join(f"{value:.2f}" for value in kl if value >= 0.01)
    rest = int(np.sum(kl < 0.01))
    return f"{carried}{f' and {rest} below' * (rest > 0)}".strip()


def _by_class(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    first = rows[0]["flows"]
    head = ["class", *(f"K = {row['flows']}" for row in rows), *(f"{row['flows']} minus {first}" for row in rows[1:])]
    lines = [head]
    for label in ("all", *rows[0]["per_class"]):
        groups = [row if label == "all" else row["per_class"][label] for row in rows]
        differences = [interval_text(group["minus_first"][name]) for group in groups[1:]]
        lines.append([label, *(spread_text(group[name]) for group in groups), *differences])
    return _markdown(lines)


def spread_text(spread: Mapping[str, Any]) -> str:
    """``96.52 ± 0.24``, mean and standard deviation over seeds."""
    return with_error(spread["mean"], spread["std"])


def interval_text(difference: Mapping[str, Any]) -> str:
    """``-0.52 [-0.61, -0.43]``."""
    return with_interval(difference["mean"], difference["low"], difference["high"])


def halves(differences: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """For a table: each difference, and half of its interval's width."""
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
    """The same as CSV, all digits: a line for each class (``all`` first), flow length and figure."""
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
