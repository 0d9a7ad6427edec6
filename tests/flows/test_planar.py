"""The public functions: shapes, dtypes, methods, errors, how a flow is drawn. Against jacfwd: ``test_flow_map``."""

import contextlib
import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, draw, precision

from planar_vae_jax import Planar, init_planar, inverse_planar_flow, planar_flow
from planar_vae_jax.flows import _xla

# --- The public functions


def test_an_unknown_nonlinearity_is_refused_with_the_known_ones():
    params, z0 = draw(2, 3, dtype=np.float32)
    with pytest.raises(ValueError, match=r"h must be one of tanh, softsign.*got 'relu'"):
        planar_flow(params, z0, h="relu")


def test_an_unknown_method_is_refused_with_the_known_ones():
    params, z0 = draw(2, 3, dtype=np.float32)
    with pytest.raises(ValueError, match=r"method must be one of scan, gram, or None; got 'loop'"):
        planar_flow(params, z0, method="loop")


BOTH = pytest.mark.parametrize(
    ("flow", "name"), [(planar_flow, "z0"), (inverse_planar_flow, "zK")], ids=["forward", "inverse"]
)


@BOTH
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 4)])
def test_an_event_of_the_wrong_shape_is_refused_at_trace_time(shape, flow, name):
    params, _ = draw(2, 3, dtype=np.float32)
    with pytest.raises(ValueError, match=rf"{name} must be of shape \[\.\.\., 2\], as params has D = 2; got shape \("):
        jax.eval_shape(flow, params, np.zeros(shape, np.float32))


@BOTH
def test_leading_axes_that_do_not_broadcast_are_refused(flow, name):
    params = Planar(*(np.zeros(shape, np.float32) for shape in ((4, 3, 2), (4, 3, 2), (4, 3))))
    with pytest.raises(ValueError, match=rf"leading axes of {name} and params must broadcast; got shape \(5, 2\)"):
        flow(params, np.zeros((5, 2), np.float32))


@pytest.mark.parametrize("dtype", ["int32", "float16", "bfloat16"])
def test_an_event_of_another_dtype_is_refused_and_both_are_named(dtype):
    params, _ = draw(2, 3, dtype=np.float32)
    with pytest.raises(ValueError, match=rf"z0 and params must be of one floating dtype; got {dtype} and .* float32"):
        planar_flow(params, np.zeros(2, jnp.dtype(dtype)))


@pytest.mark.parametrize(
    "change",
    [{"u": (2,)}, {"w": (3, 1)}, {"w": (2, 3)}, {"b": ()}, {"b": (2,)}, {"b": (3, 2)}, {"u": (1, 3, 2)}, {"b": (1, 3)}],
    ids=str,
)
def test_parameters_of_the_wrong_shape_are_refused_and_their_shapes_named(change):
    shapes = {"u": (3, 2), "w": (3, 2), "b": (3,)} | change
    params = Planar(**{name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    with pytest.raises(ValueError, match=r"params must be Planar\(u \[\.\.\., K, D\].*; got u \("):
        planar_flow(params, np.zeros(2, np.float32))


@contextlib.contextmanager
def warnings_of_compilation():
    """The messages that ``jax.log_compiles`` gives."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def program(params, z0, method):
    return jax.jit(functools.partial(planar_flow, method=method)).lower(params, z0).as_text()


@pytest.mark.parametrize(
    ("flows", "events", "flow_length", "dim", "expected"),
    [
        ((), (), 1, 784, "gram"),  # one event may be one of a vmap
        ((), (9,), 80, 5, "gram"),
        ((), (9,), 81, 5, "scan"),
        ((), (9,), 3, 4, "scan"),
        ((), (9,), 0, 9, "scan"),
        ((9,), (9,), 3, 8, "scan"),  # an event a flow
        ((9,), (), 3, 8, "scan"),
        ((9,), (1, 9), 3, 8, "scan"),
        ((9,), (7, 9), 3, 8, "gram"),  # samples of an event
        ((9, 1), (9, 7), 3, 8, "gram"),
        ((1,), (7,), 3, 8, "gram"),
        ((9,), (7, 9), 3, 2, "scan"),
    ],
)
def test_without_a_method_the_documented_one_is_taken(flows, events, flow_length, dim, expected, monkeypatch):
    monkeypatch.setattr(_xla, "on_gpu", lambda *arrays: False)  # as on a CPU, wherever this runs
    shapes = (*flows, flow_length, dim), (*flows, flow_length, dim), (*flows, flow_length), (*events, dim)
    *params, z0 = (jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)
    programs = {method: program(Planar(*params), z0, method) for method in ("scan", "gram", None)}
    assert (programs["scan"] == programs["gram"]) == (flow_length == 0)
    assert programs[None] == programs[expected]


SHAPES = [  # leading axes of the parameters, of the events
    ((), (4,)),
    ((), (2, 3)),
    ((), (0,)),
    ((4,), ()),
    ((4,), (4,)),
    ((4,), (3, 4)),
    ((3, 1), (4,)),
    ((3, 1), (1, 4)),
    ((3, 4), (3, 4)),
    ((1,), (4,)),
    ((0,), (0,)),
    ((1, 4), (3, 1)),
]


ROWS = 12  # the most entries of a case; others are filled up to it, so that one program serves all


@functools.cache
def of_each_row():
    return jax.jit(lambda *rows: (jax.vmap(planar_flow)(*rows), jax.vmap(inverse_planar_flow)(*rows)))


@pytest.mark.parametrize(("flows", "events"), SHAPES, ids=str)
def test_leading_axes_are_broadcast_and_each_entry_is_its_own_flow_of_its_own_event(flows, events, x64):
    dim = 2 if flows == (4,) else 6
    rng = np.random.default_rng(0)
    params = Planar(*(0.5 * rng.normal(size=(*flows, *shape)) for shape in ((3, dim), (3, dim), (3,))))
    z0 = rng.normal(size=(*events, dim))
    lead = np.broadcast_shapes(flows, events)

    def rows(leaf, own):
        shape = np.shape(leaf)[np.ndim(leaf) - own :]
        return np.resize(np.broadcast_to(leaf, (*lead, *shape)), (ROWS, *shape))

    @jax.jit
    def results(*case):
        forward = [planar_flow(*case, method=method) for method in ("scan", "gram")]
        return *forward, inverse_planar_flow(*case)

    forward, inverse = of_each_row()(Planar(*map(rows, params, (2, 2, 1))), rows(z0, 1))
    for (z, log_det), expected in zip(results(params, z0), (forward, forward, inverse), strict=True):
        assert (z.shape, log_det.shape) == ((*lead, dim), lead)
        expected = [leaf[: log_det.size] for leaf in expected]
        assert_trees_close([z.reshape(-1, dim), log_det.ravel()], expected, tolerance=1e-14)


def test_numpy_arrays_and_lists_are_taken():
    u, w, b, z0 = [[0.1, 0.2]], [[1.0, -0.5]], [0.3], [[0.5, 0.25], [1.0, 2.0]]
    expected = planar_flow(Planar(*map(jnp.array, (u, w, b))), jnp.array(z0))
    for one in (Planar(u, w, b), (u, w, b), Planar(*(np.array(leaf, np.float32) for leaf in (u, w, b)))):
        assert_trees_close(planar_flow(one, z0), expected, tolerance=0)
        assert_trees_close(inverse_planar_flow(one, expected[0])[0], np.array(z0), tolerance=1e-6)


@pytest.mark.parametrize(("dim", "dtype"), [(2, jnp.float16), (6, jnp.bfloat16)], ids=["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32_and_returned_so(dim, dtype):
    params, z0 = draw(dim, 3, dtype=dtype)
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float32), (params, z0))
    for function in (planar_flow, inverse_planar_flow):
        result = function(params, z0)
        assert {leaf.dtype.name for leaf in result} == {"float32"}
        assert_trees_close(result, function(*wide), tolerance=0)
        gradient = jax.grad(lambda params, function=function: function(params, z0)[1])(params)
        assert {leaf.dtype for leaf in gradient} == {jnp.dtype(dtype)}


def test_eager_calls_are_compiled_once():
    params, z0 = draw(2, 3, dtype=np.float32)

    def total(function):
        return lambda params, z: jnp.sum(function(params, z)[1])

    flows = (planar_flow, inverse_planar_flow)
    for function in (*flows, *(jax.grad(total(flow)) for flow in flows)):
        for _ in range(2):
            function(params, z0)
        with jax.log_compiles(), warnings_of_compilation() as compiled:
            for scale in (1.0, 2.0, 3.0):
                function(params, np.float32(scale) * z0)
        assert compiled == []


def shapes(flow_length, dim):
    return Planar(*(jax.ShapeDtypeStruct((flow_length, *rest), np.float32) for rest in ((dim,), (dim,), ())))


def test_compile_time_does_not_grow_with_the_layers():
    # What XLA is given is the same program but for its sizes.
    def operations(flow_length):
        params, z0 = shapes(flow_length, 640), jax.ShapeDtypeStruct((2, 640), np.float32)
        gradient = jax.grad(lambda *args: sum(map(jnp.sum, planar_flow(*args))))
        return jax.jit(gradient).lower(params, z0).as_text().count(" = ")

    assert operations(10_001) == operations(23)  # neither is a multiple of its blocks


def test_memory_on_the_plane_grows_with_the_layers_and_not_with_their_square():
    def temporary(flow_length):
        params, z0 = shapes(flow_length, 2), jax.ShapeDtypeStruct((16, 2), np.float32)
        gradient = jax.grad(lambda *args: sum(map(jnp.sum, planar_flow(*args))))
        return jax.jit(gradient).lower(params, z0).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 5 * temporary(2048)


# --- init_planar


def test_init_draws_u_and_w_independently_at_the_stated_scales():
    params = init_planar(jax.random.key(0), flow_length=100, dim=50, w_scale=2.0, u_scale=0.5)
    assert params.u.shape == params.w.shape == (100, 50)
    u, w = (np.asarray(leaf, np.float64).ravel() for leaf in (params.u, params.w))
    # 5,000 draws: five standard errors are 5 percent of the deviation and 0.07 of the correlation.
    assert np.std(u) * math.sqrt(50) == pytest.approx(0.5, rel=0.05)
    assert np.std(w) * math.sqrt(50) == pytest.approx(2.0, rel=0.05)
    assert abs(np.mean(w)) * math.sqrt(50) < 0.15
    assert abs(np.corrcoef(u, w)[0, 1]) < 0.07
    np.testing.assert_array_equal(params.b, np.zeros(100))


def test_init_is_a_function_of_its_key():
    first, again, other = (init_planar(jax.random.key(seed), 3, 4) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.u, again.u)
    np.testing.assert_array_equal(first.w, again.w)
    assert np.all(first.u != other.u)
    assert np.all(first.w != other.w)


@pytest.mark.parametrize("dim", [2, 784])
def test_a_drawn_flow_is_near_the_identity_and_with_u_scale_0_exactly_there(dim):
    @jax.jit
    def drawn(u_scale):
        z0 = jax.random.normal(jax.random.key(1), (dim,))
        return z0, *planar_flow(init_planar(jax.random.key(0), 8, dim, u_scale=u_scale), z0)

    z0, zK, log_det = drawn(0.1)
    assert 0.0 < np.linalg.norm(zK - z0) < 0.1 * 8
    assert 0.0 < abs(log_det) < 0.1 * 8
    z0, zK, log_det = drawn(0.0)
    np.testing.assert_array_equal(zK, z0)
    assert log_det == 0.0


def test_init_takes_a_dtype_and_else_jaxs_default():
    def dtypes(**kwargs):
        drawn = jax.eval_shape(lambda: init_planar(jax.random.key(0), 2, 3, **kwargs))
        return {leaf.dtype.name for leaf in drawn}

    assert dtypes() == {"float32"}
    with precision(np.float64):
        assert dtypes() == {"float64"}
        assert dtypes(dtype=jnp.float32) == {"float32"}


@pytest.mark.parametrize("flow_length", [-1, 2.0, True, "3", None])
def test_init_refuses_a_flow_length_that_is_no_count(flow_length):
    with pytest.raises(ValueError, match=r"flow_length must be a whole number >= 0; got"):
        init_planar(jax.random.key(0), flow_length=flow_length, dim=2)


@pytest.mark.parametrize("dim", [0, -2, 2.5, False])
def test_init_refuses_a_dimension_that_is_no_positive_count(dim):
    with pytest.raises(ValueError, match=r"dim must be a whole number >= 1; got"):
        init_planar(jax.random.key(0), flow_length=2, dim=dim)


def test_init_takes_numpys_whole_numbers():
    assert init_planar(jax.random.key(0), np.int64(2), np.int32(3)).u.shape == (2, 3)


@pytest.mark.parametrize("name", ["w_scale", "u_scale"])
@pytest.mark.parametrize("scale", [-0.1, math.nan, math.inf])
def test_init_refuses_a_scale_that_is_none(name, scale):
    with pytest.raises(ValueError, match=rf"{name} must be a number >= 0; got"):
        init_planar(jax.random.key(0), 2, 3, **{name: scale})


def test_init_refuses_a_dtype_that_is_not_floating():
    with pytest.raises(ValueError, match="dtype must be a floating dtype; got int32"):
        init_planar(jax.random.key(0), 2, 3, dtype=jnp.int32)
