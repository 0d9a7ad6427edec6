"""The leaves of a pytree as one vector of bytes, and back as they were."""

from typing import Any

import jax
import numpy as np

# Python's own numbers, by the names of theirs that are no NumPy dtypes
_NUMBERS: dict[str, tuple[type, type]] = {
    "Python bool": (bool, np.bool_),
    "Python int": (int, np.int64),
    "Python float": (float, np.float64),
    "Python complex": (complex, np.complex128),
}
_KEYS = {"key<fry>": ("threefry2x32", 2), "key<rbg>": ("rbg", 4), "key<urbg>": ("unsafe_rbg", 4)}  # words of a key

Entry = list[Any]  # [name, dtype, shape] of a leaf, as JSON gives them back


def pack(tree: Any) -> tuple[np.ndarray, list[Entry]]:
    """All leaves one after the other, as bytes (at least one), and the entry of each.

    Raises:
        TypeError: a leaf could not be restored, as a string.
    """
    entries, parts = [], [np.zeros(0, np.uint8)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        entry = _entry(jax.tree_util.keystr(path), leaf)
        entries.append(entry)
        parts.append(_plain(leaf, entry).reshape(-1).view(np.uint8))
    vector = np.concatenate(parts)
    return (vector if vector.size else np.zeros(1, np.uint8)), entries


def named(vector: np.ndarray, entries: list[Entry]) -> dict[str, Any]:
    """The leaves of a vector by name: NumPy arrays, typed keys, Python numbers."""
    leaves, position = {}, 0
    for name, dtype, shape in entries:
        plain_shape, plain_dtype = _layout(dtype, shape)
        stop = position + int(np.prod(plain_shape, dtype=np.int64)) * plain_dtype.itemsize
        array = vector[position:stop].copy().view(plain_dtype).reshape(plain_shape)
        leaves[name], position = _restored(array, dtype), stop
    return leaves


def unpack(leaves: dict[str, Any], like: Any) -> Any:
    """A tree like ``like`` of the leaves by name: JAX arrays where it has those or shapes, else NumPy's and numbers.

    Raises:
        ValueError: the leaves are not those of ``like``; names the first that differs.
    """
    wanted = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(like)}
    for name in (*wanted, *leaves):
        theirs, ours = (_shown(name, some) for some in (leaves, wanted))
        if theirs != ours:
            raise ValueError(f"{name} is {theirs} there, {ours} here")
    return jax.tree.unflatten(jax.tree.structure(like), [_like(leaves[name], leaf) for name, leaf in wanted.items()])


def _like(found: Any, leaf: Any) -> Any:
    """What was found, as the kind of array that ``leaf`` is."""
    if isinstance(leaf, np.generic):
        return found[()]
    if isinstance(leaf, np.ndarray) or not isinstance(found, np.ndarray):
        return found
    return _on_device(found) if jax.dtypes.canonicalize_dtype(found.dtype) == found.dtype else found


def _on_device(found: np.ndarray) -> jax.Array:
    """As an array of JAX's own; ``jnp.asarray`` would compile a program for each shape."""
    return jax.device_put(found, may_alias=False)


def fill_params(leaves: dict[str, Any], like: Any) -> Any:
    """The parameters that a run's figures are of, as a tree like ``like``; see :func:`fill`."""
    averaged = any(name.startswith("['average']") for name in leaves)
    return fill(leaves, like, "['average']" if averaged else "['state'].params")


def fill(leaves: dict[str, Any], like: Any, prefix: str) -> Any:
    """The shapes of ``like`` filled with the leaves whose names begin with ``prefix``, in the dtypes they have.

    Raises:
        ValueError: one is not there, or of another shape; names the first.
    """

    def take(path: Any, leaf: Any) -> jax.Array:
        name = prefix + jax.tree_util.keystr(path)
        if name not in leaves or np.shape(leaves[name]) != np.shape(leaf):
            came = list(np.shape(leaves[name])) if name in leaves else "nothing"
            raise ValueError(f"wanted {name} {list(np.shape(leaf))}; got {came}")
        return _on_device(leaves[name])

    return jax.tree_util.tree_map_with_path(take, like)


def plain(tree: Any) -> dict[str, np.ndarray]:
    """The leaves by name as NumPy arrays, for people: ``state.params['w']``."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in pairs}


def _entry(name: str, leaf: Any) -> Entry:
    if not hasattr(leaf, "dtype"):
        kind = f"Python {type(leaf).__name__}"
        if kind not in _NUMBERS:
            raise TypeError(f"a checkpoint holds arrays, keys and numbers; got {type(leaf).__name__} as {name}")
        return [name, kind, []]
    dtype = str(leaf.dtype)
    if not (dtype in _KEYS or (isinstance(leaf.dtype, np.dtype) and _is_restorable(leaf.dtype))):
        raise TypeError(f"a checkpoint holds arrays of numbers, and keys of JAX's own kinds; got {dtype} as {name}")
    return [name, dtype, list(leaf.shape)]


def _is_restorable(dtype: np.dtype) -> bool:
    try:
        return not dtype.hasobject and np.dtype(str(dtype)) == dtype
    except TypeError:
        return False


def _plain(leaf: Any, entry: Entry) -> np.ndarray:
    """A leaf as a NumPy array, a number as one of no axes."""
    name, dtype, _ = entry
    if dtype in _KEYS:
        return np.ascontiguousarray(jax.random.key_data(leaf))
    try:
        return np.ascontiguousarray(leaf, _NUMBERS[dtype][1] if dtype in _NUMBERS else None)
    except OverflowError:
        raise TypeError(f"a checkpoint holds whole numbers of at most 64 bits; got {leaf} as {name}") from None


def _layout(dtype: str, shape: list[int]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of a leaf's plain array."""
    if dtype in _KEYS:
        return (*shape, _KEYS[dtype][1]), np.dtype(np.uint32)
    return tuple(shape), np.dtype(_NUMBERS[dtype][1] if dtype in _NUMBERS else dtype)


def _restored(array: np.ndarray, dtype: str) -> Any:
    if dtype in _KEYS:
        return jax.random.wrap_key_data(_on_device(array), impl=_KEYS[dtype][0])
    return _NUMBERS[dtype][0](array[()]) if dtype in _NUMBERS else array


def _shown(name: str, leaves: dict[str, Any]) -> str:
    """``float32[2, 3]``, or that it is missing."""
    if name not in leaves:
        return "missing"
    _, dtype, shape = _entry(name, leaves[name])
    return f"{dtype}{shape}"
