"""Examples that stay on the host: they are gathered and sent in chunks, each while the one before it is computed on."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK_BYTES = 2**26  # of a chunk; two of them are on a device at once


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Examples by their numbers."""

    fetch: Callable[[np.ndarray], Any]  # numbers [n] -> a pytree of arrays [n, ...]; called in a thread
    like: Any  # that pytree, as shapes and dtypes of one example, without n
    size: int  # how many examples there are
    chunk_bytes: int = CHUNK_BYTES
    put: Callable[[Any], Any] = lambda tree: tree  # sends a chunk to where it is computed on

    def __len__(self) -> int:
        return self.size

    def take(self, rows: np.ndarray) -> Any:
        """Some of the examples, by their numbers."""
        return self.put(self.fetch(rows))

    def steps_of_chunk(self, steps: int, batch_size: int) -> int:
        """How many of ``steps`` batches make a chunk: as many as fit, at least one, spread evenly."""
        each = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.like))
        most = max(1, self.chunk_bytes // (batch_size * each))
        chunks = -(-steps // most)
        return -(-steps // chunks)


def map_ahead(function: Callable[[Item], Result], load: Callable[[int], Item], numbers: Iterable[int]) -> list[Result]:
    """``function(load(number))`` for each number, while a thread loads the next item: two items exist at once.

    ``function`` must be done with its argument when it returns.
    """
    results: list[Result] = []
    rest = iter(numbers)
    with ThreadPoolExecutor(1) as thread:
        ahead = next(([thread.submit(load, number)] for number in rest), [])
        while ahead:
            item = [ahead.pop().result()]  # handed on, not kept, to make room for the one after the next
            ahead = next(([thread.submit(load, number)] for number in rest), [])
            results.append(function(item.pop()))
    return results
