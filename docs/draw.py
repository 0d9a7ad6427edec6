"""Draws the pictures of docs/how_it_works.md from the library's own functions: ``python docs/draw.py``."""

import argparse
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from planar_vae_jax import Planar, init_planar, planar_flow
from planar_vae_jax.flows import NONLINEARITIES, planar_to_constrained, planar_trajectory

TANH = NONLINEARITIES["tanh"]
OURS, OTHER, THIRD = "tab:blue", "tab:orange", "tab:red"


def w_u_hat(u, w):
    """``w.u_hat`` of our constraint, ``[N]``, for ``u [N, D]`` and ``w [N, D]``."""
    u_hat, _, _ = planar_to_constrained(Planar(u[:, None], w[:, None], jnp.zeros((len(u), 1))))
    return jnp.sum(u_hat[:, 0] * w, -1)


def constraint():
    """``w.u_hat`` against ``w.u`` for three constraints, and ``|u_hat|`` against ``|w|`` for two."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)

    p = jnp.linspace(-6, 4, 401)
    along = jnp.stack([p, jnp.zeros_like(p)], -1)
    axis = jnp.broadcast_to(jnp.array([1.0, 0.0]), along.shape)
    unshifted = jax.nn.softplus(p) - 1
    left.axhspan(-4, -1, color="0.9")
    left.text(3.9, -1.2, "not invertible", ha="right", va="top", color="0.4")
    left.plot(p, p + (unshifted - p) * 0.5, color=THIRD, label="division by |w| (here |w| = 1/2)")
    left.plot(p, unshifted, color=OTHER, label="without the shift")
    left.plot(p, w_u_hat(along, axis), color=OURS, label="with the shift: 0 at 0")
    left.plot(0, 0, "o", color=OURS)
    left.set(xlabel="w.u", ylabel="w.u_hat", xlim=(-6, 4), ylim=(-3, 4), title="The constraint keeps w.u_hat above -1")
    left.legend(loc="upper left")

    size = jnp.geomspace(1e-3, 10, 200)
    w = size[:, None] * jnp.array([1.0, 0.0])
    u = jnp.broadcast_to(jnp.array([0.1, 0.1]), w.shape)
    u_hat, _, _ = planar_to_constrained(Planar(u[:, None], w[:, None], jnp.zeros((len(u), 1))))
    product = jnp.sum(u * w, -1)
    correction = (jax.nn.softplus(product) - 1 - product) / size
    others = jnp.hypot(u[:, 0] + correction, u[:, 1])
    right.loglog(size, others, color=OTHER, label="without the shift: 0.307 / |w|")
    right.loglog(size, jnp.linalg.norm(u_hat[:, 0], axis=-1), color=OURS, label="with the shift")
    right.set(xlabel="|w|", ylabel="|u_hat|", title="|u_hat| of u = (0.1, 0.1)")
    right.legend(loc="upper right")
    return figure


def log_determinants(side=401):
    """``a [N]``, ``w.u [N]``, and ``[N, N]`` twice: the usual formula and ours, in float32."""
    a, p = jnp.linspace(-1e-3, 1e-3, side), jnp.linspace(-40.0, 0.0, side)
    one = jnp.ones((side, side, 1, 1))
    layers = Planar(p[:, None, None, None] * one, one, a[None, :, None] * one[..., 0])
    _, ours = planar_flow(layers, jnp.zeros((side, side, 1)))
    m = jax.nn.softplus(p + math.log(math.e - 1))[:, None]
    usual = jnp.log(jnp.abs(1 + (1 - jnp.tanh(a) ** 2) * (m - 1)))
    return a, p, usual, ours


def log_determinant():
    """Where the usual formula gives -inf, and ours there."""
    a, p, usual, ours = map(np.asarray, log_determinants())
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    titles = {"log|1 + h'(a) w.u_hat|: -inf where it is red": usual, "log((1 - h'(a)) + h'(a) m)": ours}
    for axes, (title, values) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        shown = np.ma.masked_where(~np.isfinite(values), values)
        extent = (a[0] * 1e3, a[-1] * 1e3, p[0], p[-1])
        image = axes.imshow(shown, origin="lower", extent=extent, aspect="auto", vmin=-40, vmax=0, interpolation="none")
        axes.set_facecolor(THIRD)  # of pixels that are masked
        axes.set(xlabel="a, in thousandths", title=title)
    figure.axes[0].set_ylabel("w.u")
    figure.colorbar(image, ax=figure.axes, label="log-determinant in nats, float32")
    return figure


def inverse():
    """The equation of the inverse for two values of ``m``, with its bracket and the steps of Newton's method."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, m, y, right, top in zip(figure.subplots(1, 2), (0.02, 4.0), (0.3, 3.5), (2, 4), (1, 6), strict=True):
        low, high = (max(y / m, y - (m - 1)), y) if m >= 1 else (y, min(y / m, y + 1 - m))
        grid = jnp.linspace(0, right, 300)

        def left_side(a, m=m):
            return TANH.remainder(a) + m * TANH.value(a)

        axes.axvspan(low, high, color="0.9", label="bracket")
        axes.plot(grid, left_side(grid), color=OURS, label="(a - h(a)) + m h(a)")
        axes.axhline(y, color="black", linewidth=1, label="y")
        a, points = jnp.float32(low if m >= 1 else high), []
        for _ in range(4):
            slope, complement = TANH.slopes(a, TANH.value(a))
            following = a - (left_side(a) - y) / (complement + m * slope)
            points += [(a, left_side(a)), (following, y)]
            a = following
        axes.plot(*zip(*points, strict=True), "o-", color=OTHER, markersize=4, linewidth=1, label="Newton's method")
        shape = "concave: from the left end" if m >= 1 else "convex: from the right end"
        axes.set(xlabel="a", xlim=(0, right), ylim=(0, top), title=f"m = {m:g}, {shape}")
        axes.legend(loc="lower right" if m >= 1 else "upper left")
    return figure


def layers():
    """A grid, and points of a normal distribution, after some of 16 layers."""
    keys = jax.random.split(jax.random.key(5), 4)
    params = Planar(
        u=0.5 * jax.random.normal(keys[0], (16, 2)),
        w=1.5 * jax.random.normal(keys[1], (16, 2)),
        b=1.5 * jax.random.normal(keys[2], (16,)),
    )
    place, along = jnp.meshgrid(jnp.linspace(-3, 3, 25), jnp.linspace(-3, 3, 201))
    lines = jnp.stack([jnp.stack([place, along], -1), jnp.stack([along, place], -1)])  # [2, 201, 25, 2]
    grids, _ = planar_trajectory(params, lines)  # [17, 2, 201, 25, 2]
    points, _ = planar_trajectory(params, jax.random.normal(keys[3], (2000, 2)))
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    for k, (above, below) in zip((0, 1, 2, 4, 8, 16), figure.subplots(2, 6).T, strict=True):
        for one, colour in zip(grids[k], (OURS, OTHER), strict=True):
            above.plot(one[..., 0], one[..., 1], color=colour, linewidth=0.5)
        below.plot(points[k, :, 0], points[k, :, 1], ".", color="black", markersize=1, alpha=0.4)
        above.set_title("the grid" if k == 0 else f"after {k} layer{'s' * (k > 1)}")
        for axes in (above, below):
            axes.set(xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), aspect="equal", xticks=(), yticks=())
    return figure


def gram():
    """The matrix L of a flow of 24 layers in 40 dimensions, with the blocks of its recursion."""
    params = init_planar(jax.random.key(0), flow_length=24, dim=40, u_scale=1.0)
    u_hat, w, _ = planar_to_constrained(params)
    product = np.tril(np.asarray(w @ u_hat.T), -1)
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.subplots()
    reach = np.abs(product).max()
    shown = np.ma.masked_where(~np.tri(24, k=-1, dtype=bool), product)
    image = axes.imshow(shown, cmap="RdBu", vmin=-reach, vmax=reach)
    for start in (0, 8, 16):
        axes.add_patch(_frame(start - 0.5, start - 0.5, 8, 8, "black"))
        if start:
            axes.add_patch(_frame(-0.5, start - 0.5, start, 8, "0.5"))
    axes.set(xlabel="layer j, whose h is known", ylabel="layer k, whose a is wanted", title="L[k, j] = w_k.u_hat_j")
    figure.colorbar(image, ax=axes)
    return figure


def _frame(left, top, width, height, colour):
    return Rectangle((left, top), width, height, fill=False, edgecolor=colour, linewidth=1.2)


PICTURES = {
    "constraint.svg": constraint,
    "log_determinant.png": log_determinant,
    "inverse.svg": inverse,
    "layers.png": layers,
    "gram.svg": gram,
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="the folder for the pictures")
    output = parser.parse_args(argv).output
    with matplotlib.rc_context({"svg.hashsalt": "planar_vae_jax"}):  # the same file each time
        for name, draw in PICTURES.items():
            draw().savefig(output / name, dpi=100, metadata={"Date": None} if name.endswith(".svg") else None)


if __name__ == "__main__":
    main()
