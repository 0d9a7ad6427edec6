"""Examples that do not fit on the devices: fetched and sent in chunks, each while the one before it is computed on."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Examples by their numbers; two chunks of them are on a device at once."""

    fetch: Callable[[np.ndarray], Any]  # numbers [n] -> a pytree of arrays [n, ...]; called in a thread of its own
    like: Any  # that pytree, as shapes and types of one example, without n
    size: int  # how many examples there are
    room: int  # bytes of two chunks on a device
    put: Callable[[Any], Any] = lambda tree: tree  # a chunk to where it is computed on

    def __len__(self) -> int:
        return self.size

    def take(self, rows: np.ndarray) -> Any:
        """Some of them, by their numbers."""
        return self.put(self.fetch(rows))

    def steps_of_chunk(self, steps: int, batch_size: int) -> int:
        """How many of ``steps`` batches make a chunk: as many as there is room for, at least one, spread evenly."""
        each = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.like))
        most = max(1, self.room // 2 // (batch_size * each))
        chunks = -(-steps // most)
        return -(-steps // chunks)


def map_ahead(function: Callable[[Item], Result], load: Callable[[int], Item], numbers: Iterable[int]) -> list[Result]:
    """``function(load(number))`` of each number, while what comes next is loaded in a thread: two are there at once.

    ``function`` must be done with what it is given when it returns.
    """
    results: list[Result] = []
    rest = iter(numbers)
    with ThreadPoolExecutor(1) as thread:
        ahead = next(([thread.submit(load, number)] for number in rest), [])
        while ahead:
            item = [ahead.pop().result()]  # handed on, not kept: it makes room for the one after the next
            ahead = next(([thread.submit(load, number)] for number in rest), [])
            results.append(function(item.pop()))
    return results
