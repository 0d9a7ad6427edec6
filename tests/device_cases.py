"""What has to be right on a mesh of eight devices; run by test_contexts.py in a process of its own, a line a case.

A line is a name and the largest difference to one device, over the largest value.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from planar_vae_jax import Planar, inverse_planar_flow, planar_flow


def mesh(kind):
    return jax.make_mesh((8,), ("b",), axis_types=(kind,))


def problem(flow_length, dim, amortized=False):
    rng = np.random.default_rng(0)
    lead = (16,) if amortized else ()
    shapes = ((*lead, flow_length, dim), (*lead, flow_length, dim), (*lead, flow_length))
    params = Planar(*(0.4 * rng.normal(size=shape).astype(np.float32) for shape in shapes))
    return params, rng.normal(size=(16, dim)).astype(np.float32)


def difference(actual, expected):
    pairs = zip(*map(jax.tree.leaves, jax.device_get((actual, expected))), strict=True)
    return max(float(np.max(np.abs(a - e)) / np.max(np.abs(e))) for a, e in pairs)


def loss(flow):
    def function(params, z0):
        z, log_det = flow(params, z0)
        return jnp.mean(jnp.sum(z**2, -1) - log_det)

    return function


def values_and_gradients(flow, params, z0):
    return flow(params, z0), jax.grad(loss(flow), argnums=(0, 1))(params, z0)


def in_a_shard_map(flow, params, z0):
    rows = P("b") if params.u.ndim > 2 else P()
    specs = {"mesh": mesh(AxisType.Auto), "in_specs": (rows, P("b"))}

    def mean(params, z0):
        def local(*args):
            return jax.lax.pmean(loss(flow)(*args), "b")

        return jax.shard_map(local, out_specs=P(), **specs)(params, z0)

    sharded = jax.shard_map(flow, out_specs=P("b"), **specs)
    return jax.jit(lambda *args: (sharded(*args), jax.grad(mean, argnums=(0, 1))(*args)))(params, z0)


def on_a_mesh(kind):
    def run(flow, params, z0):
        m = mesh(kind)
        rows = NamedSharding(m, P("b"))
        params = jax.device_put(params, rows if params.u.ndim > 2 else NamedSharding(m, P()))
        return jax.jit(lambda *args: values_and_gradients(flow, *args))(params, jax.device_put(z0, rows))

    return run


CONTEXTS = {
    "shard_map": in_a_shard_map,
    "Explicit mesh": on_a_mesh(AxisType.Explicit),
    "Auto mesh": on_a_mesh(AxisType.Auto),
}
CASES = {  # flow, problem, contexts
    "gram": (planar_flow, problem(45, 6), ("shard_map", "Explicit mesh", "Auto mesh")),
    "narrow scan": (planar_flow, problem(3, 2), ("shard_map",)),
    "amortised": (planar_flow, problem(3, 6, amortized=True), ("shard_map", "Explicit mesh")),
    "inverse": (inverse_planar_flow, problem(3, 6), ("shard_map", "Explicit mesh")),
    "vmap": (jax.vmap(planar_flow, (None, 0)), problem(20, 6), ("Explicit mesh",)),
    "vmap of the inverse": (jax.vmap(inverse_planar_flow, (None, 0)), problem(3, 2), ("Explicit mesh",)),
}


def main():
    for name, (flow, (params, z0), contexts) in CASES.items():
        expected = jax.jit(lambda *args, flow=flow: values_and_gradients(flow, *args))(params, z0)
        for context in contexts:
            try:
                error = f"{difference(CONTEXTS[context](flow, params, z0), expected):.2e}"
            except Exception as problem:
                error = f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
            print(f"{name}, {context}: {error}", flush=True)


if __name__ == "__main__":
    main()
