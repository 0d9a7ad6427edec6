"""Examples on the host, in chunks that are loaded ahead of their use."""

import threading

import jax
import numpy as np
import pytest

from planar_vae_jax.data.streamed import Streamed, map_ahead

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 5, 4), np.uint8)


def streamed(**changed):
    """Images ``[23, 5, 4]`` and their numbers: 24 bytes an example."""
    like = {"x": jax.ShapeDtypeStruct((5, 4), np.uint8), "number": jax.ShapeDtypeStruct((), np.int32)}
    return Streamed(lambda rows: {"x": IMAGES[rows], "number": rows.astype(np.int32)}, like, 23, **changed)


def test_rows_are_fetched_in_the_order_that_is_asked_for_and_sent():
    sent = []
    examples = streamed(put=lambda chunk: sent.append(chunk) or chunk)
    found = examples.take(np.array([7, 0, 7]))
    np.testing.assert_array_equal(found["x"], IMAGES[[7, 0, 7]])
    np.testing.assert_array_equal(found["number"], [7, 0, 7])
    assert sent == [found]
    assert len(examples) == 23


@pytest.mark.parametrize(
    ("chunk_bytes", "steps"),
    [
        (1, 1),  # less than a batch: one at a time
        (4 * 24, 1),
        (2 * 4 * 24, 2),
        (3 * 4 * 24, 3),  # 5 batches are 3 and 2
        (4 * 4 * 24, 3),  # evenly: 3 and 2, not 4 and 1
        (5 * 4 * 24, 5),
        (10**9, 5),
    ],
)
def test_a_chunk_holds_as_many_batches_as_fit_spread_evenly(chunk_bytes, steps):
    assert streamed(chunk_bytes=chunk_bytes).steps_of_chunk(5, 4) == steps


def test_map_ahead_loads_one_item_ahead_in_a_thread():
    loaded, seen, threads = [], [], set()

    def load(number):
        threads.add(threading.current_thread())
        loaded.append(number)
        return number

    def function(number):
        seen.append(len(loaded))
        return -number

    assert map_ahead(function, load, range(5)) == [0, -1, -2, -3, -4]
    assert loaded == list(range(5))
    assert all(count <= number + 2 for number, count in enumerate(seen))
    assert threading.current_thread() not in threads
    assert len(threads) == 1
    assert map_ahead(function, load, []) == []


def test_an_error_of_a_load_is_raised_by_map_ahead():
    def load(number):
        raise OSError(f"the disk is gone at {number}")

    with pytest.raises(OSError, match="the disk is gone at 0"):
        map_ahead(lambda item: item, load, range(3))
