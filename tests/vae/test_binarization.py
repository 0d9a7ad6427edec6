"""Pixels become Bernoulli draws with the right probability, and certainly so at black and white."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import precision

from planar_vae_jax.vae.binarization import BINARIZATIONS, bernoulli_pixels, binarize, binarize_each

DRAWS = 40_000
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)


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


@pytest.mark.parametrize("binarization", BINARIZATIONS)
@pytest.mark.parametrize(
    ("pixels", "came"),
    [
        (np.zeros(3, np.float32), "float32"),
        (np.zeros(3, np.int32), "int32"),
        (np.zeros(3, bool), "bool"),
        ([0, 255], "list"),
    ],
)
def test_pixels_of_another_type_are_refused(pixels, came, binarization):
    """Floats in 0..1, above all: cast without a word they would be black."""
    with pytest.raises(ValueError, match=f"^pixels must be .*uint8.*got {came}$"):
        binarize(jax.random.key(0), pixels, binarization)
    with pytest.raises(ValueError, match=f"^pixels must be .*uint8.*got {came}$"):
        binarize_each(jax.random.split(jax.random.key(0), len(pixels)), pixels, binarization)


@pytest.mark.parametrize("binarization", BINARIZATIONS)
def test_each_image_depends_on_its_own_key_alone(binarization):
    keys = jax.random.split(jax.random.key(3), len(IMAGES))
    whole = binarize_each(keys, IMAGES, binarization)
    assert whole.shape == IMAGES.shape
    assert whole.dtype == jnp.float32
    for i, image in enumerate(IMAGES):
        alone = binarize(keys[i], image.reshape(-1), binarization)
        np.testing.assert_array_equal(whole[i], alone.reshape(image.shape))
    order = np.array([4, 1, 2])  # another batch, another order, another size
    np.testing.assert_array_equal(
        jax.jit(binarize_each, static_argnums=2)(keys[order], IMAGES[order], binarization), whole[order]
    )


def test_other_keys_draw_otherwise():
    """Training and test images that are drawn once need keys of their own."""
    first, second = (bernoulli_pixels(jax.random.key(seed), jnp.full((1000,), 128, jnp.uint8)) for seed in (0, 1))
    assert 0.4 < np.mean(first != second) < 0.6


def test_keys_must_be_as_many_as_images():
    with pytest.raises(ValueError, match=r"keys must be one for each image, \[6\]; got \[5\]"):
        binarize_each(jax.random.split(jax.random.key(0), 5), IMAGES, "dynamic")


@pytest.mark.parametrize("binarization", BINARIZATIONS)
def test_draws_are_the_same_in_either_width(binarization):
    def draws():
        values = binarize_each(jax.random.split(jax.random.key(0), len(IMAGES)), IMAGES, binarization)
        assert values.dtype == jnp.float32
        return np.asarray(values)

    with precision(np.float64):
        wide = draws()
    np.testing.assert_array_equal(wide, draws())


DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from planar_vae_jax.vae.binarization import binarize

pixels = jnp.asarray(np.random.RandomState(0).randint(0, 256, (16, 8, 9)), jnp.uint8)
draw = jax.jit(lambda pixels: binarize(jax.random.key(3), pixels, "dynamic"))
alone = draw(pixels)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        for spec in (P("data"), P(None, "data")):
            np.testing.assert_array_equal(draw(jax.device_put(pixels, NamedSharding(mesh, spec))), alone)
"""


@pytest.mark.parametrize("partitionable", ["0", "1"])
def test_eight_devices_draw_what_one_draws(partitionable):
    """In both orders in which JAX's threefry counts (``jax_threefry_partitionable``)."""
    devices = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    flags = {"XLA_FLAGS": devices, "JAX_THREEFRY_PARTITIONABLE": partitionable}
    command = [sys.executable, "-c", DEVICES]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
