"""The pages on a trained VAE's latent space, drawn from its test images."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from planar_vae_jax import plotting
from planar_vae_jax.analysis import latent
from planar_vae_jax.analysis.evaluation import Images
from planar_vae_jax.analysis.true_posterior import posterior_grid
from planar_vae_jax.data import Dataset, examples
from planar_vae_jax.data.streamed import Streamed
from planar_vae_jax.vae.model import VAE

SHOWN = 4  # images or pairs of images on a page
STEPS = 9  # pictures between two images
COORDINATES = 8  # of the code on a page
VALUES = np.linspace(-3.0, 3.0, 13)  # that a coordinate is moved to


def draw_latent_space(
    save: Callable[[str, Figure], object],
    vae: VAE,
    params: Any,
    data: Dataset,
    test: Images | Streamed,
    setting: str,
    objective: str,
) -> None:
    """Draws every page that the model can have, and gives each to ``save`` by the name of its file.

    ``posteriors.png`` needs two latent dimensions, and a KL term in the objective: without it q approximates nothing.

    Args:
        save: such as ``RunFolder.save_figure``.
        vae: the architecture.
        params: of the model.
        data: whose test images are shown.
        test: these, as they are evaluated.
        setting: what tells these pages from another run's, for the titles.
        objective: that the model was trained by.
    """
    chosen, names = examples(data)
    rows = np.unique(np.linspace(0, len(chosen) - 1, SHOWN).round().astype(int))
    if vae.latent == 2 and objective != "reconstruction":
        named = [names[row] for row in rows] if names else []
        save("posteriors.png", _posteriors(vae, params, test.take(chosen[rows]).pixels, named, setting))
    if len(chosen) > 1:
        save("interpolations.png", _interpolations(vae, params, test, chosen, names, setting))
    kl = latent.kl_by_dimension(vae, params, test)
    largest = np.argsort(-kl, kind="stable")
    image = test.take(chosen[:1]).pixels[0]
    save("traversals.png", _traversals(vae, params, image, largest[:COORDINATES], kl, setting))
    z = np.asarray(latent.aggregate_posterior(vae, params, test))
    save("aggregate.png", _aggregate(z, data.y_test, largest, kl, setting))


def _posteriors(vae: VAE, params: Any, pixels: Any, names: list[str], setting: str) -> Figure:
    grids = [posterior_grid(vae, params, image) for image in pixels]
    title = "The true posterior p(z|x) of test images and what approximates it (KL to p(z|x) in nats)"
    if vae.flow_length:
        title += "; at the right q_k(z|x) after k layers, on a larger square, each in a colour scale of its own"
    title += f"\nwhite: p(z|x), around 50 and 95 % of its mass ({setting})"
    return plotting.posterior_rows(np.asarray(pixels) / 255.0, grids, title=title, names=names)


def _interpolations(
    vae: VAE, params: Any, test: Images | Streamed, chosen: np.ndarray, names: list[str], setting: str
) -> Figure:
    pairs = np.stack([chosen, np.roll(chosen, -1)], axis=1)[: len(chosen) if len(chosen) > 2 else 1]
    pairs = pairs[np.unique(np.linspace(0, len(pairs) - 1, SHOWN).round().astype(int))]
    title = f"Pixel means on straight lines between test images, in z_0 and in z_K\n({setting})"
    if vae.flow_length == 0:
        title = f"Pixel means on straight lines between test images\n({setting})"
    elif vae.amortized:
        title += "\nin z_0 the flow's parameters change linearly too, from one image's to the other's"
    left, right = (test.take(pairs[:, side]).pixels for side in (0, 1))
    lines = latent.interpolate(vae, params, left, right, STEPS)
    return interpolation_page(vae, lines, left, right, title)


def interpolation_page(vae: VAE, lines: latent.Interpolations, left: Any, right: Any, title: str) -> Figure:
    """Rows of pictures between images, which stand at both ends; without a flow a row a pair, else two.

    Args:
        vae: the architecture.
        lines: ``[P, T, H, W]``.
        left: ``[P, H, W]`` uint8.
        right: likewise.
        title: over all.
    """
    rows = {}
    for number, (first, last) in enumerate(zip(np.asarray(left) / 255.0, np.asarray(right) / 255.0, strict=True)):
        for name, line in {"z_0": lines.base, "z_K": lines.code}.items():
            if name == "z_K" or vae.flow_length:
                rows[f"{number + 1}: {name}" if len(left) > 1 else name] = np.stack(
                    [first, *np.asarray(line[number]), last]
                )
    captions = ["image", *(f"{t:g}" for t in np.linspace(0, 1, lines.code.shape[1])), "image"]
    return plotting.image_rows(rows, title=title, columns=captions)


def _traversals(vae: VAE, params: Any, pixels: Any, dimensions: np.ndarray, kl: np.ndarray, setting: str) -> Figure:
    values = jnp.asarray(VALUES, vae.dtype)
    moved = np.asarray(latent.traverse(vae, params, pixels, jnp.asarray(dimensions), values))
    image = np.asarray(pixels)[None] / 255.0
    rows = {
        f"no. {dimension + 1}, KL {kl[dimension]:.2g}": np.concatenate([image, pictures])
        for dimension, pictures in zip(dimensions, moved, strict=True)
    }
    title = f"A test image's code z_K with one coordinate moved; coordinates of the largest KL (nats)\n({setting})"
    return plotting.image_rows(rows, title=title, columns=["image", *(f"{value:g}" for value in VALUES)])


def _aggregate(z: np.ndarray, labels: np.ndarray | None, largest: np.ndarray, kl: np.ndarray, setting: str) -> Figure:
    far = latent.distance_from_prior(z)
    histograms = "" if z.shape[1] == 2 else "coordinates of the largest and of the smallest KL (nats) to the prior\n"
    title = (
        f"Codes z_K of {len(z)} test images, a sample each: the aggregate posterior beside the prior N(0, I)\n"
        f"{histograms}means {np.min(far.mean):.2f} to {np.max(far.mean):.2f}, variances {np.min(far.variance):.2f} to "
        f"{np.max(far.variance):.2f}: {far.nats:.2g} nats from the prior as independent normals\n({setting})"
    )
    if z.shape[1] == 2:
        return plotting.aggregate_plane(z, labels, title=title)
    half = COORDINATES // 2
    shown = np.concatenate([largest[:half], largest[half:][-half:]])
    names = {f"no. {d + 1}, KL {kl[d]:.2g}, mean {far.mean[d]:.2f}, var. {far.variance[d]:.2f}": d for d in shown}
    return plotting.aggregate_histograms({name: z[:, d] for name, d in names.items()}, title=title)
