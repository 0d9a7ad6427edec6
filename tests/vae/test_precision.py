"""bfloat16 in encoder and decoder alone: how far the free energy moves, and that nothing else is rounded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from vae_models import drawn, moved

from planar_vae_jax.train import loop as training
from planar_vae_jax.vae import objectives
from planar_vae_jax.vae.model import VAE
from planar_vae_jax.vae.precision import PRECISIONS, Linear

pytestmark = pytest.mark.usefixtures("standard_promotion")


SIZES = {"latent": 8, "flow_length": 4}
MLP = {"hidden": 64, **SIZES}
AMORTISED = {"amortized": True, **MLP}


def bars(image_shape, count):
    """Images of a bar each, and some noise."""
    generator = np.random.default_rng(0)
    images = (generator.random((count, *image_shape)) < 0.05).astype(np.float32)
    images[np.arange(count), generator.integers(0, image_shape[0], count)] = 1.0
    return images


def amortised(precision):
    return VAE.mlp((12, 12), **AMORTISED, precision=precision, rngs=nnx.Rngs(0))


@functools.cache
def trained(precision="float32", steps=60, count=256):
    """A model after some training on bars."""

    def loss(model, batch, key, step):
        return jnp.mean(objectives.free_energy(model, batch, key).free_energy), {}

    @jax.jit
    def run(model, images):
        sizes = {"batch_size": count // 4, "epochs": steps // 4}
        return training.train(loss, optax.adam(3e-3), model, images, jax.random.key(1), **sizes)[0].params

    return run(amortised(precision), bars((12, 12), count))


@jax.jit
def terms(model, images):
    return objectives.free_energy(model, images, jax.random.key(2))


@pytest.mark.parametrize(
    ("shape", "options", "count"),
    [
        ((12, 12), {"kind": "mlp", **MLP}, 256),
        ((12, 12), {"kind": "mlp", **AMORTISED}, 256),
        ((8, 4), {"kind": "conv", "amortized": True, **SIZES}, 16),
    ],
    ids=["shared", "amortised", "conv"],
)
def test_the_free_energy_moves_little(shape, options, count):
    model = trained() if options["kind"] == "mlp" and "amortized" in options else drawn(shape, scale=0.1, **options)
    low, images = moved(model, drawn(shape, precision="bfloat16", **options)), bars(shape, count)
    full, rounded = terms(model, images), terms(low, images)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rounded))
    full, rounded = np.asarray(full.free_energy), np.asarray(rounded.free_energy)
    assert 0.0 < np.max(np.abs(rounded - full)) < 0.02 * np.mean(full)  # of one image
    assert abs(np.mean(rounded - full)) < 0.002 * np.mean(full)  # of the mean


def test_training_in_bfloat16_comes_as_far():
    full, rounded = trained(), moved(trained("bfloat16"), trained())
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rounded))
    start, mean, other = (
        float(np.mean(terms(one, bars((12, 12), 256)).free_energy)) for one in (amortised("float32"), full, rounded)
    )
    assert mean < 0.8 * start
    assert other == pytest.approx(mean, rel=0.02)


def test_the_flow_and_the_likelihood_are_computed_in_float32():
    low = drawn((12, 12), precision="bfloat16", **MLP)
    posterior = jax.jit(lambda low, x: low.encode(x))(low, bars((12, 12), 5))
    assert {leaf.dtype for leaf in jax.tree.leaves(posterior)} == {jnp.dtype(jnp.float32)}
    # Sums of what float32 holds and bfloat16 would round: nothing after the encoder is rounded.
    exact = moved(low, drawn((12, 12), **MLP)).posterior._layers(None)
    for kept, leaf in zip(posterior.params, exact, strict=True):
        np.testing.assert_array_equal(kept, leaf)
    assert low.decode(jnp.ones((5, 8))).dtype == jnp.float32


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_layer_rounds_its_input_its_weights_and_its_result(precision):
    layer = jax.jit(lambda: Linear(3, 2, dtype="float32", precision=precision, rngs=nnx.Rngs(0)))()
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    found = jax.jit(lambda layer, x: layer(x))(layer, x)
    assert found.dtype == jnp.float32
    kept = np.asarray(found) == np.asarray(found.astype(jnp.bfloat16).astype(jnp.float32))
    assert np.all(kept) if precision == "bfloat16" else not np.any(kept)
    kernel, bias = np.asarray(layer.kernel[...], np.float64), np.asarray(layer.bias[...], np.float64)
    relative = 2**-7 if precision == "bfloat16" else 1e-6  # each of the three roundings is by 2^-9 at most
    np.testing.assert_allclose(found, x @ kernel + bias, atol=relative * np.max(np.abs(x) @ np.abs(kernel)))


def test_parameters_are_the_same_whatever_the_precision():
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.leaves(amortised(name)) for name in PRECISIONS))
