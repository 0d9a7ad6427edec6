"""Functions that take or return layers and densities, saved by jax.export and loaded again."""

import dataclasses

import jax
import jax.export
import numpy as np
import pytest
from helpers import draw

from planar_vae_jax import Planar, PlanarDensity, PlanarFlow, planar_flow

pytest.importorskip("flatbuffers", reason="jax.export saves functions by flatbuffers")

DIM = 3
PARAMS, _ = draw(DIM, 4, dtype=np.float32)
MEAN, LOG_STD = np.float32([0.5, -1.0, 2.0]), np.float32([-0.3, 0.2, 0.0])
LOWER = np.random.default_rng(1).normal(size=(DIM, DIM)).astype(np.float32)
X = np.random.default_rng(2).normal(size=(5, DIM)).astype(np.float32)
DENSITIES = {
    "flow": PlanarFlow(PARAMS, MEAN, LOG_STD, h="softsign"),
    "full": PlanarFlow(PARAMS, MEAN, LOG_STD, lower=LOWER),
    "sampling": PlanarDensity(PARAMS, MEAN, LOG_STD, LOWER),
    "inverted": PlanarDensity(PARAMS, MEAN, LOG_STD, h="softsign", inverted=True),
}


def loaded(function, *arguments):
    """``function``, exported for these arguments, saved and loaded."""
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), arguments)
    saved = jax.export.export(jax.jit(function))(*like).serialize()
    return jax.export.deserialize(saved).call


def any_number(x):
    """``x [N, D]`` for every N."""
    return jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), DIM), x.dtype)


@pytest.mark.parametrize("name", DENSITIES)
def test_a_density_goes_into_a_saved_function_and_comes_out(name):
    density = DENSITIES[name]
    moved = dataclasses.replace(density, params=density.params._replace(b=density.params.b + 1))
    found = loaded(
        lambda density: dataclasses.replace(density, params=density.params._replace(b=density.params.b + 1)), density
    )(density)
    assert type(found) is type(density)
    assert jax.tree.structure(found) == jax.tree.structure(density)
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(leaf, expected)


@pytest.mark.parametrize("name", DENSITIES)
def test_log_densities_of_any_number_of_points_are_saved(name):
    density = DENSITIES[name]
    log_prob = loaded(lambda density, x: density.log_prob(x), density, any_number(X))
    for number in (1, 5):
        expected = density.log_prob(X[:number])
        np.testing.assert_allclose(log_prob(density, X[:number]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["scan", "gram"])
def test_layers_are_arguments_of_a_saved_map(method):
    flow = loaded(lambda params, z: planar_flow(params, z, method=method), PARAMS, any_number(X))
    for number in (1, 5):
        for found, expected in zip(flow(PARAMS, X[:number]), planar_flow(PARAMS, X[:number]), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    doubled = loaded(lambda params: jax.tree.map(lambda leaf: 2 * leaf, params), PARAMS)(PARAMS)
    assert isinstance(doubled, Planar)
    np.testing.assert_array_equal(doubled.w, 2 * PARAMS.w)
