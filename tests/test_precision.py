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

from planar_vae_jax import objectives, training
from planar_vae_jax.models import VAE

pytestmark = pytest.mark.usefixtures("standard_promotion")


SIZES = {"latent": 8, "hidden": 64, "flow_length": 4}
KINDS = pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortised"])


@functools.cache
def trained(vae, steps=60, count=256):
    """Parameters after some training on bars, and the images."""
    generator = np.random.default_rng(0)
    images = (generator.random((count, *vae.image_shape)) < 0.05).astype(np.float32)
    images[np.arange(count), generator.integers(0, vae.image_shape[0], count)] = 1.0

    def loss(params, batch, key, step):
        return jnp.mean(objectives.free_energy(vae.bind(params), batch, key).free_energy), {}

    def run(params):
        sizes = {"batch_size": count // 4, "epochs": steps // 4}
        return training.train(loss, optax.adam(3e-3), params, images, jax.random.key(1), **sizes)[0].params

    params = vae.init(jax.random.key(0)) if steps else weights(vae, scale=0.1)
    return jax.jit(run)(params) if steps else params, jnp.asarray(images)


@pytest.mark.parametrize(
    ("architecture", "how"),
    [
        ({"image_shape": (12, 12), "amortized": False}, {}),
        ({"image_shape": (12, 12), "amortized": True}, {}),
        ({"image_shape": (8, 4), "amortized": True, "encoder": "conv"}, {"steps": 0, "count": 64}),
    ],
    ids=["shared", "amortised", "conv"],
)
def test_the_free_energy_moves_little(architecture, how):
    vae = VAE(**architecture, **SIZES)
    params, images = trained(vae, **how)
    low = dataclasses.replace(vae, precision="bfloat16")

    def terms(vae):
        return jax.jit(lambda p, x: objectives.free_energy(vae.bind(p), x, jax.random.key(2)))(params, images)

    full, rounded = terms(vae), terms(low)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rounded))
    change = np.asarray(rounded.free_energy - full.free_energy)
    assert 0.0 < np.max(np.abs(change)) < 0.02 * np.mean(full.free_energy)  # of one image
    assert abs(np.mean(change)) < 0.002 * np.mean(full.free_energy)  # of the mean


@KINDS
def test_training_in_bfloat16_comes_as_far(amortized):
    vae = VAE((12, 12), amortized=amortized, **SIZES)
    low = dataclasses.replace(vae, precision="bfloat16")
    (params, images), (rounded, _) = trained(vae), trained(low)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rounded))
    assert jax.tree.structure(params) == jax.tree.structure(rounded)

    def mean(params):
        return float(jnp.mean(objectives.free_energy(vae.bind(params), images, jax.random.key(2)).free_energy))

    assert mean(rounded) == pytest.approx(mean(params), rel=0.02)


def test_the_flow_and_the_likelihood_are_computed_in_float32():
    vae = VAE((12, 12), precision="bfloat16", **SIZES)
    params = weights(vae)
    z = jnp.ones((5, 8))
    flow = vae.bind(params).encode(jnp.ones((5, 12, 12)))
    assert {leaf.dtype for leaf in jax.tree.leaves(flow)} == {jnp.dtype(jnp.float32)}
    assert "bf16" not in str(jax.make_jaxpr(flow.transform)(z))
    logits = str(jax.make_jaxpr(lambda z: vae.bind(params).decode(z))(z))
    products = re.findall(r"(\w+)\[[\d,]*\] = dot_general", logits)
    assert products == ["bf16", "bf16"]


def test_parameters_are_the_same_whatever_the_precision():
    trees = [VAE((12, 12), precision=name, **SIZES).init(jax.random.key(3)) for name in ("float32", "bfloat16")]
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16; got 'int8'"):
        VAE((12, 12), precision="int8")
