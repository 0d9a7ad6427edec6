"""Batches, or seeds, split over devices, by the mesh under which a computation is traced.

::

    mesh = data_mesh(jax.devices())
    model, images = replicate((model, images), mesh)
    with jax.set_mesh(mesh):                       # jax.jit compiles one program for all its devices
        terms = evaluation.free_energy_terms(model, images)

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

from planar_vae_jax.keys import is_key

AXIS = "data"


def data_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """Returns a mesh with one axis of these devices, which may belong to several processes."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def size() -> int:
    """Returns the number of devices over which the current mesh splits batches; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if AXIS not in mesh.axis_names or mesh.axis_types[mesh.axis_names.index(AXIS)] != AxisType.Auto:
        return 1
    return int(mesh.shape[AXIS])


def split(array: jax.Array, axis: int = 0) -> jax.Array:
    """Returns the array with ``axis``, that of the batch, split over the devices."""
    return _constrain(array, PartitionSpec(*[None] * axis, AXIS))


def everywhere(tree: Any) -> Any:
    """Returns the arrays of a tree, whole on every device."""
    return jax.tree.map(lambda leaf: _constrain(leaf, PartitionSpec()), tree)


def in_shares(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``function``, called on each device with its share of the first argument and all of the others.

    The first argument is split along its leading axis; ``function`` must return arrays with that axis. No mesh is
    active inside ``function``, so a device computes what it would compute alone.
    """
    if size() == 1:
        return function
    share, whole = PartitionSpec(AXIS), PartitionSpec()

    def shared(first: Any, *rest: Any) -> Any:
        return jax.shard_map(function, in_specs=(share, *[whole] * len(rest)), out_specs=share)(first, *rest)

    return shared


def varying_like(tree: Any, like: Any) -> Any:
    """Returns the arrays of ``tree``, marked as varying over the mesh axes over which arrays of ``like`` vary.

    Outside of ``jax.shard_map`` nothing changes. A loop needs that if its first carry is a constant and later carries
    depend on the data.
    """
    if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return tree
    leaves = [jax.random.key_data(leaf) if is_key(leaf) else jnp.asarray(leaf) for leaf in jax.tree.leaves(like)]
    firsts = [jax.lax.stop_gradient(leaf).ravel()[0].astype(jnp.float32) for leaf in leaves if leaf.size]
    mark = functools.reduce(jnp.add, firsts)

    def marked(leaf: Any) -> jax.Array:
        if is_key(leaf):
            return jax.random.wrap_key_data(marked(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        other = jnp.broadcast_to(mark.astype(jnp.result_type(leaf)), jnp.shape(leaf))
        return jax.lax.select_n(np.True_, other, jnp.asarray(leaf))  # always selects the leaf

    return jax.tree.map(marked, tree)


def _constrain(array: jax.Array, spec: PartitionSpec) -> jax.Array:
    return array if size() == 1 else jax.lax.with_sharding_constraint(array, spec)


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Puts arrays of the host or of one device whole on every device of the mesh; without a mesh, makes JAX arrays.

    Every process passes the same values; nothing is sent between processes.
    """
    return jax.tree.map(lambda leaf: _put(leaf, mesh), tree)


def _put(leaf: Any, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf)
    sharding = NamedSharding(mesh, PartitionSpec())
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    if is_key(leaf):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), mesh), impl=jax.random.key_impl(leaf))
    array = np.asarray(leaf, jax.dtypes.canonicalize_dtype(jnp.result_type(leaf)))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def stack(trees: Sequence[Any], mesh: Mesh | None) -> Any:
    """Stacks trees of the same shapes along a new leading axis, which is split over the devices of the mesh.

    The arrays pass through the host, because a program that stacks so many arrays takes long to compile.
    """
    return jax.tree.map(lambda *leaves: _stack(leaves, mesh), *trees)


def _stack(leaves: Sequence[Any], mesh: Mesh | None) -> jax.Array:
    if is_key(leaves[0]):
        words = _stack([jax.random.key_data(leaf) for leaf in leaves], mesh)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaves[0]))
    array = np.stack([np.asarray(leaf) for leaf in leaves])
    if mesh is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, PartitionSpec(AXIS)), lambda part: array[part])


def local(tree: Any) -> Any:
    """Returns arrays that are whole on every device as arrays of this process's first device."""

    def one(leaf: Any) -> Any:
        several = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
        return leaf.addressable_data(0) if several else leaf

    return jax.tree.map(one, tree)
