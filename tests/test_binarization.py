"""Pixels become Bernoulli draws with the right probability, and certainly so at black and white."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from planar_vae_jax.binarization import BINARIZATIONS, bernoulli_pixels, binarize

DRAWS = 40_000


def test_each_grey_level_is_drawn_with_its_probability():
    levels = jnp.arange(256, dtype=jnp.uint8)
    draws = jax.jit(lambda key: bernoulli_pixels(key, jnp.tile(levels, (DRAWS, 1))))(jax.random.key(0))
    assert draws.dtype == jnp.float32
    assert set(np.unique(draws)) == {0.0, 1.0}
    mean = np.asarray(draws, np.float64).mean(0)
    probability = np.arange(256) / 255.0
    assert mean[0] == 0.0
    assert mean[255] == 1.0
    deviations = (mean - probability)[1:-1] / np.sqrt(probability * (1 - probability) / DRAWS)[1:-1]
    assert np.abs(deviations).max() < 4.5
    assert np.sqrt(np.mean(deviations**2)) == pytest.approx(1.0, abs=0.15)


def test_the_other_binarizations_are_what_their_names_say():
    pixels = jnp.array([[0, 127, 128, 255]], jnp.uint8)
    key = jax.random.key(0)
    np.testing.assert_array_equal(binarize(key, pixels, "threshold"), [[0.0, 0.0, 1.0, 1.0]])
    np.testing.assert_allclose(binarize(key, pixels, "none"), [[0.0, 127 / 255, 128 / 255, 1.0]], rtol=1e-6)
    np.testing.assert_array_equal(binarize(key, pixels, "static"), binarize(key, pixels, "dynamic"))


def test_an_unknown_binarization_is_refused_by_name():
    with pytest.raises(ValueError, match=r"dynamic.*got 'coin'"):
        binarize(jax.random.key(0), jnp.zeros((1,), jnp.uint8), "coin")
    assert len(BINARIZATIONS) == 4
