"""Examples that are sent to the devices in chunks: the bits of a run that has them whole."""

import gc

import jax
import numpy as np
import pytest
import toy
from running import OneStep, result, start, stop

from planar_vae_jax.data.streamed import Streamed, map_ahead
from planar_vae_jax.runs import chunks, compiled, fit
from planar_vae_jax.runs.epochs import Epochs
from planar_vae_jax.runs.files import RunError

ROOMS = {"a step": 1, "two steps": 2 * 2 * 80, "two where three fit": 2 * 3 * 80, "an epoch": 10**6}  # 80 bytes a batch


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    start(workdir)
    return result(workdir)


@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS)
def test_a_streamed_run_has_the_bits_of_a_whole_one(tmp_path, whole, room):
    start(tmp_path, f"--room={room}")
    assert result(tmp_path) == whole


def test_stopped_in_a_chunk_it_goes_on_with_chunks_of_any_size_or_whole(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(fit, "Pace", OneStep)
    assert "after epoch 0 and 1 steps" in stop(tmp_path, 1, f"--room={ROOMS['two steps']}")
    assert "after epoch 0 and 3 steps" in stop(tmp_path, 2, f"--room={ROOMS['an epoch']}")
    assert "after epoch 1 and 1 steps" in stop(tmp_path, 3, f"--room={ROOMS['a step']}")
    assert "after epoch 1 and 3 steps" in stop(tmp_path, 2)
    start(tmp_path, f"--room={ROOMS['two steps']}")
    assert result(tmp_path) == whole


def test_the_state_and_the_batch_of_a_loss_that_is_not_finite_are_the_same(tmp_path):
    failed = []
    for name, room in (("whole", 0), ("chunks", ROOMS["two steps"])):
        with pytest.raises(RunError, match="step 2 of epoch 2, step 6"):
            start(tmp_path / name, "--bomb=5", f"--room={room}")
        with np.load(tmp_path / name / "failed" / "state.npz") as arrays:
            failed.append({key: arrays[key] for key in arrays})
    assert any("batch" in key for key in failed[0])
    for key, array in failed[0].items():
        np.testing.assert_array_equal(failed[1][key], array)


SIZE, BATCH = 22, 5


class Recorded:
    """Numbers 0 to 21 in chunks of two of the four steps of an epoch; what was fetched."""

    def __init__(self, epochs=2):
        self.fetched, self.begun = [], []
        like = jax.ShapeDtypeStruct((3,), np.float32)
        self.epochs = Epochs(4 * epochs, 4, "epoch")
        examples = Streamed(self.fetch, like, SIZE, room=2 * 2 * BATCH * 12, put=jax.device_put)
        self.feed = chunks.feed(examples, self.begin, BATCH, self.epochs)

    def fetch(self, rows):
        self.fetched.append(rows)
        return np.broadcast_to(rows[:, None], (len(rows), 3)).astype(np.float32)

    def begin(self, epoch):
        self.begun.append(epoch)
        return compiled.begin_epoch(SIZE, BATCH, 4, jax.random.key(0), epoch)


def test_steps_are_given_their_batches_and_the_next_chunk_is_fetched_meanwhile():
    recorded = Recorded()
    feed = recorded.feed
    for epoch in range(2):
        feed.begin(epoch)
        order, _ = compiled.begin_epoch(SIZE, BATCH, 4, jax.random.key(0), epoch)
        for step in range(4):
            batch = compiled.take_batch(*feed.at(step), step)
            np.testing.assert_array_equal(batch[:, 0], order[step])
            assert [feed.end(step, stop) for stop in (4, 1)] == [2 if step < 2 else 4, 1]
    feed.close()
    assert len(recorded.fetched) == 4  # each once, none after the last epoch
    assert recorded.begun == [0, 1]
    assert {len(rows) for rows in recorded.fetched} == {2 * BATCH}


def test_at_most_two_chunks_are_there_at_once():
    recorded = Recorded(epochs=3)

    old, most = {id(array): array for array in jax.live_arrays()}, 0  # held, so that no new one has such a number

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
    assert 1 <= most <= 2  # the thread may send the next one just before or after the former one is let go
    gc.collect()
    assert there() == 0


def test_an_error_of_what_is_fetched_ends_the_run():
    recorded = Recorded()
    recorded.feed.begin(0)

    def fetch(rows):
        raise OSError("the disk is gone")

    object.__setattr__(recorded.feed._examples, "fetch", fetch)
    with pytest.raises(OSError, match="the disk is gone"):
        recorded.feed.at(0)


def test_map_ahead_loads_one_ahead():
    loaded, seen = [], []

    def load(number):
        loaded.append(number)
        return number

    def function(number):
        seen.append(len(loaded))
        return -number

    assert map_ahead(function, load, range(5)) == [0, -1, -2, -3, -4]
    assert loaded == list(range(5))
    assert all(count <= number + 2 for number, count in enumerate(seen))
    assert map_ahead(function, load, []) == []


def test_the_toy_knows_the_size_of_its_batches():
    assert sum(leaf[: toy.BATCH].nbytes for leaf in toy.examples().values()) == 80
