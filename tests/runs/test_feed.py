"""Examples that are sent to the devices in chunks: the bits of a run whose examples are whole on the devices."""

import gc

import jax
import numpy as np
import pytest
import toy
from running import result, start, stop

from planar_vae_jax.data.streamed import Streamed
from planar_vae_jax.runs import _feed as feed
from planar_vae_jax.runs._files import RunError
from planar_vae_jax.train import loop

# In bytes; a batch has 80.
CHUNKS = {"a step": 1, "two steps": 2 * 80, "two where three fit": 3 * 80, "an epoch": 10**6}


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
def test_a_streamed_run_has_the_bits_of_a_whole_one(tmp_path, whole, chunk):
    start(tmp_path, f"--chunk={chunk}")
    assert result(tmp_path) == whole()


@pytest.mark.usefixtures("one_step_at_a_time")
def test_stopped_in_a_chunk_it_is_resumed_with_chunks_of_any_size_or_whole(tmp_path, whole):
    assert "after epoch 0 and 1 steps" in stop(tmp_path, 1, f"--chunk={CHUNKS['two steps']}")
    assert "after epoch 0 and 3 steps" in stop(tmp_path, 2, f"--chunk={CHUNKS['an epoch']}")
    assert "after epoch 1 and 1 steps" in stop(tmp_path, 3, f"--chunk={CHUNKS['a step']}")
    assert "after epoch 1 and 3 steps" in stop(tmp_path, 2)
    start(tmp_path, f"--chunk={CHUNKS['two steps']}")
    assert result(tmp_path) == whole()


def test_the_state_and_the_batch_of_a_loss_that_is_not_finite_are_the_same(tmp_path):
    failed = []
    for name, chunk in (("whole", 0), ("chunks", CHUNKS["two steps"])):
        with pytest.raises(RunError, match="step 2 of epoch 2, step 6"):
            start(tmp_path / name, "--bomb=5", f"--chunk={chunk}")
        with np.load(tmp_path / name / "failed" / "state.npz") as arrays:
            failed.append({key: arrays[key] for key in arrays})
    assert any("batch" in key for key in failed[0])
    for key, array in failed[0].items():
        np.testing.assert_array_equal(failed[1][key], array)


SIZE, BATCH = 22, 5


def order_of(epoch):
    """The order of the examples in an epoch and the key of its steps."""
    order_key, steps_key = loop.epoch_keys(jax.random.key(0), epoch)
    return loop.epoch_order(order_key, SIZE, BATCH), steps_key


class Recorded:
    """Numbers 0 to 21 in chunks of two of the four steps of an epoch; records what is fetched."""

    def __init__(self, epochs=2):
        self.fetched, self.begun = [], []
        like = jax.ShapeDtypeStruct((3,), np.float32)
        examples = Streamed(lambda rows: self.fetch(rows), like, SIZE, chunk_bytes=2 * BATCH * 12, put=jax.device_put)
        self.feed = feed.feed(examples, self.begin, BATCH, 4, 4 * epochs)

    def fetch(self, rows):
        self.fetched.append(rows)
        return np.broadcast_to(rows[:, None], (len(rows), 3)).astype(np.float32)

    def begin(self, epoch):
        self.begun.append(epoch)
        return order_of(epoch)


def test_steps_are_given_their_batches_and_the_next_chunk_is_fetched_meanwhile():
    recorded = Recorded()
    feed = recorded.feed
    for epoch in range(2):
        key = feed.begin(epoch)
        order, steps_key = order_of(epoch)
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(steps_key))
        for step in range(4):
            chunk, rows = feed.at(step)
            np.testing.assert_array_equal(chunk[rows[step], 0], order[step])
            assert [feed.end(step, stop) for stop in (4, 1)] == [2 if step < 2 else 4, 1]
    feed.close()
    assert len(recorded.fetched) == 4  # each once, none after the last epoch
    assert recorded.begun == [0, 1]
    assert {len(rows) for rows in recorded.fetched} == {2 * BATCH}


def test_at_most_two_chunks_are_there_at_once():
    recorded = Recorded(epochs=3)

    # Old arrays are held, so that no new one has the identity of an old one.
    old, most = {id(array): array for array in jax.live_arrays()}, 0

    def there():
        return sum(array.shape == (2 * BATCH, 3) and id(array) not in old for array in jax.live_arrays())

    send = recorded.feed._send
    recorded.feed._send = lambda *args: most_of(send(*args))

    def most_of(chunk):
        nonlocal most
        most = max(most, there())
        return chunk

    for epoch in range(3):
        recorded.feed.begin(epoch)
        for step in range(4):
            recorded.feed.at(step)
    recorded.feed.close()
    assert most in (1, 2)  # the thread may send the next one just before or after the former one is released
    gc.collect()
    assert there() == 0


def test_an_error_of_what_is_fetched_ends_the_run():
    recorded = Recorded()

    def fetch(rows):
        raise OSError("the disk is gone")

    recorded.fetch = fetch
    recorded.feed.begin(0)
    with pytest.raises(OSError, match="the disk is gone"):
        recorded.feed.at(0)
    recorded.feed.close()


def test_the_toy_knows_the_size_of_its_batches():
    assert sum(leaf[: toy.BATCH].nbytes for leaf in toy.examples().values()) == 80
