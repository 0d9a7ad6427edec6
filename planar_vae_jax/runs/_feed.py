"""Gives the steps of an epoch their examples: all of them on the devices, or one chunk at a time from the host.

The batch of a step is ``data[order[step]]`` either way. A chunk holds the examples of some steps in the order in which
they are used, so the batches are the same, and so are the bits of everything computed from them.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np

from planar_vae_jax.data.streamed import Streamed

BeginEpoch = Callable[[int], tuple[Any, jax.Array]]  # epoch -> its order [steps, batch_size], the key of its steps


class Feed(Protocol):
    """The examples of a training, one epoch after the other."""

    batch: Any  # shapes and dtypes of one step's batch; None without examples

    def begin(self, epoch: int) -> jax.Array:
        """Prepares an epoch and returns the key of its steps."""

    def end(self, position: int, stop: int) -> int:
        """Returns the step before which a call that starts at ``position`` must end, at most ``stop``."""

    def at(self, position: int) -> tuple[Any, Any]:
        """Returns data and order for a call that starts at ``position``."""

    def close(self) -> None:
        """Releases the examples."""


def feed(data: Any, begin: BeginEpoch, batch_size: int | None, steps_per_epoch: int, steps: int) -> Feed:
    """Returns the feed for arrays on the devices, for no examples (None), or for :class:`Streamed` examples."""
    if not isinstance(data, Streamed):
        return _Whole(data, begin, batch_size)
    assert batch_size is not None
    return _InChunks(data, begin, batch_size, steps_per_epoch, steps)


def _shapes(leaf: Any, batch_size: int | None, skip: int) -> jax.ShapeDtypeStruct:
    assert batch_size is not None
    return jax.ShapeDtypeStruct((batch_size, *leaf.shape[skip:]), leaf.dtype)


class _Whole:
    def __init__(self, data: Any, begin: BeginEpoch, batch_size: int | None):
        self._data, self._begin, self._order = data, begin, None
        self.batch = jax.tree.map(lambda leaf: _shapes(leaf, batch_size, 1), data)

    def begin(self, epoch: int) -> jax.Array:
        self._order, key = self._begin(epoch)
        return key

    def end(self, position: int, stop: int) -> int:
        return stop

    def at(self, position: int) -> tuple[Any, Any]:
        return self._data, self._order

    def close(self) -> None:
        self._data = None


class _InChunks:
    """Chunks from the host: the devices hold the current one and the next, which a thread gathers and sends."""

    def __init__(self, examples: Streamed, begin: BeginEpoch, batch_size: int, steps_per_epoch: int, steps: int):
        self._examples, self._begin, self._steps, self._length = examples, begin, steps, steps_per_epoch
        self._of_chunk = examples.steps_of_chunk(steps_per_epoch, batch_size)
        self.batch = jax.tree.map(lambda leaf: _shapes(leaf, batch_size, 0), examples.like)
        first = np.arange(steps_per_epoch, dtype=np.int32)[:, None] % self._of_chunk * batch_size
        self._rows = examples.put(first + np.arange(batch_size, dtype=np.int32))  # the order within any chunk
        self._size = self._of_chunk * batch_size
        self._thread = ThreadPoolExecutor(1)
        self._orders: dict[int, tuple[Future[np.ndarray], jax.Array]] = {}  # for this epoch and the next
        self._epoch = 0
        self._here: tuple[int, int] | None = None  # epoch and number of the chunk that is held
        self._chunk: Any = None
        self._ahead: tuple[tuple[int, int], Future[Any]] | None = None  # the next chunk

    def begin(self, epoch: int) -> jax.Array:
        self._epoch = epoch
        self._orders = {epoch: self._order_of(epoch)}
        return self._orders[epoch][1]

    def end(self, position: int, stop: int) -> int:
        return min(stop, (position // self._of_chunk + 1) * self._of_chunk)

    def at(self, position: int) -> tuple[Any, Any]:
        where = (self._epoch, position // self._of_chunk)
        if self._here != where:
            self._chunk = self._here = None  # frees its memory before another chunk is loaded
            ahead, coming = self._ahead or (None, None)
            self._ahead = None
            self._chunk = (coming if coming and ahead == where else self._load(where)).result()
            self._here = where
            following = self._after(*where)
            self._ahead = following and (following, self._load(following))
        return self._chunk, self._rows

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._chunk = self._here = self._ahead = None

    def _after(self, epoch: int, number: int) -> tuple[int, int] | None:
        begun = epoch * self._length
        if (number + 1) * self._of_chunk < min(self._length, self._steps - begun):
            return epoch, number + 1
        return (epoch + 1, 0) if begun + self._length < self._steps else None

    def _order_of(self, epoch: int) -> tuple["Future[np.ndarray]", jax.Array]:
        """The order of an epoch and the key of its steps.

        The main thread computes it, because all processes must make the same calls in the same order; the feed's thread
        copies it to the host.
        """
        if epoch not in self._orders:
            order, key = self._begin(epoch)
            self._orders[epoch] = self._thread.submit(np.asarray, order), key
        return self._orders[epoch]

    def _load(self, where: tuple[int, int]) -> "Future[Any]":
        epoch, number = where
        return self._thread.submit(self._send, self._order_of(epoch)[0], number)

    def _send(self, order: "Future[np.ndarray]", number: int) -> Any:
        rows = order.result()[number * self._of_chunk : (number + 1) * self._of_chunk]
        # Every chunk has the same size, so one program serves all: the last one repeats rows to fill up.
        return jax.block_until_ready(self._examples.take(np.resize(rows, self._size)))
