"""Batches split over devices: what a computation needs to know of the mesh that it is traced under.

    mesh = data_mesh(jax.devices())
    params, images = replicate((params, images), mesh)
    with jax.set_mesh(mesh):                       # jax.jit compiles one program for all its devices
        terms = evaluation.free_energy_terms(vae, params, images)

A mesh has one axis, ``data``: batches are split along it, parameters and data are whole on every device. Without a mesh
(or under one of another kind) every function here leaves its arrays alone, so what is compiled for one device knows
nothing of it.
"""

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

    Inside it there is no mesh, so what one device computes is what it would compute alone. It returns arrays with that
    axis.
    """
    if size() == 1:
        return function
    share, whole = PartitionSpec(AXIS), PartitionSpec()

    def shared(first: Any, *rest: Any) -> Any:
        # Unchecked: a loss may give a constant where a loop carries what varies from device to device.
        in_specs = (share, *[whole] * len(rest))
        return jax.shard_map(function, in_specs=in_specs, out_specs=share, check_vma=False)(first, *rest)

    return shared


def _constrain(array: jax.Array, spec: PartitionSpec) -> jax.Array:
    return array if size() == 1 else jax.lax.with_sharding_constraint(array, spec)


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays of the host or of one device, whole on every device of the mesh; without one, as arrays of JAX's.

    Every process gives the same; nothing is sent between them.
    """
    return jax.tree.map(lambda leaf: _put(leaf, mesh), tree)


def _put(leaf: Any, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf)
    sharding = NamedSharding(mesh, PartitionSpec())
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), mesh), impl=jax.random.key_impl(leaf))
    array = np.asarray(leaf, jax.dtypes.canonicalize_dtype(jnp.result_type(leaf)))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def stack(trees: Sequence[Any], mesh: Mesh | None) -> Any:
    """Trees of the same shapes as one with a leading axis, which is split over the devices of the mesh.

    By way of the host: to compile it takes long, as there are many arrays.
    """
    return jax.tree.map(lambda *leaves: _stack(leaves, mesh), *trees)


def _stack(leaves: Sequence[Any], mesh: Mesh | None) -> jax.Array:
    if jnp.issubdtype(leaves[0].dtype, jax.dtypes.prng_key):
        words = _stack([jax.random.key_data(leaf) for leaf in leaves], mesh)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaves[0]))
    array = np.stack([np.asarray(leaf) for leaf in leaves])
    if mesh is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, PartitionSpec(AXIS)), lambda part: array[part])


def local(tree: Any) -> Any:
    """Arrays that are whole on every device, as arrays of this process's first one."""

    def one(leaf: Any) -> Any:
        several = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
        return leaf.addressable_data(0) if several else leaf

    return jax.tree.map(one, tree)
