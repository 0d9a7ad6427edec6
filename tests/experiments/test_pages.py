"""What titles tell of a run."""

import pytest

from planar_vae_jax.report import binarization_note, describe


@pytest.mark.parametrize(
    ("binarization", "objective", "channels", "options", "expected"),
    [
        ("dynamic", "elbo", 1, {}, "mine, dynamic binarisation, K = 5, 2 epochs"),
        ("none", "reconstruction", 1, {}, "mine, grey levels, K = 5, squared error, no KL, 2 epochs"),
        ("none", "elbo", 1, {}, "mine, grey levels (cross-entropy, no likelihood), K = 5, 2 epochs"),
        (
            "none",
            "elbo",
            3,
            {"likelihood": "logistic", "encoder": "conv", "amortized": True},
            "mine, colours by a discretised logistic, gated convolutions, K = 5 amortised, 2 epochs",
        ),
        (
            "none",
            "elbo",
            1,
            {"likelihood": "gaussian", "layers": 2, "posterior": "full", "flows": 0},
            "mine, grey levels by a density, two hidden layers, full covariance, K = 0, 2 epochs",
        ),
    ],
)
def test_a_title_has_all_settings_by_which_figures_differ(binarization, objective, channels, options, expected):
    settings = {"flows": 5} | options
    title = describe("mine", binarization=binarization, objective=objective, channels=channels, epochs=2, **settings)
    assert title == expected


def test_a_title_does_not_name_a_binarisation_that_changes_nothing():
    title = describe("mine", binarization="dynamic", channels=1, flows=5, epochs=2, binary=True)
    assert title == "mine, binary images, K = 5, 2 epochs"


def test_a_likelihood_of_grey_levels_is_named_for_binary_images_too():
    title = describe("mine", binarization="none", channels=1, flows=5, epochs=2, likelihood="logistic", binary=True)
    assert title == "mine, grey levels by a discretised logistic, K = 5, 2 epochs"


def test_a_run_says_at_its_start_that_grey_images_are_binarised():
    assert "--binarization=dynamic" in binarization_note("dynamic", False)
    assert binarization_note("dynamic", True) is None
    assert binarization_note("none", False) is None
