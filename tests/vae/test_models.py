"""The VAE's modules: what each K shares, how amortised flows start, and that extremes stay finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import weights

from planar_vae_jax.vae.model import LOG_STD_RANGE, VAE
from planar_vae_jax.vae.objectives import free_energy

SHAPE, HIDDEN, LATENT = (4, 3), 7, 3


def vae(**options):
    return VAE(SHAPE, hidden=HIDDEN, latent=LATENT, **options)


def images(count=2, seed=0):
    return np.random.default_rng(seed).integers(0, 2, (count, *SHAPE)).astype(np.float32)


def linear(layer, x):
    return np.asarray(x) @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])


def test_encoder_and_decoder_are_two_linear_layers_with_a_relu():
    architecture = vae(flow_length=2)
    params = weights(architecture)
    x = images()
    z = np.array([[0.5, -1.0, 2.0]], np.float32)
    model = architecture.bind(params)
    posterior, decoded = jax.jit(lambda x, z: (model.encode(x), model.decode(z)))(x, z)
    features = np.maximum(linear(params["encode"]["hidden"], x.reshape(2, -1)), 0.0)
    np.testing.assert_allclose(posterior.mean, linear(params["encode"]["mean"], features), rtol=1e-5, atol=1e-6)
    raw = linear(params["encode"]["log_std"], features)
    np.testing.assert_allclose(posterior.log_std, LOG_STD_RANGE * np.tanh(raw / LOG_STD_RANGE), rtol=1e-5, atol=1e-6)
    logits = linear(params["decode"]["logits"], np.maximum(linear(params["decode"]["hidden"], z), 0.0))
    np.testing.assert_allclose(decoded, logits.reshape(1, *SHAPE), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("amortized", [False, True])
def test_batches_of_any_rank_are_the_images_one_by_one(amortized):
    architecture = vae(flow_length=2, amortized=amortized)
    model = architecture.bind(weights(architecture))
    x, z = images(6), np.random.default_rng(1).normal(size=(2, 3, LATENT)).astype(np.float32)

    @jax.jit
    def run(x, z):
        means = model.encode(x.reshape(2, 3, *SHAPE)).mean, jnp.stack([model.encode(one).mean for one in x])
        return *means, model.decode(z), model.decode(z[1, 2])

    means, one_by_one, decoded, alone = run(x, z)
    assert means.shape == (2, 3, LATENT)
    np.testing.assert_allclose(np.asarray(means).reshape(6, -1), one_by_one, rtol=1e-5, atol=1e-6)
    assert decoded.shape == (2, 3, *SHAPE)
    np.testing.assert_allclose(np.asarray(decoded)[1, 2], alone, rtol=1e-5, atol=1e-6)


@jax.jit
def start(key):
    """Parameters without a flow, with one that all images share, and with amortised flows."""
    options = ({"flow_length": 0}, {"flow_length": 4}, {"flow_length": 4, "amortized": True})
    return [vae(**one).init(key) for one in options]


@pytest.fixture(scope="module")
def started():
    return jax.device_get(start(jax.random.key(3)))


@pytest.mark.parametrize("number", [1, 2], ids=["shared", "amortised"])
def test_encoder_and_decoder_start_the_same_for_every_flow_length(started, number):
    plain, flowing = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        for params in (started[0], started[number])
    )
    compared = [path for path in plain if "hidden" in path or "mean" in path or "logits" in path]
    assert len(compared) == 8
    for path in compared:
        np.testing.assert_array_equal(plain[path], flowing[path])


def test_amortized_flows_start_near_the_flow_that_all_images_would_share(started):
    _, shared, amortised = started
    own = jax.jit(lambda params: vae(flow_length=4, amortized=True).bind(params).encode(images()).params)(amortised)
    for mine, name in zip(map(np.asarray, own), "uwb", strict=True):
        common = shared["encode"][name]
        assert mine.shape == (2, *common.shape)
        for one in mine:
            np.testing.assert_allclose(one, common, atol=0.05)
        assert not np.array_equal(*mine)  # they do depend on the image


def test_log_std_stays_in_range_and_the_free_energy_finite_for_huge_weights():
    architecture = vae(flow_length=4)
    params = jax.tree.map(lambda leaf: np.float32(1e4) * leaf, weights(architecture))

    def value(params):
        model = architecture.bind(params)
        return jnp.sum(free_energy(model, images(), jax.random.key(1)).free_energy), model.encode(images()).log_std

    (result, log_std), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
    assert np.all(np.abs(log_std) <= LOG_STD_RANGE)
    assert np.isfinite(result)
    assert all(np.all(np.isfinite(np.asarray(leaf))) for leaf in jax.tree.leaves(gradient))


def test_many_seeds_initialise_under_vmap_as_one_by_one():
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.device_get(jax.vmap(vae(flow_length=4).init)(keys))
    for number in range(3):
        _, alone, _ = start(keys[number])
        for many, one in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
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


@pytest.mark.parametrize(("dtype", "amortized"), [("float32", True), ("float64", False)])
def test_with_64_bit_types_on_both_widths_run(x64, dtype, amortized):
    architecture = vae(flow_length=3, amortized=amortized, dtype=dtype)
    x = images().astype(dtype)

    @jax.jit
    def run(key):
        def mean(params):
            return jnp.mean(free_energy(architecture.bind(params), x, jax.random.key(1)).free_energy)

        params = architecture.init(key)
        return params, jax.value_and_grad(mean)(params)

    params, (value, gradient) = run(jax.random.key(0))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}
    assert str(value.dtype) == dtype
    assert all(np.all(np.isfinite(np.asarray(leaf))) for leaf in jax.tree.leaves(gradient))


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
