"""Losses: over time, and by class."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from planar_vae_jax.plotting.layout import set_title
from planar_vae_jax.plotting.text import plain
from planar_vae_jax.statistics import with_error

TALLEST = 100.0  # inches, of the bars by class


def loss_curves(epochs: np.ndarray, curves: Mapping[str, np.ndarray], *, title: str, ylabel: str) -> Figure:
    """One quantity against epochs, with the first value on the left and without it on the right (figures 5 and 6).

    Args:
        epochs: ``[T]``, epochs (whole or fractions) at which the losses were taken.
        curves: name -> ``[T]`` losses, as of training and of validation or test images.
    """
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    set_title(figure, title)
    names, style = plain(curves)
    panels = figure.subplots(1, 2)
    for axes, first, label in zip(panels, (0, 1), ("with", "without"), strict=True):
        lines = [axes.plot(epochs[first:], y[first:], linewidth=1.5, marker=".")[0] for y in curves.values()]
        if len(epochs[first:]) == 1:
            axes.set_xlim(epochs[first] - 1, epochs[first] + 1)
        axes.set(xlabel="epoch", ylabel=ylabel, title=f"{label} the first iteration")
        _whole_ticks(axes)
    legend = figure.legend(lines, names, loc="outside lower center", ncols=len(names), frameon=False)
    for text in legend.get_texts():
        text.set(**style)
    return figure


def class_losses(
    losses: Mapping[str, float], *, title: str, label: str, errors: Mapping[str, float] | None = None
) -> Figure:
    """Test loss by class ("each category"): a bar a class with its value beside it.

    Args:
        losses: class -> mean loss.
        errors: class -> standard error of that mean, not finite where there is none, as of a single image.
    """
    deviations = [(errors or {}).get(name, math.nan) for name in losses]
    figure = Figure(figsize=(7, min(TALLEST, 0.32 * len(losses)) + 0.8), layout="constrained", dpi=120)
    set_title(figure, title, size=10)
    axes = figure.subplots()
    places, values = range(len(losses)), list(losses.values())
    bars = axes.barh(places, values, xerr=deviations if errors else None, color="tab:blue", capsize=3)
    texts = [with_error(value, error) for value, error in zip(values, deviations, strict=True)]
    axes.bar_label(bars, texts, padding=4, fontsize=9)
    names, style = plain(losses)
    axes.set_yticks(places, names, **style)
    axes.set(xlabel=f"{label}, ± standard error" if errors else label, ylabel="class")
    axes.margins(x=0.25)
    axes.invert_yaxis()
    return figure


def kl_curve(steps: np.ndarray, kl: np.ndarray, *, title: str) -> Figure:
    """KL in nats, each ``kl [T]`` the mean over the steps up to ``steps [T]``: linear, and on a logarithmic axis."""
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    set_title(figure, title)
    # An estimate near 0 is below 0 half of the time; it has no place on a logarithmic axis.
    positive = np.where(kl > 0.0, kl, np.nan)
    for axes, values, label in zip(figure.subplots(1, 2), (kl, positive), ("linear", "logarithmic"), strict=True):
        axes.plot(steps, values, linewidth=1.0, marker=".", markersize=4)
        axes.set(xlabel="step", ylabel="KL estimate (nats)", title=label)
        _whole_ticks(axes)
    if np.any(kl > 0.0):
        axes.set_yscale("log")
    return figure


def _whole_ticks(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
