"""Gated convolutions, two hidden layers, images in colour: against plain numpy, and how amortised heads start."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_trees_close
from vae_models import drawn, named

from planar_vae_jax.vae.conv import Convolution, Doubling, Gated, Halving
from planar_vae_jax.vae.likelihoods import FIRST_LOG_SCALE
from planar_vae_jax.vae.model import VAE
from planar_vae_jax.vae.objectives import free_energy, importance_nll

SHAPES = [(8, 4), (4, 8, 3)]


def conv(shape=(8, 4), **options):
    return drawn(shape, kind="conv", **{"latent": 3, "flow_length": 2, **options})


def mlp(shape=(8, 4), **options):
    return drawn(shape, **{"latent": 3, "hidden": 7, "flow_length": 2, **options})


def images(shape, count=2):
    return np.random.default_rng(0).integers(0, 2, (count, *shape)).astype(np.float32)


def sizes(tree):
    return {path: leaf.shape for path, leaf in named(tree).items()}


def same_convolution(image, kernel, bias):
    """5x5 at every pixel of ``[H, W, C]``, zeros around, in plain loops."""
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    rows = [
        [np.tensordot(padded[i : i + 5, j : j + 5], kernel, 3) + bias for j in range(image.shape[1])]
        for i in range(image.shape[0])
    ]
    return np.array(rows)


def test_a_gated_convolution_is_one_times_the_sigmoid_of_another():
    layer = conv().encoder.conv1
    image = np.random.default_rng(1).normal(size=(8, 4, 1)).astype(np.float32)
    kernel, bias = layer.layer.kernel[...], layer.layer.bias[...]
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


@pytest.mark.parametrize("shape", SHAPES)
def test_the_layers_are_those_of_the_sylvester_paper(shape):
    found = sizes(conv(shape))
    quarter, channels = shape[0] * shape[1] // 16 * 64, shape[2] if len(shape) == 3 else 1
    kernels = {
        "encoder": [(channels, 32), (32, 32), (32, 64), (64, 64), (64, 64)],
        "decoder": [None, (64, 64), (64, 32), (32, 32), (32, 32), (32, 32)],
    }
    for part, layers in kernels.items():
        for number, layer in enumerate(layers, 1):
            if layer is not None:
                name = f".{part}.conv{number}.layer.kernel"
                assert found[name] == (5, 5, layer[0], 2 * layer[1]), name
    assert found[".encoder.conv6.layer.kernel"] == (quarter, 2 * 256)
    assert found[".decoder.conv1.layer.kernel"] == (3, 2 * quarter)
    assert found[".posterior.mean.kernel"] == (256, 3)
    assert found[".decoder.last.kernel"] == (32, channels)


def test_strides_halve_and_double_twice():
    model = conv((28, 28))
    encoder, decoder = model.encoder, model.decoder

    def shape(function, *given):
        return jax.eval_shape(function, jax.ShapeDtypeStruct(given, np.float32)).shape

    assert shape(lambda x: encoder.conv2(encoder.conv1(x)), 28, 28, 1) == (14, 14, 32)
    assert shape(lambda x: encoder.conv4(encoder.conv3(x)), 14, 14, 32) == (7, 7, 64)
    assert shape(decoder.conv3, 7, 7, 64) == (14, 14, 32)
    assert shape(decoder.conv5, 14, 14, 32) == (28, 28, 32)
    assert shape(lambda x: model.encode(x).mean, 2, 28, 28) == (2, 3)
    assert shape(model.decode, 5, 2, 3) == (5, 2, 28, 28)


@pytest.mark.parametrize(
    ("shape", "make", "likelihood"),
    [(SHAPES[0], mlp, "bernoulli"), (SHAPES[1], conv, "logistic")],
    ids=["mlp", "conv"],
)
def test_batches_of_any_rank_are_the_images_one_by_one(shape, make, likelihood):
    model = make(shape, likelihood=likelihood, amortized=True, posterior="full")
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
    model = conv(amortized=True, likelihood="gaussian", posterior="full", scale=0.01)
    x = images((8, 4), 4)
    gradient = jax.jit(jax.grad(lambda model: jnp.sum(free_energy(model, x, jax.random.key(1)).free_energy)))(model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.all(np.isfinite(leaf)), path
        assert np.any(np.asarray(leaf) != 0.0), path


@pytest.mark.parametrize(
    "make", [partial(VAE.mlp, hidden=7, layers=2), VAE.conv], ids=["two hidden layers", "convolutions"]
)
def test_amortised_flows_start_near_the_identity(make):
    noise = np.random.default_rng(1).normal(size=(100, 2, 3)).astype(np.float32)

    @jax.jit
    def run(key):
        model = make((8, 4), latent=3, flow_length=40, amortized=True, rngs=nnx.Rngs(key))
        posterior = model.encode(images((8, 4)))
        return posterior, posterior.transform(noise)

    posterior, (zK, _, log_det) = run(jax.random.key(0))
    z0 = np.asarray(posterior.mean) + np.exp(posterior.log_std) * noise
    # What 40 layers do in all, against a spread of one.
    assert np.sqrt(np.mean((np.asarray(zK) - z0) ** 2)) < 0.3
    assert np.mean(np.abs(log_det)) < 0.5


def test_two_hidden_layers_are_one_more_relu():
    model = mlp(layers=2)
    x = images((8, 4))

    def layer(weights, x):
        return x @ np.asarray(weights.kernel[...]) + np.asarray(weights.bias[...])

    encoder, decoder = model.encoder.hidden, model.decoder.hidden
    hidden = np.maximum(layer(encoder.first, x.reshape(2, -1)), 0)
    mean = layer(model.posterior.mean, np.maximum(layer(encoder.second, hidden), 0))
    found, decoded = jax.jit(lambda model, x, z: (model.encode(x).mean, model.decode(z)))(model, x, mean)
    np.testing.assert_allclose(found, mean, rtol=1e-4, atol=1e-6)
    hidden = np.maximum(layer(decoder.second, np.maximum(layer(decoder.first, mean), 0)), 0)
    np.testing.assert_allclose(decoded, layer(model.decoder.last, hidden).reshape(2, 8, 4), rtol=1e-4, atol=1e-5)


def test_the_tree_of_the_default_model():
    """Names of checkpoints: a change makes stored runs unreadable."""
    found = sizes(jax.eval_shape(lambda: VAE.mlp((28, 28), rngs=nnx.Rngs(0))))
    layers = ["encoder.hidden.first", "posterior.mean", "posterior.log_std", "decoder.hidden.first", "decoder.last"]
    names = {f".{layer}.{name}" for layer in layers for name in ("kernel", "bias")}
    assert set(found) == names | {f".posterior.{name}" for name in "uwb"}


def test_a_likelihood_with_a_scale_has_one_of_each_pixel():
    model = VAE.conv((4, 4, 3), latent=3, likelihood="gaussian", rngs=nnx.Rngs(0))
    log_scale = model.decoder.head.log_scale[...]
    np.testing.assert_array_equal(log_scale, np.full((4, 4, 3), FIRST_LOG_SCALE, np.float32))


def test_images_that_cannot_be_halved_twice_are_refused():
    with pytest.raises(ValueError, match=r"image_shape must have H and W divisible by 4.*got \(8, 6\)"):
        VAE.conv((8, 6), rngs=nnx.Rngs(0))


MESHES = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from planar_vae_jax import vae

model = vae.VAE.conv((8, 8), latent=3, flow_length=2, rngs=nnx.Rngs(0))
images = jnp.asarray(np.random.RandomState(0).randint(0, 2, (16, 8, 8)), jnp.float32)
keys = jax.random.split(jax.random.key(1), 16)

def energies(model, images, keys):
    return vae.free_energy(model, images, keys).free_energy

def slope(model, images, keys):
    value = lambda model: jnp.sum(energies(model, images, keys))
    return jax.grad(value)(model).encoder.conv2.layer.kernel[...]

def check(found, truth, tolerance):
    np.testing.assert_allclose(found, truth, rtol=tolerance, atol=tolerance / 10)

energies_of, slope_of = jax.jit(energies), jax.jit(slope)
one = jax.random.key(2)  # JAX 0.7 cannot draw from keys that are split over an Explicit mesh
want, want_slope = energies_of(model, images, one), slope_of(model, images, one)
explicit = jax.make_mesh((8,), ("b",), axis_types=(AxisType.Explicit,))
with jax.set_mesh(explicit):
    whole, parts = (NamedSharding(explicit, P(*names)) for names in ((), ("b",)))
    arguments = jax.device_put(model, whole), jax.device_put(images, parts), one
    check(energies_of(*arguments), want, 1e-4)
    check(slope_of(*arguments), want_slope, 1e-3)
want, want_slope = energies_of(model, images, keys), slope_of(model, images, keys)
with jax.set_mesh(jax.make_mesh((8,), ("b",), axis_types=(AxisType.Auto,))):
    shared = jax.shard_map(energies, in_specs=(P(), P("b"), P("b")), out_specs=P("b"))
    check(jax.jit(shared)(model, images, keys), want, 1e-4)
    total = jax.shard_map(slope, in_specs=(P(), P("b"), P("b")), out_specs=P())  # summed over devices by JAX
    check(jax.jit(total)(model, images, keys), want_slope, 1e-3)
"""


def test_convolutions_take_images_that_are_split_over_an_explicit_mesh_or_by_shard_map():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", MESHES], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
