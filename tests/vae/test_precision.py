"""bfloat16 in encoder and decoder alone: how far the free energy moves, and that nothing else is rounded."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import weights

from planar_vae_jax.train import loop as training
from planar_vae_jax.vae import objectives
from planar_vae_jax.vae.model import VAE
from planar_vae_jax.vae.precision import PRECISIONS

pytestmark = pytest.mark.usefixtures("standard_promotion")


SIZES = {"latent": 8, "hidden": 64, "flow_length": 4}
AMORTISED = VAE((12, 12), amortized=True, **SIZES)


def bars(vae, count):
    """Images of a bar each, and some noise."""
    generator = np.random.default_rng(0)
    images = (generator.random((count, *vae.image_shape)) < 0.05).astype(np.float32)
    images[np.arange(count), generator.integers(0, vae.image_shape[0], count)] = 1.0
    return images


@functools.cache
def trained(vae, steps=60, count=256):
    """Parameters after some training on bars."""

    def loss(params, batch, key, step):
        return jnp.mean(objectives.free_energy(vae.bind(params), batch, key).free_energy), {}

    @jax.jit
    def run(params, images):
        sizes = {"batch_size": count // 4, "epochs": steps // 4}
        return training.train(loss, optax.adam(3e-3), params, images, jax.random.key(1), **sizes)[0].params

    # Drawn alike in both precisions.
    return run(dataclasses.replace(vae, precision="float32").init(jax.random.key(0)), bars(vae, count))


@functools.partial(jax.jit, static_argnums=0)
def terms(vae, params, images):
    return objectives.free_energy(vae.bind(params), images, jax.random.key(2))


@pytest.mark.parametrize(
    ("vae", "count"),
    [
        (VAE((12, 12), **SIZES), 256),
        (AMORTISED, 256),
        (VAE((8, 4), encoder="conv", amortized=True, **SIZES), 16),
    ],
    ids=["shared", "amortised", "conv"],
)
def test_the_free_energy_moves_little(vae, count):
    params = trained(vae) if vae == AMORTISED else weights(vae, scale=0.1)
    low, images = dataclasses.replace(vae, precision="bfloat16"), bars(vae, count)
    full, rounded = terms(vae, params, images), terms(low, params, images)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rounded))
    full, rounded = np.asarray(full.free_energy), np.asarray(rounded.free_energy)
    assert 0.0 < np.max(np.abs(rounded - full)) < 0.02 * np.mean(full)  # of one image
    assert abs(np.mean(rounded - full)) < 0.002 * np.mean(full)  # of the mean


def test_training_in_bfloat16_comes_as_far():
    params, rounded = trained(AMORTISED), trained(dataclasses.replace(AMORTISED, precision="bfloat16"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rounded))
    assert jax.tree.structure(params) == jax.tree.structure(rounded)
    start, mean, other = (
        float(np.mean(terms(AMORTISED, one, bars(AMORTISED, 256)).free_energy))
        for one in (AMORTISED.init(jax.random.key(0)), params, rounded)
    )
    assert mean < 0.8 * start
    assert other == pytest.approx(mean, rel=0.02)


def test_the_flow_and_the_likelihood_are_computed_in_float32():
    vae = VAE((12, 12), precision="bfloat16", **SIZES)
    params, z = weights(vae), jax.ShapeDtypeStruct((5, 8), jnp.float32)
    flow = jax.eval_shape(lambda x: vae.bind(params).encode(x), jax.ShapeDtypeStruct((5, 12, 12), jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(flow)} == {jnp.dtype(jnp.float32)}
    assert "bf16" not in str(jax.make_jaxpr(lambda flow, z: flow.transform(z))(flow, z))
    logits = str(jax.make_jaxpr(lambda z: vae.bind(params).decode(z))(z))
    products = re.findall(r"(\w+)\[[\d,]*\] = dot_general", logits)
    assert products == ["bf16", "bf16"]


def test_parameters_are_the_same_whatever_the_precision():
    trees = [dataclasses.replace(AMORTISED, precision=name).init(jax.random.key(0)) for name in PRECISIONS]
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16; got 'int8'"):
        VAE((12, 12), precision="int8")
