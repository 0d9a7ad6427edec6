"""A bijection inside FlowJAX, and layers carried over from there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draw, stack

pytest.importorskip("flowjax", reason="needs FlowJAX: pip install '.[flowjax]'")

import equinox as eqx
from flowjax.bijections import Affine, Chain, Flip, Identity, Invert, Permute, Planar, Scan, Vmap
from flowjax.distributions import Normal, StandardNormal, Transformed
from flowjax.flows import planar_flow as flowjax_planar_flow
from flowjax.train import fit_to_data, fit_to_key_based_loss
from flowjax.train.losses import ElboLoss
from paramax import NonTrainable

from planar_vae_jax import PlanarDensity, planar_flow
from planar_vae_jax.clients.flowjax import PlanarBijection, from_flowjax

pytestmark = pytest.mark.usefixtures("any_promotion")


def disturbed(bijection, scale=0.7):
    """With random parameters of this size, as after a training; FlowJAX starts at 0.01."""
    arrays, rest = eqx.partition(bijection, eqx.is_inexact_array)
    leaves, tree = jax.tree.flatten(arrays)
    rng = np.random.default_rng(0)
    return eqx.combine(tree.unflatten([jnp.asarray(scale * rng.normal(size=leaf.shape)) for leaf in leaves]), rest)


# --- The bijection


@pytest.mark.parametrize("h", ["tanh", "softsign"])
def test_it_is_the_flow_in_both_directions(h, x64):
    params, x = draw(3, 4)
    bijection = PlanarBijection(params, h)
    assert (bijection.shape, bijection.cond_shape) == ((3,), None)
    y, log_det = bijection.transform_and_log_det(x)
    expected = planar_flow(params, x, h=h)
    np.testing.assert_allclose(y, expected[0], rtol=0, atol=1e-13)
    np.testing.assert_allclose(log_det, expected[1], rtol=0, atol=1e-13)
    back, inverse = Invert(bijection).transform_and_log_det(y)
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-12)
    np.testing.assert_allclose(inverse, -log_det, rtol=0, atol=1e-12)


def test_chain_scan_and_vmap_take_it(x64):
    flows = [draw(3, 2, seed=seed)[0] for seed in range(4)]
    x = draw(3, 2)[1]
    chained = Chain([PlanarBijection(params) for params in flows])
    scanned = Scan(eqx.filter_vmap(PlanarBijection)(stack(flows)))
    beside = Vmap(eqx.filter_vmap(PlanarBijection)(stack(flows)), in_axes=eqx.if_array(0))
    y, log_det = chained.transform_and_log_det(x)
    np.testing.assert_allclose(scanned.transform_and_log_det(x)[0], y, rtol=0, atol=1e-12)
    np.testing.assert_allclose(scanned.inverse_and_log_det(y)[1], -log_det, rtol=0, atol=1e-12)
    each = np.stack([planar_flow(params, x)[0] for params in flows])
    np.testing.assert_allclose(beside.transform(np.broadcast_to(x, (4, 3))), each, rtol=0, atol=1e-12)


def test_it_is_fitted_to_data_with_an_exact_inverse():
    """Of a normal, whose entropy is the least that the loss can be."""
    scale = jnp.array([2.0, 0.5])
    x = scale * jax.random.normal(jax.random.key(0), (2000, 2))
    layers = PlanarDensity.init(jax.random.key(1), 4, 2).params
    flow = Transformed(StandardNormal((2,)), Chain([Invert(PlanarBijection(layers)), Affine(jnp.zeros(2))]))
    flow, losses = fit_to_data(
        jax.random.key(2), flow, x, max_epochs=20, batch_size=200, learning_rate=0.03, show_progress=False
    )
    entropy = float(jnp.log(scale).sum() + 1 + jnp.log(2 * jnp.pi))
    assert losses["val"][-1] == pytest.approx(entropy, abs=0.15)
    drawn = flow.sample(jax.random.key(3), (2000,))
    np.testing.assert_allclose(drawn.std(0), scale, rtol=0.1)


def test_it_is_fitted_to_an_unnormalised_density():
    target = Normal(jnp.array([0.5, -0.5]), jnp.array([1.5, 0.8]))
    layers = PlanarDensity.init(jax.random.key(0), 4, 2).params
    flow = Transformed(StandardNormal((2,)), Chain([PlanarBijection(layers), Affine(jnp.zeros(2))]))
    loss = ElboLoss(lambda z: target.log_prob(z).sum() + 3.0, num_samples=200)
    flow, losses = fit_to_key_based_loss(
        jax.random.key(1), flow, loss_fn=loss, steps=300, learning_rate=0.02, show_progress=False
    )
    assert np.mean(losses[-20:]) == pytest.approx(-3.0, abs=0.05)


def test_layers_with_leading_axes_are_refused():
    params = stack([draw(3, 2)[0]] * 4)
    message = r"params must be Planar\(u \[K, D\], w \[K, D\], b \[K\]\); got u \(4, 2, 3\)"
    with pytest.raises(ValueError, match=message):
        PlanarBijection(params)
    with pytest.raises(ValueError, match=r"h must be one of"):
        PlanarBijection(draw(3, 2)[0], "relu")


# --- Layers carried over


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("invert", [True, False])
def test_the_layers_of_flowjaxs_own_constructor_are_the_same_map(dim, invert, x64):
    flow = flowjax_planar_flow(jax.random.key(0), base_dist=StandardNormal((dim,)), flow_layers=6, invert=invert)
    bijection = disturbed(flow.bijection)
    params, permutation = from_flowjax(bijection)
    assert (params.u.shape, permutation.shape) == ((6, dim), (dim,))
    x = np.random.default_rng(1).normal(size=(20, dim))
    if invert:
        expected = jax.vmap(bijection.inverse_and_log_det)(x)
        y, log_det = planar_flow(params, x)
        y = y[:, permutation]
        density = PlanarDensity(params, inverted=True)
        log_prob = flow.base_dist.log_prob(y) + log_det
        np.testing.assert_allclose(density.log_prob(x), log_prob, rtol=0, atol=1e-12)
    else:
        expected = jax.vmap(bijection.transform_and_log_det)(x)
        y, log_det = planar_flow(params, x[:, permutation])
    np.testing.assert_allclose(y, expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(log_det, expected[1], rtol=0, atol=1e-12)


def test_any_order_of_layers_and_permutations_is_the_same_map(x64):
    def planar(seed):
        return disturbed(Planar(jax.random.key(seed), dim=4))

    shuffle = Permute(np.array([2, 0, 3, 1]))
    bijection = Chain(
        [
            Invert(shuffle),
            planar(0),
            NonTrainable(Chain([Flip((4,)), planar(1)])),
            Identity((4,)),
            Invert(Invert(planar(2))),
            shuffle,
            shuffle,
        ]
    )
    x = np.random.default_rng(2).normal(size=4)
    y, log_det = bijection.transform_and_log_det(x)
    params, permutation = from_flowjax(bijection)
    np.testing.assert_allclose(planar_flow(params, x[permutation])[0], y, rtol=0, atol=1e-12)
    params, permutation = from_flowjax(Invert(bijection))
    found = planar_flow(params, x)
    np.testing.assert_allclose(found[0][permutation], y, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found[1], log_det, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("bijection", "message"),
    [
        (Planar(jax.random.key(0), dim=2, negative_slope=0.1), "must have tanh layers; got leaky ReLU .*=0.1"),
        (Planar(jax.random.key(0), dim=2, cond_dim=3, width_size=4, depth=1), r"must be unconditional; .* \(3,\)"),
        (Chain([Planar(jax.random.key(0), dim=2), Affine(jnp.zeros(2))]), "and Invert; got Affine"),
        (Flip((2,)), "must hold Planar layers; it has none"),
        (Chain([Planar(jax.random.key(0), dim=2), Invert(Planar(jax.random.key(1), dim=2))]), "in one direction"),
    ],
    ids=["leaky", "conditional", "affine", "none", "directions"],
)
def test_anything_else_is_refused_with_the_reason(bijection, message):
    with pytest.raises(ValueError, match=message):
        from_flowjax(bijection)
