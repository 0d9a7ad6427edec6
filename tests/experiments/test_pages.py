"""What titles tell of a run."""

import pytest

from planar_vae_jax.report import describe
from planar_vae_jax.vae.model import VAE

SHAPE = (8, 8)


@pytest.mark.parametrize(
    ("binarization", "objective", "shape", "options", "expected"),
    [
        ("dynamic", "elbo", SHAPE, {}, "mine, dynamic binarisation, K = 5, 2 epochs"),
        ("none", "reconstruction", SHAPE, {}, "mine, grey levels, K = 5, squared error, no KL, 2 epochs"),
        ("none", "elbo", SHAPE, {}, "mine, grey levels (cross-entropy, no likelihood), K = 5, 2 epochs"),
        (
            "none",
            "elbo",
            (8, 8, 3),
            {"likelihood": "logistic", "encoder": "conv", "amortized": True},
            "mine, colours by a discretised logistic, gated convolutions, K = 5 amortised, 2 epochs",
        ),
        (
            "none",
            "elbo",
            SHAPE,
            {"likelihood": "gaussian", "layers": 2, "posterior": "full", "flow_length": 0},
            "mine, grey levels by a density, two hidden layers, full covariance, K = 0, 2 epochs",
        ),
    ],
)
def test_a_title_tells_all_that_tells_a_run_from_another(binarization, objective, shape, options, expected):
    assert describe("mine", binarization, VAE(shape, **options), 2, objective, None) == expected


def test_a_title_does_not_name_a_binarisation_that_changes_nothing():
    title = describe("mine", "dynamic", VAE(SHAPE), 2, "elbo", None, binary=True)
    assert title == "mine, binary images, K = 5, 2 epochs"


def test_a_likelihood_of_grey_levels_is_named_for_binary_images_too():
    title = describe("mine", "none", VAE(SHAPE, likelihood="logistic"), 2, "elbo", None, binary=True)
    assert title == "mine, grey levels by a discretised logistic, K = 5, 2 epochs"
