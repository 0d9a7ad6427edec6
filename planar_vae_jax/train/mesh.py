"""Batches, or seeds, split over devices: what a computation needs to know of the mesh that it is traced under.

    mesh = data_mesh(jax.devices())
    params, images = replicate((params, images), mesh)
    with jax.set_mesh(mesh):                       # jax.jit compiles one program for all its devices
        terms = evaluation.free_energy_terms(vae, params, images)

A mesh has one axis, ``data``: batches are split along it, parameters and data are whole on every device. Without a
mesh, or under one with other axes, every function here leaves its arrays alone, so a program for one device does not
depend on this module.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def data_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """The devices in one row, of any number of processes."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def size() -> int:
    """How many devices batches are split over here; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if AXIS not in mesh.axis_names or mesh.axis_types[mesh.axis_names.index(AXIS)] != AxisType.Auto:
        return 1
    return int(mesh.shape[AXIS])


def split(array: jax.Array, axis: int = 0) -> jax.Array:
    """The array with ``axis``, a batch's, split over the devices."""
    return _constrain(array, PartitionSpec(*[None] * axis, AXIS))


def everywhere(tree: Any) -> Any:
    """The arrays of a tree, whole on every device."""
    return jax.tree.map(lambda leaf: _constrain(leaf, PartitionSpec()), tree)


def in_shares(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, called on each device with its share of the first argument's leading axis and all of the others.

    Inside it there is no mesh, so a device computes what it would compute alone. The function returns arrays with that
    leading axis.
    """
    if size() == 1:
        return function
    share, whole = PartitionSpec(AXIS), PartitionSpec()

    def shared(first: Any, *rest: Any) -> Any:
        return jax.shard_map(function, in_specs=(share, *[whole] * len(rest)), out_specs=share)(first, *rest)

    return shared


def varying_like(tree: Any, like: Any) -> Any:
    """The same arrays; inside ``jax.shard_map`` they vary over every mesh axis over which an array of ``like`` varies.

    The first carry of a loop needs that where it is a constant and later carries depend on the data.
    """
    if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return tree
    leaves = [jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf) for leaf in jax.tree.leaves(like)]
    firsts = [jax.lax.stop_gradient(leaf).ravel()[0].astype(jnp.float32) for leaf in leaves if leaf.size]
    mark = functools.reduce(jnp.add, firsts)

    def marked(leaf: Any) -> jax.Array:
        if _is_key(leaf):
            return jax.random.wrap_key_data(marked(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        other = jnp.broadcast_to(mark.astype(jnp.result_type(leaf)), jnp.shape(leaf))
        return jax.lax.select_n(np.True_, other, jnp.asarray(leaf))  # always the leaf

    return jax.tree.map(marked, tree)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _constrain(array: jax.Array, spec: PartitionSpec) -> jax.Array:
    return array if size() == 1 else jax.lax.with_sharding_constraint(array, spec)


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays of the host or of one device, whole on every device of the mesh; without a mesh, as JAX arrays.

    Every process passes the same values; nothing is sent between processes.
    """
    return jax.tree.map(lambda leaf: _put(leaf, mesh), tree)


def _put(leaf: Any, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf)
    sharding = NamedSharding(mesh, PartitionSpec())
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    if _is_key(leaf):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), mesh), impl=jax.random.key_impl(leaf))
    array = np.asarray(leaf, jax.dtypes.canonicalize_dtype(jnp.result_type(leaf)))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def stack(trees: Sequence[Any], mesh: Mesh | None) -> Any:
    """Trees of the same shapes as one tree with a leading axis, which is split over the devices of the mesh.

    It goes by way of the host: a program that stacks so many arrays takes long to compile.
    """
    return jax.tree.map(lambda *leaves: _stack(leaves, mesh), *trees)


def _stack(leaves: Sequence[Any], mesh: Mesh | None) -> jax.Array:
    if _is_key(leaves[0]):
        words = _stack([jax.random.key_data(leaf) for leaf in leaves], mesh)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaves[0]))
    array = np.stack([np.asarray(leaf) for leaf in leaves])
    if mesh is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, PartitionSpec(AXIS)), lambda part: array[part])


def local(tree: Any) -> Any:
    """Arrays that are whole on every device, as arrays of this process's first device."""

    def one(leaf: Any) -> Any:
        several = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
        return leaf.addressable_data(0) if several else leaf

    return jax.tree.map(one, tree)
