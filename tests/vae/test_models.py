"""The VAE: what each K shares, how amortised flows start, that extremes stay finite, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from vae_models import drawn, named

from planar_vae_jax.train.loop import train
from planar_vae_jax.vae.likelihoods import LIKELIHOODS, Bernoulli
from planar_vae_jax.vae.mlp import MLPDecoder, MLPEncoder
from planar_vae_jax.vae.model import LOG_STD_RANGE, VAE, PlanarPosterior
from planar_vae_jax.vae.objectives import free_energy, vae_loss

SHAPE, HIDDEN, LATENT = (4, 3), 7, 3
SIZES = {"hidden": HIDDEN, "latent": LATENT}


def images(count=2, seed=0):
    return np.random.default_rng(seed).integers(0, 2, (count, *SHAPE)).astype(np.float32)


def linear(layer, x):
    return np.asarray(x) @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])


def test_encoder_and_decoder_are_two_linear_layers_with_a_relu():
    vae = drawn(SHAPE, flow_length=2, **SIZES)
    x = images()
    z = np.array([[0.5, -1.0, 2.0]], np.float32)
    posterior, decoded = jax.jit(lambda vae, x, z: (vae.encode(x), vae.decode(z)))(vae, x, z)
    features = np.maximum(linear(vae.encoder.hidden.first, x.reshape(2, -1)), 0.0)
    np.testing.assert_allclose(posterior.mean, linear(vae.posterior.mean, features), rtol=1e-5, atol=1e-6)
    raw = linear(vae.posterior.log_std, features)
    np.testing.assert_allclose(posterior.log_std, LOG_STD_RANGE * np.tanh(raw / LOG_STD_RANGE), rtol=1e-5, atol=1e-6)
    logits = linear(vae.decoder.last, np.maximum(linear(vae.decoder.hidden.first, z), 0.0))
    np.testing.assert_allclose(decoded, logits.reshape(1, *SHAPE), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("amortized", [False, True])
def test_batches_of_any_rank_are_the_images_one_by_one(amortized):
    vae = drawn(SHAPE, flow_length=2, amortized=amortized, **SIZES)
    x, z = images(6), np.random.default_rng(1).normal(size=(2, 3, LATENT)).astype(np.float32)

    @jax.jit
    def run(vae, x, z):
        means = vae.encode(x.reshape(2, 3, *SHAPE)).mean, jnp.stack([vae.encode(one).mean for one in x])
        return *means, vae.decode(z), vae.decode(z[1, 2])

    means, one_by_one, decoded, alone = run(vae, x, z)
    assert means.shape == (2, 3, LATENT)
    np.testing.assert_allclose(np.asarray(means).reshape(6, -1), one_by_one, rtol=1e-5, atol=1e-6)
    assert decoded.shape == (2, 3, *SHAPE)
    np.testing.assert_allclose(np.asarray(decoded)[1, 2], alone, rtol=1e-5, atol=1e-6)


# --- Initial parameters


def start(key):
    """Models without a flow, with one that all images share, and with amortised flows."""
    options = ({"flow_length": 0}, {"flow_length": 4}, {"flow_length": 4, "amortized": True})
    return [VAE.mlp(SHAPE, **SIZES, **one, rngs=nnx.Rngs(key)) for one in options]


@pytest.fixture(scope="module")
def started():
    return jax.device_get(start(jax.random.key(3)))


@pytest.mark.parametrize("number", [1, 2], ids=["shared", "amortised"])
def test_encoder_and_decoder_start_the_same_for_every_flow_length(started, number):
    plain, flowing = named(started[0]), named(started[number])
    compared = [path for path in plain if not path.endswith((".u", ".w", ".b"))]
    assert len(compared) == 10
    for path in compared:
        np.testing.assert_array_equal(plain[path], flowing[path])


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_parts_made_from_one_stream_start_the_same_for_every_flow_length(covariance):
    """``nnx.Rngs(0)`` counts: what is drawn last, the flow, changes nothing before it."""

    @jax.jit
    def heads(key):
        lengths = ((0, False), (3, False), (3, True))
        options = {"covariance": covariance}
        return [PlanarPosterior(7, 3, k, amortized=own, rngs=nnx.Rngs(key), **options) for k, own in lengths]

    plain, *others = map(named, heads(jax.random.key(0)))
    for other in others:
        for path in (path for path in plain if not path.endswith((".u", ".w", ".b"))):
            np.testing.assert_array_equal(plain[path], other[path])


def test_a_seed_and_its_key_make_the_same_model(started):
    again = VAE.mlp(SHAPE, **SIZES, flow_length=4, rngs=nnx.Rngs(3))
    jax.tree.map(np.testing.assert_array_equal, again, started[1])
    other = VAE.mlp(SHAPE, **SIZES, flow_length=4, rngs=nnx.Rngs(4))
    assert not np.array_equal(other.posterior.w[...], again.posterior.w[...])


def test_amortized_flows_start_near_the_flow_that_all_images_would_share(started):
    _, shared, amortised = started
    own = jax.jit(lambda vae: vae.encode(images()).params)(amortised)
    for mine, name in zip(map(np.asarray, own), "uwb", strict=True):
        common = getattr(shared.posterior, name)[...]
        assert mine.shape == (2, *common.shape)
        for one in mine:
            np.testing.assert_allclose(one, common, atol=0.05)
        assert not np.array_equal(*mine)  # they do depend on the image


def test_log_std_stays_in_range_and_the_free_energy_finite_for_huge_weights():
    vae = jax.tree.map(lambda leaf: np.float32(1e4) * leaf, drawn(SHAPE, flow_length=4, **SIZES))

    def value(vae):
        return jnp.sum(free_energy(vae, images(), jax.random.key(1)).free_energy), vae.encode(images()).log_std

    (result, log_std), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(vae)
    assert np.all(np.abs(log_std) <= LOG_STD_RANGE)
    assert np.isfinite(result)
    assert all(np.all(np.isfinite(np.asarray(leaf))) for leaf in jax.tree.leaves(gradient))


# --- The module as a pytree


def test_many_seeds_initialise_under_vmap_as_one_by_one():
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.vmap(lambda key: VAE.mlp(SHAPE, **SIZES, flow_length=4, rngs=nnx.Rngs(key)))(keys)
    assert type(together) is VAE
    for number in range(3):
        _, alone, _ = start(keys[number])
        for many, one in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(many[number], one, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"amortized": True, "posterior": "full", "likelihood": "logistic"}])
def test_two_models_of_the_same_options_have_one_structure(options):
    """So they are stacked, averaged and compared, and one compiled program serves both."""
    one = drawn(SHAPE, **SIZES, **options)
    made = VAE.mlp(SHAPE, latent=np.int64(LATENT), hidden=np.int32(HIDDEN), **options, rngs=nnx.Rngs(1))
    assert jax.tree.structure(one) == jax.tree.structure(made)
    assert hash(jax.tree.structure(one)) == hash(jax.tree.structure(made))
    traced = []

    @jax.jit
    def decoded(vae):
        traced.append(vae)
        return vae.decode(jnp.ones((1, LATENT)))

    decoded(one), decoded(made)
    assert len(traced) == 1


class RowEncoder(nnx.Module):
    """An encoder of a user: one recurrent cell that reads an image row by row."""

    def __init__(self, features, *, rngs):
        self.features = features
        self.read = nnx.Linear(SHAPE[1], features, rngs=rngs)
        self.turn = nnx.Linear(features, features, rngs=rngs)

    def __call__(self, images):
        h = jnp.zeros((*images.shape[:-2], self.features))
        for row in range(images.shape[-2]):
            h = jnp.tanh(self.read(images[..., row, :]) + self.turn(h))
        return h


def made_of_own_parts(key):
    rngs = nnx.Rngs(key)
    encoder = RowEncoder(5, rngs=rngs)
    decoder = MLPDecoder(2, SHAPE, Bernoulli().head(SHAPE, "float32"), 6, rngs=rngs)
    return VAE(encoder, PlanarPosterior(encoder.features, 2, 3, rngs=rngs), decoder, Bernoulli())


OWN_PIXELS = np.zeros((32, *SHAPE), np.uint8)
OWN_PIXELS[::2, :2], OWN_PIXELS[1::2, 2:] = 255, 255


@pytest.mark.usefixtures("standard_promotion")
def test_parts_of_ones_own_train_in_the_loop_for_several_seeds_side_by_side():
    run = functools.partial(train, vae_loss("elbo", "dynamic"), optax.adam(0.03), batch_size=8, epochs=40)
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def seeds(keys):
        return jax.vmap(lambda key: run(made_of_own_parts(key), OWN_PIXELS, jax.random.fold_in(key, 1)))(keys)

    state, info = seeds(keys)
    assert type(state.params) is VAE
    assert state.params.posterior.u[...].shape == (2, 3, 2)
    loss = np.asarray(info.loss)  # [seeds, epochs, steps]
    assert np.all(loss[:, -1].mean(-1) < 0.6 * loss[:, 0].mean(-1))
    alone, _ = jax.jit(lambda key: run(made_of_own_parts(key), OWN_PIXELS, jax.random.fold_in(key, 1)))(keys[1])
    for many, one in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(many[1], one, rtol=1e-2, atol=1e-3)


def test_scan_grad_optax_and_eval_shape_take_the_module():
    vae, optimizer = drawn(SHAPE, flow_length=2, **SIZES), optax.sgd(0.01)

    def step(carry, key):
        vae, state = carry
        value, gradient = jax.value_and_grad(lambda vae: jnp.mean(free_energy(vae, x, key).free_energy))(vae)
        updates, state = optimizer.update(gradient, state, vae)
        return (optax.apply_updates(vae, updates), state), value

    x = jnp.asarray(images(4))

    def run(vae, keys):
        return jax.lax.scan(step, (vae, optimizer.init(vae)), keys)

    keys = jax.random.split(jax.random.key(0), 3)
    (after, _), values = jax.jit(run)(vae, keys)
    assert type(after) is VAE
    assert values.shape == (3,)
    (shapes, _), _ = jax.eval_shape(run, vae, keys)
    assert [leaf.shape for leaf in jax.tree.leaves(shapes)] == [leaf.shape for leaf in jax.tree.leaves(vae)]
    changed = {name for name, leaf in named(after).items() if not np.array_equal(leaf, named(vae)[name])}
    assert changed == set(named(vae))


def test_a_likelihood_of_ones_own_is_an_object():
    class Laplace(type(LIKELIHOODS["gaussian"])):
        def log_prob(self, x, parameters):
            x, location, log_scale = jnp.broadcast_arrays(x, *parameters)
            return -jnp.sum(jnp.abs(x - location) * jnp.exp(-log_scale) + log_scale + jnp.log(2.0), -1)

    vae = drawn(SHAPE, likelihood=Laplace(), **SIZES)
    assert type(vae.likelihood) is Laplace
    terms = free_energy(vae, jnp.asarray(images()), jax.random.key(0))
    assert terms.free_energy.shape == (2,)
    assert np.all(np.isfinite(terms.free_energy))


@pytest.mark.parametrize(("dtype", "amortized"), [("float32", True), ("float64", False)])
def test_with_64_bit_types_on_both_widths_run(x64, dtype, amortized):
    x = images().astype(dtype)

    @jax.jit
    def run(key):
        def mean(vae):
            return jnp.mean(free_energy(vae, x, jax.random.key(1)).free_energy)

        vae = VAE.mlp(SHAPE, **SIZES, flow_length=3, amortized=amortized, dtype=dtype, rngs=nnx.Rngs(key))
        return vae, jax.value_and_grad(mean)(vae)

    vae, (value, gradient) = run(jax.random.key(0))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(vae)} == {dtype}
    assert str(value.dtype) == dtype
    assert all(np.all(np.isfinite(np.asarray(leaf))) for leaf in jax.tree.leaves(gradient))


# --- What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_shape": (28,)}, ["image_shape", "(28,)"]),
        ({"image_shape": (0, 3)}, ["image_shape", "(0, 3)"]),
        ({"image_shape": (2, 8, 3, 1)}, ["image_shape", "(H, W, C)"]),
        ({"latent": 0}, ["latent", "at least 1", "0"]),
        ({"hidden": 2.5}, ["hidden", "2.5"]),
        ({"latent": True}, ["latent", "True"]),
        ({"h": "relu"}, ["h must be", "tanh", "relu"]),
        ({"flow_length": -1}, ["flow_length", "at least 0", "-1"]),
        ({"flow_length": 0, "amortized": True}, ["flow_length", "at least 1", "amortized"]),
        ({"layers": 3}, ["layers", "1, 2", "3"]),
        ({"posterior": "banded"}, ["posterior", "full", "'banded'"]),
        ({"likelihood": "poisson"}, ["likelihood", "logistic", "'poisson'"]),
        ({"precision": "int8"}, ["precision", "float32, bfloat16", "'int8'"]),
    ],
)
def test_impossible_models_are_refused(options, words):
    with pytest.raises(ValueError, match="must be") as caught:
        VAE.mlp(**{"image_shape": SHAPE, **options}, rngs=nnx.Rngs(0))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_images_of_another_shape_are_refused_at_trace_time(kind):
    vae = drawn((8, 12), kind=kind, latent=3)
    swapped = jax.ShapeDtypeStruct((5, 12, 8), np.float32)
    with pytest.raises(ValueError, match=r"images must be of shape \[\.\.\., 8, 12\].*got \(5, 12, 8\)"):
        jax.eval_shape(vae.encode, swapped)


class Constant(nnx.Module):
    """Holds what a part of a VAE may not hold."""

    def __init__(self, held):
        self.layer = held

    def __call__(self, z):
        return z


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(0)), ["RngCount", "decoder.layer.rngs", "dropout"]),
        (lambda: nnx.BatchNorm(3, rngs=nnx.Rngs(0)), ["BatchStat", "decoder.layer.mean", "without state"]),
        (lambda: nnx.Param(jnp.arange(3)), ["Param, int32", "decoder.layer", "floating-point"]),
    ],
    ids=["dropout", "batch statistics", "integers"],
)
def test_state_that_is_not_a_floating_point_parameter_is_refused(held, words):
    encoder = MLPEncoder(SHAPE, 5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="decoder must hold floating-point") as caught:
        VAE(encoder, PlanarPosterior(5, 2, 1, rngs=nnx.Rngs(0)), Constant(held()), Bernoulli())
    for word in words:
        assert word in str(caught.value)
