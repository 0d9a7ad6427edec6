"""The VAE's modules: what each K shares, how amortised flows start, and that extremes stay finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from planar_vae_jax.models import LOG_STD_RANGE, VAE, functional
from planar_vae_jax.objectives import free_energy

PIXELS, HIDDEN, LATENT = 12, 7, 3


def vae(**options):
    return functional(lambda rngs: VAE(PIXELS, hidden=HIDDEN, latent=LATENT, rngs=rngs, **options))


def image(seed=0):
    return jax.random.bernoulli(jax.random.key(seed), 0.5, (PIXELS,)).astype(jnp.float32)


def linear(layer, x):
    return np.asarray(x) @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])


def test_encoder_and_decoder_are_two_linear_layers_with_a_relu():
    init, bind = vae(flow_length=2)
    model = bind(init(jax.random.key(0)))
    x = image()
    features = np.maximum(linear(model.encode.hidden, x), 0.0)
    posterior = model.encode(x)
    np.testing.assert_allclose(posterior.mean, linear(model.encode.mean, features), rtol=1e-5, atol=1e-6)
    raw = linear(model.encode.log_std, features)
    np.testing.assert_allclose(posterior.log_std, LOG_STD_RANGE * np.tanh(raw / LOG_STD_RANGE), rtol=1e-5, atol=1e-6)
    z = jnp.array([0.5, -1.0, 2.0])
    logits = linear(model.decode.logits, np.maximum(linear(model.decode.hidden, z), 0.0))
    np.testing.assert_allclose(model.decode(z), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("amortized", [False, True])
def test_encoder_and_decoder_start_the_same_for_every_flow_length(amortized):
    key = jax.random.key(3)
    plain = {str(path): leaf for path, leaf in jax.tree.leaves_with_path(vae(flow_length=0)[0](key))}
    flowing = {
        str(path): leaf for path, leaf in jax.tree.leaves_with_path(vae(flow_length=4, amortized=amortized)[0](key))
    }
    compared = [path for path in plain if "hidden" in path or "mean" in path or "logits" in path]
    assert len(compared) == 8
    for path in compared:
        np.testing.assert_array_equal(plain[path], flowing[path])


def test_amortized_flows_start_near_the_flow_that_all_examples_would_share():
    key = jax.random.key(0)
    shared_init, shared_bind = vae(flow_length=4)
    init, bind = vae(flow_length=4, amortized=True)
    shared = shared_bind(shared_init(key)).encode(image()).flow
    model = bind(init(key))
    first, second = model.encode(image(0)).flow, model.encode(image(1)).flow
    for mine, other, common in zip(first, second, shared, strict=True):
        assert mine.shape == common.shape
        np.testing.assert_allclose(mine, common, atol=0.05)
        assert not np.array_equal(mine, other)  # they do depend on the example


def test_log_std_stays_in_range_and_the_free_energy_finite_for_huge_weights():
    init, bind = vae(flow_length=4)
    params = jax.tree.map(lambda leaf: 1e4 * leaf, init(jax.random.key(0)))
    posterior = bind(params).encode(image())
    assert np.all(np.abs(posterior.log_std) <= LOG_STD_RANGE)

    def value(params):
        return free_energy(bind(params), image(), jax.random.key(1)).free_energy

    result, gradient = jax.jit(jax.value_and_grad(value))(params)
    assert np.isfinite(result)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_many_seeds_initialise_under_vmap_as_one_by_one():
    init, _ = vae(flow_length=2)
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.vmap(init)(keys)
    for number, key in enumerate(keys):
        for many, one in zip(jax.tree.leaves(together), jax.tree.leaves(init(key)), strict=True):
            np.testing.assert_allclose(many[number], one, rtol=1e-6)
