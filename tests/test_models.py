"""The VAE's modules: what each K shares, how amortised flows start, and that extremes stay finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import weights

from planar_vae_jax.models import LOG_STD_RANGE, VAE
from planar_vae_jax.objectives import free_energy

SHAPE, HIDDEN, LATENT = (4, 3), 7, 3


def vae(**options):
    return VAE(SHAPE, hidden=HIDDEN, latent=LATENT, **options)


def images(count=2, seed=0):
    return jax.random.bernoulli(jax.random.key(seed), 0.5, (count, *SHAPE)).astype(jnp.float32)


def linear(layer, x):
    return np.asarray(x) @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])


def test_encoder_and_decoder_are_two_linear_layers_with_a_relu():
    architecture = vae(flow_length=2)
    params = weights(architecture)
    x = images()
    encode, decode = (jax.jit(part) for part in (architecture.bind(params).encode, architecture.bind(params).decode))
    features = np.maximum(linear(params["encode"]["hidden"], x.reshape(2, -1)), 0.0)
    posterior = encode(x)
    np.testing.assert_allclose(posterior.mean, linear(params["encode"]["mean"], features), rtol=1e-5, atol=1e-6)
    raw = linear(params["encode"]["log_std"], features)
    np.testing.assert_allclose(posterior.log_std, LOG_STD_RANGE * np.tanh(raw / LOG_STD_RANGE), rtol=1e-5, atol=1e-6)
    z = jnp.array([[0.5, -1.0, 2.0]])
    logits = linear(params["decode"]["logits"], np.maximum(linear(params["decode"]["hidden"], z), 0.0))
    np.testing.assert_allclose(decode(z), logits.reshape(1, *SHAPE), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("amortized", [False, True])
def test_batches_of_any_rank_are_the_images_one_by_one(amortized):
    architecture = vae(flow_length=2, amortized=amortized)
    model = architecture.bind(weights(architecture))
    x = images(6)
    encode = jax.jit(model.encode)
    posterior, parts = encode(x.reshape(2, 3, *SHAPE)), [encode(one) for one in x]
    assert posterior.mean.shape == (2, 3, LATENT)
    np.testing.assert_allclose(posterior.mean.reshape(6, -1), [one.mean for one in parts], rtol=1e-5, atol=1e-6)
    z = jax.random.normal(jax.random.key(1), (2, 3, LATENT))
    assert model.decode(z).shape == (2, 3, *SHAPE)
    np.testing.assert_allclose(model.decode(z)[1, 2], model.decode(z[1, 2]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("amortized", [False, True])
def test_encoder_and_decoder_start_the_same_for_every_flow_length(amortized):
    key = jax.random.key(3)
    plain, flowing = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(one.init(key))}
        for one in (vae(flow_length=0), vae(flow_length=4, amortized=amortized))
    )
    compared = [path for path in plain if "hidden" in path or "mean" in path or "logits" in path]
    assert len(compared) == 8
    for path in compared:
        np.testing.assert_array_equal(plain[path], flowing[path])


def test_amortized_flows_start_near_the_flow_that_all_images_would_share():
    key, x = jax.random.key(0), images()
    shared, own = (
        one.bind(one.init(key)).encode(x).params for one in (vae(flow_length=4), vae(flow_length=4, amortized=True))
    )
    for mine, common in zip(own, shared, strict=True):
        assert mine.shape == (2, *common.shape)
        for one in mine:
            np.testing.assert_allclose(one, common, atol=0.05)
        assert not np.array_equal(*mine)  # they do depend on the image


def test_log_std_stays_in_range_and_the_free_energy_finite_for_huge_weights():
    architecture = vae(flow_length=4)
    params = jax.tree.map(lambda leaf: np.float32(1e4) * leaf, weights(architecture))
    assert np.all(np.abs(architecture.bind(params).encode(images()).log_std) <= LOG_STD_RANGE)

    def value(params):
        return jnp.sum(free_energy(architecture.bind(params), images(), jax.random.key(1)).free_energy)

    result, gradient = jax.jit(jax.value_and_grad(value))(params)
    assert np.isfinite(result)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_many_seeds_initialise_under_vmap_as_one_by_one():
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.vmap(vae(flow_length=2).init)(keys)
    for number, key in enumerate(keys):
        for many, one in zip(jax.tree.leaves(together), jax.tree.leaves(vae(flow_length=2).init(key)), strict=True):
            np.testing.assert_allclose(many[number], one, rtol=1e-6)


def test_an_architecture_is_one_static_argument_for_jit():
    traced = []

    def shape(architecture, params):
        traced.append(architecture)
        return architecture.bind(params).decode(jnp.ones((1, LATENT)))

    compiled = jax.jit(shape, static_argnums=0)
    for _ in range(2):
        compiled(vae(), weights(vae()))
    assert len(traced) == 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("amortized", [False, True])
def test_with_64_bit_types_on_both_widths_run(x64, dtype, amortized):
    architecture = vae(flow_length=3, amortized=amortized, dtype=dtype)
    params = architecture.init(jax.random.key(0))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}
    x = images().astype(dtype)
    value, gradient = jax.jit(
        jax.value_and_grad(
            lambda params: jnp.mean(free_energy(architecture.bind(params), x, jax.random.key(1)).free_energy)
        )
    )(params)
    assert str(value.dtype) == dtype
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_shape": (28,)}, ["image_shape", "(28,)"]),
        ({"image_shape": (0, 3)}, ["image_shape", "(0, 3)"]),
        ({"latent": 0}, ["latent", "at least 1", "0"]),
        ({"hidden": 2.5}, ["hidden", "2.5"]),
        ({"latent": True}, ["latent", "True"]),
        ({"h": "relu"}, ["h must be", "tanh", "relu"]),
        ({"flow_length": -1}, ["flow_length", "at least 0", "-1"]),
        ({"flow_length": 0, "amortized": True}, ["flow_length", "at least 1", "amortized"]),
    ],
)
def test_impossible_architectures_are_refused(options, words):
    with pytest.raises(ValueError, match="must be") as caught:
        VAE(**{"image_shape": SHAPE, **options})
    for word in words:
        assert word in str(caught.value)
