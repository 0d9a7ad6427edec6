"""What the steps of an epoch are given: examples that are whole on the devices, or a chunk of them at a time.

Either way a step's batch is ``data[order[step]]`` in what is compiled. Of a chunk, ``data`` holds the examples of some
steps in the order in which they are taken, so the batches are the same, and so are the bits of all that follows.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from planar_vae_jax.data.streamed import Streamed
from planar_vae_jax.runs.epochs import Epochs

Begin = Callable[[int], tuple[Any, jax.Array]]  # an epoch -> its order [steps, batch_size] and the key of its steps


class Whole:
    """Examples that the devices hold, or none.

    Attributes:
        batch: of one step, as shapes and types.
    """

    def __init__(self, data: Any, begin: Begin, batch_size: int | None):
        self._data, self._begin, self._order = data, begin, None
        self.batch = jax.tree.map(lambda leaf: _batch(leaf.shape[1:], leaf.dtype, batch_size), data)

    def begin(self, epoch: int) -> jax.Array:
        """Turns to an epoch; returns the key of its steps."""
        self._order, key = self._begin(epoch)
        return key

    def end(self, position: int, stop: int) -> int:
        """How far a call from ``position`` on can go, at most to ``stop``."""
        return stop

    def at(self, position: int) -> tuple[Any, Any]:
        """The data and the order for a call that starts at ``position``."""
        return self._data, self._order

    def close(self) -> None:
        """Lets the examples go."""
        self._data = None


class InChunks:
    """Examples of which the devices hold a chunk, and the next one, which is fetched and sent meanwhile.

    The attributes and methods of :class:`Whole`.
    """

    def __init__(self, examples: Streamed, begin: Begin, batch_size: int, epochs: Epochs):
        self._examples, self._begin, self._epochs = examples, begin, epochs
        self._steps = examples.steps_of_chunk(epochs.steps_per_epoch, batch_size)
        self.batch = jax.tree.map(lambda leaf: _batch(leaf.shape, leaf.dtype, batch_size), examples.like)
        first = np.arange(epochs.steps_per_epoch, dtype=np.int32)[:, None] % self._steps * batch_size
        self._rows = examples.put(first + np.arange(batch_size, dtype=np.int32))  # of any chunk
        self._size = self._steps * batch_size
        self._thread = ThreadPoolExecutor(1)
        self._begun: dict[int, tuple[Future[np.ndarray], jax.Array]] = {}  # the epoch under way, and the next
        self._here: tuple[int, int] | None = None  # epoch and number of the chunk
        self._chunk: Any = None
        self._ahead: tuple[tuple[int, int], Future[Any]] | None = None  # the next

    def begin(self, epoch: int) -> jax.Array:
        """Turns to an epoch; returns the key of its steps."""
        self._epoch = epoch
        self._begun = {epoch: self._order_of(epoch)}
        return self._begun[epoch][1]

    def end(self, position: int, stop: int) -> int:
        """How far a call from ``position`` on can go, at most to ``stop``: no further than its chunk."""
        return min(stop, (position // self._steps + 1) * self._steps)

    def at(self, position: int) -> tuple[Any, Any]:
        """The chunk that has the step ``position``, and the rows of its steps."""
        where = (self._epoch, position // self._steps)
        if self._here != where:
            self._chunk = self._here = None  # it makes room for the one after the next
            there, coming = self._ahead or (None, None)
            self._ahead = None
            self._chunk = (coming if coming and there == where else self._load(where)).result()
            self._here = where
            following = self._after(*where)
            self._ahead = following and (following, self._load(following))
        return self._chunk, self._rows

    def close(self) -> None:
        """Lets the examples go."""
        self._thread.shutdown(cancel_futures=True)
        self._chunk = self._here = self._ahead = None

    def _after(self, epoch: int, number: int) -> tuple[int, int] | None:
        if (number + 1) * self._steps < self._epochs.length(epoch):
            return epoch, number + 1
        return (epoch + 1, 0) if epoch + 1 < self._epochs.number else None

    def _order_of(self, epoch: int) -> tuple["Future[np.ndarray]", jax.Array]:
        """Of an epoch: begun here, as all processes must make the same calls in one order; copied in the thread."""
        if epoch not in self._begun:
            order, key = self._begin(epoch)
            self._begun[epoch] = self._thread.submit(np.asarray, order), key
        return self._begun[epoch]

    def _load(self, where: tuple[int, int]) -> "Future[Any]":
        epoch, number = where
        return self._thread.submit(self._send, self._order_of(epoch)[0], number)

    def _send(self, order: "Future[np.ndarray]", number: int) -> Any:
        rows = order.result()[number * self._steps : (number + 1) * self._steps]
        return jax.block_until_ready(self._examples.take(np.resize(rows, self._size)))  # the last one is filled up


def feed(data: Any, begin: Begin, batch_size: int | None, epochs: Epochs) -> Whole | InChunks:
    """For ``data`` that is on the devices (or None), or streamed to them."""
    if not isinstance(data, Streamed):
        return Whole(data, begin, batch_size)
    assert batch_size is not None
    return InChunks(data, begin, batch_size, epochs)


def size_of(data: Any) -> int | None:
    """How many examples there are, on the devices or streamed; ``None``: the steps need none."""
    return None if data is None else len(jax.tree.leaves(data)[0])


def _batch(shape: tuple[int, ...], dtype: Any, batch_size: int | None) -> jax.ShapeDtypeStruct:
    assert batch_size is not None
    return jax.ShapeDtypeStruct((batch_size, *shape), dtype)
