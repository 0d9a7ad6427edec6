"""Losses over epochs and by class, and the KL of a density over steps."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from planar_vae_jax.plotting._layout import set_title
from planar_vae_jax.plotting._text import VERBATIM, drawable
from planar_vae_jax.statistics import with_error

_TALLEST = 100.0  # inches, the greatest height of the bars of all classes


def loss_curves(
    epochs: np.ndarray, curves: Mapping[str, np.ndarray], *, title: str, ylabel: str, xlabel: str = "epoch"
) -> Figure:
    """Draws losses against epochs or steps, with the first value on the left, without it on the right (figures 5, 6).

    Args:
        epochs: ``[T]``, the epochs, whole or fractional, or the steps at which the losses were computed.
        curves: name -> ``[T]`` losses, for example of training and of test images.
        title: above both panels.
        ylabel: what the losses are, with their unit.
        xlabel: what ``epochs`` counts.
    """
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    set_title(figure, title)
    panels = figure.subplots(1, 2)
    for axes, first, label in zip(panels, (0, 1), ("with", "without"), strict=True):
        lines = [axes.plot(epochs[first:], y[first:], linewidth=1.5, marker=".")[0] for y in curves.values()]
        if len(epochs[first:]) == 1:
            axes.set_xlim(epochs[first] - 1, epochs[first] + 1)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=f"{label} the first iteration")
        _whole_ticks(axes)
    names = [drawable(name) for name in curves]
    legend = figure.legend(lines, names, loc="outside lower center", ncols=len(names), frameon=False)
    for text in legend.get_texts():
        text.set(**VERBATIM)
    return figure


def class_losses(
    losses: Mapping[str, float], *, title: str, label: str, errors: Mapping[str, float] | None = None
) -> Figure:
    """Draws the test loss by class ("each category"): one bar for each class, with its value beside it.

    Args:
        losses: class -> mean loss.
        title: above the bars.
        label: what the loss is, with its unit.
        errors: class -> standard error of that mean; not finite where it is unknown, as for a single image.
    """
    deviations = [(errors or {}).get(name, math.nan) for name in losses]
    figure = Figure(figsize=(7, min(_TALLEST, 0.32 * len(losses)) + 0.8), layout="constrained", dpi=120)
    set_title(figure, title, size=10)
    axes = figure.subplots()
    places, values = range(len(losses)), list(losses.values())
    bars = axes.barh(places, values, xerr=deviations if errors else None, color="tab:blue", capsize=3)
    texts = [with_error(value, error) for value, error in zip(values, deviations, strict=True)]
    axes.bar_label(bars, texts, padding=4, fontsize=9)
    axes.set_yticks(places, [drawable(name) for name in losses], **VERBATIM)
    axes.set(xlabel=f"{label}, ± standard error" if errors else label, ylabel="class")
    axes.margins(x=0.25)
    axes.invert_yaxis()
    return figure


def kl_curve(steps: np.ndarray, kl: np.ndarray, *, title: str) -> Figure:
    """Draws a KL divergence in nats against steps, on a linear axis and on a logarithmic one.

    Args:
        steps: ``[T]``, the last step of each interval.
        kl: ``[T]``, the mean estimate over each interval; values of 0 and below are missing from the logarithmic axis.
        title: above both panels.
    """
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    set_title(figure, title)
    # About half of the estimates of a KL near 0 are negative, and a logarithmic axis cannot show them.
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
