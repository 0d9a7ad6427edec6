"""The pages on the latent space, drawn for small models."""

import jax
import numpy as np
import pytest
from vae_models import drawn

from planar_vae_jax.analysis import evaluation, latent
from planar_vae_jax.data import Dataset
from planar_vae_jax.report import draw_latent_space

SHAPE = (5, 4)
X = np.random.default_rng(0).integers(0, 256, (12, *SHAPE), np.uint8)
TEST = evaluation.fixed_images(X, np.arange(12), "test", "static")


def units(model, test):
    return latent.latent_units(model, test).kl


def dataset(labels, size=12):
    images, index = X[:size], np.arange(size)
    y = None if labels is None else np.asarray(labels[:size])
    return Dataset("bars", "here", images, y, None, None, images, y, index, None, index)


@pytest.mark.parametrize(
    ("size", "latents", "flow_length", "amortized", "labels"),
    [
        (12, 1, 2, False, np.zeros(12, int)),
        (2, 3, 0, False, None),
        (1, 2, 0, False, np.array([7])),
        (12, 17, 3, True, np.arange(12)),
    ],
)
def test_every_page_is_drawn_for_any_data(size, latents, flow_length, amortized, labels, tmp_path):
    model = drawn(SHAPE, hidden=4, latent=latents, flow_length=flow_length, amortized=amortized)
    pages = {}
    test = jax.tree.map(lambda leaf: leaf[:size], TEST)
    data = dataset(labels, size)
    draw_latent_space(pages.__setitem__, model, data, test, units(model, test), "bars", "elbo")
    several = size > 1 and (labels is None or len(np.unique(labels)) > 1)
    assert ("interpolations.png" in pages) == several
    assert ("posteriors.png" in pages) == (latents == 2)
    assert {"traversals.png", "aggregate.png"} <= set(pages)
    for name, figure in pages.items():
        figure.savefig(tmp_path / name)


def colours(objective):
    """The pages of colour images under a model with full covariances."""
    x = np.random.default_rng(0).integers(0, 256, (12, *SHAPE, 3), np.uint8)
    index, labels = np.arange(12), np.arange(12) % 3
    data = Dataset("colours", "here", x, labels, None, None, x, labels, index, None, index)
    test, pages = evaluation.fixed_images(x, index, "test", "none"), {}
    architecture = {"flow_length": 2, "amortized": True, "posterior": "full", "likelihood": "logistic"}
    model = drawn((*SHAPE, 3), hidden=4, latent=2, **architecture)
    draw_latent_space(pages.__setitem__, model, data, test, units(model, test), "colours", objective)
    return pages


def test_pages_of_colour_images_and_full_covariances(tmp_path):
    pages = colours("elbo")
    assert set(pages) == {"posteriors.png", "interpolations.png", "traversals.png", "aggregate.png"}
    for name, figure in pages.items():
        figure.savefig(tmp_path / name)


def test_no_posterior_is_drawn_that_nothing_was_trained_to_approximate():
    assert set(colours("reconstruction")) == {"interpolations.png", "traversals.png", "aggregate.png"}
