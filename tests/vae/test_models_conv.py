"""Gated convolutions, two hidden layers, images in colour: against plain numpy, and how amortised heads start."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close, weights
from flax import nnx

from planar_vae_jax.vae.conv import Convolution, Doubling, Gated, Halving, convolve
from planar_vae_jax.vae.model import FIRST_LOG_SCALE, VAE
from planar_vae_jax.vae.objectives import free_energy, importance_nll

SHAPES = [(8, 4), (4, 8, 3)]


def vae(shape=(8, 4), **options):
    return VAE(shape, **{"latent": 3, "hidden": 7, "flow_length": 2, **options})


def images(shape, count=2):
    return np.random.default_rng(0).integers(0, 2, (count, *shape)).astype(np.float32)


def sizes(tree):
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def same_convolution(image, kernel, bias):
    """5x5 at every pixel of ``[H, W, C]``, zeros around, in plain loops."""
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    rows = [
        [np.tensordot(padded[i : i + 5, j : j + 5], kernel, 3) + bias for j in range(image.shape[1])]
        for i in range(image.shape[0])
    ]
    return np.array(rows)


def test_a_gated_convolution_is_one_times_the_sigmoid_of_another():
    encoder = vae(encoder="conv")
    params = weights(encoder)
    layer = encoder.bind(params).encode.convolutions.conv1
    image = np.random.default_rng(1).normal(size=(8, 4, 1)).astype(np.float32)
    kernel, bias = (params["encode"]["convolutions"]["conv1"]["layer"][name] for name in ("kernel", "bias"))
    value = same_convolution(image, kernel[..., :32], bias[:32])
    gate = same_convolution(image, kernel[..., 32:], bias[32:])
    found = jax.jit(lambda image: layer(image))(image)
    np.testing.assert_allclose(found, value / (1 + np.exp(-gate)), rtol=1e-4, atol=1e-5)
    plain = Gated(lambda x: jnp.concatenate([x, 0 * x], -1))
    np.testing.assert_allclose(plain(jnp.ones((2, 3))), np.full((2, 3), 0.5))


def of_jax(kind, x, kernel):
    """The same map by one operation of JAX's."""
    axes = ("NHWC", "HWIO", "NHWC")
    if kind is Doubling:
        return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=axes)
    stride = (2, 2) if kind is Halving else (1, 1)
    return jax.lax.conv_general_dilated(x, kernel, stride, [(2, 2), (2, 2)], dimension_numbers=axes)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Convolution, np.float64), (Halving, np.float64), (Halving, np.float32), (Doubling, np.float64)],
    indirect=["dtype"],
)
def test_convolutions_are_those_of_jax_to_the_second_derivative_in_either_mode(kind, dtype):
    rng = np.random.default_rng(0)
    x, kernel, dx, dkernel = (rng.normal(size=shape).astype(dtype) for shape in 2 * [(2, 4, 6, 3), (5, 5, 3, 4)])
    layer = nnx.eval_shape(lambda: kind(3, 4, dtype=np.dtype(dtype).name, rngs=nnx.Rngs(0)))

    def derivatives(function):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(function(x, kernel)))

        def slope(x, kernel):
            return jax.jvp(loss, (x, kernel), (dx, dkernel))[1]

        gradient = jax.grad(loss, argnums=(0, 1))
        second = jax.grad(lambda *at: jnp.vdot(gradient(*at)[0], dx) + jnp.vdot(gradient(*at)[1], dkernel), (0, 1))
        return gradient(x, kernel), slope(x, kernel), jax.grad(slope, (0, 1))(x, kernel), second(x, kernel)

    functions = (partial(of_jax, kind), layer.on_cpu, layer.plain)
    theirs, *ours = jax.jit(lambda: [(function(x, kernel), derivatives(function)) for function in functions])()
    tolerance = 1e-4 if dtype == np.float32 else 1e-10
    for mine in ours:
        assert_trees_close(mine, theirs, tolerance=tolerance)


def test_a_training_step_has_convolutions_in_the_order_of_axes_that_is_fast_in_loops():
    x, kernel = np.zeros((2, 4, 6, 3), np.float32), np.zeros((5, 5, 3, 4), np.float32)
    step = jax.grad(lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel))), argnums=(0, 1))
    found = re.findall(r"dim_numbers = (.*?),\s*window", jax.jit(step).lower(x, kernel).as_text())
    assert found == 3 * ["[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_layers_are_those_of_the_sylvester_paper(shape):
    found = sizes(weights(vae(shape, encoder="conv")))
    quarter, channels = shape[0] * shape[1] // 16 * 64, shape[2] if len(shape) == 3 else 1
    kernels = {
        "encode": [(channels, 32), (32, 32), (32, 64), (64, 64), (64, 64)],
        "decode": [None, (64, 64), (64, 32), (32, 32), (32, 32), (32, 32)],
    }
    for part, layers in kernels.items():
        for number, layer in enumerate(layers, 1):
            if layer is not None:
                name = f"['{part}']['convolutions']['conv{number}']['layer']['kernel']"
                assert found[name] == (5, 5, layer[0], 2 * layer[1]), name
    assert found["['encode']['convolutions']['conv6']['layer']['kernel']"] == (quarter, 2 * 256)
    assert found["['decode']['convolutions']['conv1']['layer']['kernel']"] == (3, 2 * quarter)
    assert found["['encode']['mean']['kernel']"] == (256, 3)
    assert found["['decode']['logits']['kernel']"] == (32, channels)


def test_strides_halve_and_double_twice():
    architecture = vae((28, 28), encoder="conv")
    model = architecture.bind(weights(architecture))
    encoder, decoder = model.encode.convolutions, model.decode.convolutions

    def shape(function, *given):
        return jax.eval_shape(function, jax.ShapeDtypeStruct(given, np.float32)).shape

    assert shape(lambda x: encoder.conv2(encoder.conv1(x)), 28, 28, 1) == (14, 14, 32)
    assert shape(lambda x: encoder.conv4(encoder.conv3(x)), 14, 14, 32) == (7, 7, 64)
    assert shape(decoder.conv3, 7, 7, 64) == (14, 14, 32)
    assert shape(decoder.conv5, 14, 14, 32) == (28, 28, 32)
    assert shape(lambda x: model.encode(x).mean, 2, 28, 28) == (2, 3)
    assert shape(model.decode, 5, 2, 3) == (5, 2, 28, 28)


@pytest.mark.parametrize(
    ("shape", "encoder", "likelihood"), [(SHAPES[0], "mlp", "bernoulli"), (SHAPES[1], "conv", "logistic")]
)
def test_batches_of_any_rank_are_the_images_one_by_one(shape, encoder, likelihood):
    architecture = vae(shape, encoder=encoder, likelihood=likelihood, amortized=True, posterior="full")
    model = architecture.bind(weights(architecture))
    x, z = images(shape, 6), np.random.default_rng(1).normal(size=(2, 3, 3)).astype(np.float32)

    def decode(z):
        return model.likelihood.mean(model.decode(z))

    @jax.jit
    def run(x, z):
        return model.encode(x.reshape(2, 3, *shape)), model.encode(x[4]), decode(z), decode(z[1, 2])

    many, one, images_of_many, image_of_one = run(x, z)
    for mine, theirs in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(np.asarray(mine)[1, 1], theirs, rtol=1e-4, atol=1e-5)
    assert images_of_many.shape == (2, 3, *shape)
    np.testing.assert_allclose(np.asarray(images_of_many)[1, 2], image_of_one, rtol=1e-4, atol=1e-5)
    terms = jax.eval_shape(lambda key: free_energy(model, x, key), jax.random.key(2))
    assert {leaf.shape for leaf in terms} == {(6,)}
    assert jax.eval_shape(lambda key: importance_nll(model, x, key, samples=3), jax.random.key(2)).nll.shape == (6,)


def test_every_parameter_of_the_convolutions_is_trained():
    architecture = vae(encoder="conv", amortized=True, likelihood="gaussian", posterior="full")
    params, x = weights(architecture, scale=0.01), images((8, 4), 4)
    gradient = jax.jit(
        jax.grad(lambda params: jnp.sum(free_energy(architecture.bind(params), x, jax.random.key(1)).free_energy))
    )(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.all(np.isfinite(leaf)), path
        assert np.any(np.asarray(leaf) != 0.0), path


@pytest.mark.parametrize(("encoder", "layers"), [("mlp", 2), ("conv", 1)])
def test_amortised_flows_start_near_the_identity(encoder, layers):
    architecture = vae(flow_length=40, amortized=True, encoder=encoder, layers=layers)
    noise = np.random.default_rng(1).normal(size=(100, 2, 3)).astype(np.float32)

    @jax.jit
    def run(key):
        posterior = architecture.bind(architecture.init(key)).encode(images((8, 4)))
        return posterior, posterior.transform(noise)

    posterior, (zK, _, log_det) = run(jax.random.key(0))
    z0 = np.asarray(posterior.mean) + np.exp(posterior.log_std) * noise
    # What 40 layers do in all, against a spread of one.
    assert np.sqrt(np.mean((np.asarray(zK) - z0) ** 2)) < 0.3
    assert np.mean(np.abs(log_det)) < 0.5


def test_two_hidden_layers_are_one_more_relu():
    architecture = vae(layers=2)
    params = weights(architecture)
    x = images((8, 4))

    def layer(part, name, x):
        weights = params[part][name]
        return x @ np.asarray(weights["kernel"]) + np.asarray(weights["bias"])

    hidden = np.maximum(layer("encode", "hidden", x.reshape(2, -1)), 0)
    mean = layer("encode", "mean", np.maximum(layer("encode", "hidden2", hidden), 0))
    model = architecture.bind(params)
    found, decoded = jax.jit(lambda x, z: (model.encode(x).mean, model.decode(z)))(x, mean)
    np.testing.assert_allclose(found, mean, rtol=1e-4, atol=1e-6)
    hidden = np.maximum(layer("decode", "hidden", mean), 0)
    logits = layer("decode", "logits", np.maximum(layer("decode", "hidden2", hidden), 0))
    np.testing.assert_allclose(decoded, logits.reshape(2, 8, 4), rtol=1e-4, atol=1e-5)


def test_the_tree_of_the_default_model_is_that_of_earlier_versions():
    linear = {"kernel", "bias"}
    found = jax.eval_shape(VAE((28, 28)).init, jax.random.key(0))
    assert set(found) == {"encode", "decode"}
    assert set(found["encode"]) == {"hidden", "mean", "log_std", "u", "w", "b"}
    assert set(found["decode"]) == {"hidden", "logits"}
    assert set(found["encode"]["hidden"]) == linear
    # Drawn by version 0.2 from the same key.
    kernel = jax.jit(lambda key: VAE((28, 28)).init(key)["encode"]["hidden"]["kernel"])(jax.random.key(0))
    np.testing.assert_allclose(np.asarray(kernel)[0, :2], [0.04738373, -0.01564453], rtol=1e-6)


def test_a_likelihood_with_a_scale_has_one_of_each_pixel():
    found = jax.jit(lambda key: vae((4, 4, 3), likelihood="gaussian").init(key)["decode"])(jax.random.key(0))
    np.testing.assert_array_equal(found["log_scale"], np.full((4, 4, 3), FIRST_LOG_SCALE, np.float32))
    assert "location" in found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_shape": (8, 6), "encoder": "conv"}, ["image_shape", "divisible by 4", "(8, 6)"]),
        ({"image_shape": (2, 8, 3, 1)}, ["image_shape", "(H, W, C)"]),
        ({"layers": 3}, ["layers", "1, 2", "3"]),
        ({"posterior": "banded"}, ["posterior", "full", "'banded'"]),
        ({"encoder": "resnet"}, ["encoder", "conv", "'resnet'"]),
        ({"likelihood": "poisson"}, ["likelihood", "logistic", "'poisson'"]),
    ],
)
def test_impossible_architectures_are_refused(options, words):
    with pytest.raises(ValueError, match="must") as caught:
        VAE(**{"image_shape": (8, 4), **options})
    for word in words:
        assert word in str(caught.value)
