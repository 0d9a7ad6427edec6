"""The shapes in the annotations of the public functions are those of their arguments and results.

They are checked in these tests only: users get the errors of the functions.
"""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from annotations import checked, hints

from planar_vae_jax import Planar, PlanarDensity, PlanarFlow, flows

refused = pytest.raises((jaxtyping.TypeCheckError, ValueError))

K, D = 2, 3


def numbers(*shape):
    return jnp.asarray(0.5 * np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32))


def layers(*lead):
    return Planar(numbers(*lead, K, D), numbers(*lead, K, D), numbers(*lead, K))


# --- The classes


def checks_the_fields_of(kind):
    """Makes a function of some fields of a class into one that checks them by the annotations of the class."""

    def decorator(function):
        function.__annotations__ = hints(kind)
        return checked(function)

    return decorator


@checks_the_fields_of(Planar)
def planar(u, w, b):
    """Checks the parameters of a flow together."""


@checks_the_fields_of(PlanarFlow)
def planar_density(params, mean, log_std, lower):
    """Checks the fields of a density together."""
    planar(*params)


def check_density(flow):
    planar_density(flow.params, flow.mean, flow.log_std, flow.lower)


def test_the_fields_of_planar():
    planar(*layers())
    planar(*layers(4, 5))
    planar(*checked(flows.init_planar)(jax.random.key(0), K, D))
    jax.vmap(lambda params: planar(*params))(layers(4))
    for wrong in ({"u": (K,)}, {"w": (K, D + 1)}, {"b": (K, D)}, {"u": (4, K, D)}):
        shapes = {"u": (K, D), "w": (K, D), "b": (K,)} | wrong
        with refused:
            planar(**{name: numbers(*shape) for name, shape in shapes.items()})


# --- The map


SHAPES = [((), ()), ((), (4,)), ((), (5, 4)), ((4,), (4,)), ((4,), (5, 4)), ((5, 1), (4,)), ((4,), ())]
MAPS = pytest.mark.parametrize("function", [flows.planar_flow, flows.inverse_planar_flow])


@MAPS
@pytest.mark.parametrize(("of_params", "of_events"), SHAPES, ids=str)
def test_the_map_and_its_inverse(function, of_params, of_events):
    params, z = layers(*of_params), numbers(*of_events, D)
    zK, log_det = checked(function)(params, z)
    lead = np.broadcast_shapes(of_params, of_events)
    assert (zK.shape, log_det.shape) == ((*lead, D), lead)
    jax.eval_shape(checked(function), params, z)
    jax.eval_shape(jax.vmap(checked(function), (None, 0)), params, z[None])
    jax.eval_shape(jax.grad(lambda params: jnp.sum(checked(function)(params, z)[1])), params)


@MAPS
def test_the_map_of_what_is_no_event(function):
    for wrong in (jnp.float32(1), numbers(D + 1), numbers(4, 1), jnp.arange(D)):
        with refused:
            checked(function)(layers(), wrong)
    with refused:
        checked(function)(layers(4), numbers(5, D))


# --- Densities


DENSITIES = [
    PlanarFlow(layers()),
    PlanarFlow(layers(), numbers(4, D), numbers(D)),
    PlanarFlow(layers(4), numbers(5, 1, D), 0.5),
    PlanarFlow(layers(4), 0.0, numbers(4, D), lower=numbers(D, D)),
    PlanarFlow(layers(), 0.0, 0.0, lower=numbers(5, 4, D, D)),
]


@pytest.mark.parametrize("flow", DENSITIES, ids=lambda flow: str(flow.batch_shape))
def test_the_methods_of_a_density(flow):
    methods = {name: checked(getattr(PlanarFlow, name)) for name in ("transform", "sample", "log_prob")}
    both, base_kl = checked(PlanarFlow.sample_and_log_prob), checked(PlanarFlow.base_kl.fget)
    key = jax.random.key(0)

    def run(flow, x):
        check_density(flow)
        found = [methods["transform"](flow, x), methods["log_prob"](flow, x), both(flow, key), both(flow, key, 7)]
        return *found, methods["sample"](flow, key, (2, 3)), base_kl(flow), checked(flows.first_layers)(flow, 1)

    batch = flow.batch_shape
    for points in ((), (1,), (7, *batch)):
        x = numbers(*points, D)
        transformed, log_prob, *_, sample, _, part = jax.eval_shape(run, flow, x)
        lead = np.broadcast_shapes(points, batch)
        assert [leaf.shape for leaf in transformed] == [(*lead, D), lead, lead]
        assert (log_prob.shape, sample.shape) == (lead, (2, 3, *batch, D))
        assert [leaf.shape for leaf in jax.tree.leaves(part)] == [leaf.shape for leaf in jax.tree.leaves(flow)]
        jax.eval_shape(jax.vmap(run, (None, 0)), flow, x[None])
    run(flow, numbers(D))
    for wrong in (jnp.float32(1), numbers(D + 1), jnp.arange(D)):
        for name in ("transform", "log_prob"):
            with refused:
                methods[name](flow, wrong)


@pytest.mark.parametrize("inverted", [False, True])
def test_the_methods_of_a_density_on_data(inverted):
    methods = {name: checked(getattr(PlanarDensity, name)) for name in ("transform", "inverse", "sample", "log_prob")}
    both, key = checked(PlanarDensity.sample_and_log_prob), jax.random.key(0)
    density = PlanarDensity(layers(4), numbers(5, 1, D), 0.5, numbers(D, D), inverted=inverted)
    batch = density.batch_shape

    def run(density, x):
        found = [methods[name](density, x) for name in ("transform", "inverse", "log_prob")]
        return *found, both(density, key, 7), methods["sample"](density, key)

    for points in ((), (7, *batch)):
        lead = np.broadcast_shapes(points, batch)
        *maps, log_prob, (drawn, _), sample = jax.eval_shape(run, density, numbers(*points, D))
        assert all([leaf.shape for leaf in one] == [(*lead, D), lead] for one in maps)
        assert (log_prob.shape, drawn.shape, sample.shape) == (lead, (7, *batch, D), (*batch, D))
    checked(PlanarDensity.init)(key, K, D, loc=numbers(D), scale=2.0, inverted=inverted)
    for name in ("transform", "inverse", "log_prob"):
        with refused:
            methods[name](density, numbers(D + 1))


def test_where_events_are_after_each_layer():
    function = checked(flows.planar_trajectory)
    for of_params, of_events in SHAPES:
        lead = np.broadcast_shapes(of_params, of_events)
        z, log_det = jax.eval_shape(function, layers(*of_params), numbers(*of_events, D))
        assert (z.shape, log_det.shape) == ((K + 1, *lead, D), (K + 1, *lead))
    with refused:
        function(layers(), numbers(D + 1))


def test_layers_given_by_what_they_do():
    back, there = checked(flows.planar_from_constrained), checked(flows.planar_to_constrained)
    for lead in ((), (4,)):
        assert back(*there(layers(*lead))).u.shape == (*lead, K, D)
    with refused:
        back(numbers(K, D), numbers(K, D), numbers(K, D))


def test_the_fields_of_a_density_of_another_size():
    for wrong in ({"mean": numbers(D + 1)}, {"log_std": numbers(D, 2)}, {"lower": numbers(D, D + 1)}):
        with refused:
            PlanarFlow(layers(), **wrong)
    with refused:
        planar_density(layers(), numbers(D), numbers(D + 1), None)


def test_log_densities():
    normal, bernoulli = checked(flows.standard_normal_log_prob), checked(flows.bernoulli_log_prob)
    for lead in ((), (4,), (5, 4)):
        assert normal(numbers(*lead, D)).shape == lead
        assert jax.vmap(normal)(numbers(2, *lead, D)).shape == (2, *lead)
        assert jax.jit(bernoulli)(jnp.ones(D), numbers(*lead, D)).shape == lead
        assert bernoulli(jnp.ones((*lead, D)), numbers(D)).shape == lead
    assert bernoulli(jnp.ones((D, D)), numbers(4, D, D), axes=(-2, -1)).shape == (4,)
    with refused:
        normal(jnp.float32(1))
    with refused:
        bernoulli(jnp.ones(D), numbers(D + 1))


# --- Targets and names


@pytest.mark.parametrize("name", [*flows.TARGETS, *flows.POINT_TARGETS])
def test_targets(name):
    target = checked(flows.get_target)(name)
    annotation = hints(flows.Target)["log_density"]
    (argument,), result = annotation.__args__[:-1], annotation.__args__[-1]

    @checked
    def log_density(z: argument) -> result:
        return target.log_density(z)

    for lead in ((), (4,), (5, 4)):
        assert jax.eval_shape(log_density, numbers(*lead, 2)).shape == lead
    with refused:
        log_density(numbers(3))


def test_what_takes_no_arrays():
    assert checked(flows.shown_layers)(3) == [0, 1, 2, 3]
    checked(flows.check_nonlinearity)("tanh")
    for function, wrong in ((flows.shown_layers, 2.5), (flows.check_nonlinearity, 1), (flows.get_target, 0)):
        with refused:
            checked(function)(wrong)
    with refused:
        checked(flows.init_planar)(jax.random.key(0), 2, 2.5)
