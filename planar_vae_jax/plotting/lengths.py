"""Results of runs against the number of planar layers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from planar_vae_jax.plotting._layout import set_title


def against_length(
    lengths: Sequence[int],
    panels: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    title: str,
    published: Mapping[str, Mapping[str, Mapping[int, float]]] | None = None,
) -> Figure:
    """Draws one panel for each result: its mean over seeds against K, with the standard deviation as error bars.

    Args:
        lengths: K of each model.
        panels: label of a result -> ``{"mean", "std", "by_seed"}`` for each of ``lengths``; None if unknown.
        title: above all panels.
        published: name of a source -> label of a panel -> K -> value, drawn in the same panel for comparison.
    """
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained", dpi=120)
    set_title(figure, title)
    for axes, (label, spreads) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        means = [_number(spread["mean"]) for spread in spreads]
        deviations = [_number(spread["std"]) for spread in spreads]
        axes.errorbar(lengths, means, deviations, marker="o", markersize=4, capsize=3, label="this package")
        for length, spread in zip(lengths, spreads, strict=True):
            values = [_number(value) for value in spread["by_seed"]]
            axes.plot([length] * len(values), values, ".", color="tab:blue", alpha=0.4, markersize=4)
        for source, curves in (published or {}).items():
            if label in curves:
                axes.plot([*curves[label]], [*curves[label].values()], "s--", color="tab:orange", label=source)
        seeds = len(spreads[0]["by_seed"])
        axes.set(xlabel="K, the number of planar layers", ylabel=label)
        axes.set_title(f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if published:
            axes.legend(frameon=False)
    return figure


def _number(value: float | None) -> float:
    return math.nan if value is None else value
