"""Checkpoints come back bit for bit or not at all."""

import json
import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from planar_vae_jax.runs import files, reading
from planar_vae_jax.runs.checkpoints import CheckpointError, Checkpoints, NoCheckpointError, read_checkpoint

PARAMS = {
    "w": np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32),
    "b": [jnp.zeros(()), jnp.zeros((0, 2))],
}


def make(seed):
    """A tree with everything that a run has: an optimiser's state, whole numbers, a typed key, odd floats."""
    params = jax.tree.map(lambda leaf: leaf + seed, PARAMS)
    return {
        "params": params,
        "opt": optax.adam(0.1).init(params),
        "step": jnp.int32(seed),
        "key": jax.random.key(seed),
        "odd": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-40], jnp.float32),
        "half": jnp.arange(3, dtype=jnp.bfloat16),
    }


def bits(tree):
    return [
        np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf).tobytes()
        for leaf in jax.tree.leaves(tree)
    ]


class Folder:
    """Opens the folder anew each time, as a new process does."""

    def __init__(self, path):
        self.path, self.told = path, []

    def __call__(self, action, keep=3):
        checkpoints = Checkpoints(self.path, keep=keep, tell=self.told.append)
        try:
            return action(checkpoints)
        finally:
            checkpoints.close()

    def save(self, *steps, keep=3):
        def action(checkpoints):
            for step in steps:
                checkpoints.save(step, make(step), {"number": step})

        self(action, keep)

    def restore(self):
        return self(lambda checkpoints: checkpoints.restore(make(0)))

    def read(self, which):
        return read_checkpoint(self.path, which, tell=self.told.append)

    def contents(self):
        return {path: path.read_bytes() for path in self.path.rglob("*") if path.is_file()}

    def array_file(self, step):
        """The largest file of the step: its arrays."""
        files = (path for path in (self.path / str(step) / "arrays").rglob("*") if path.is_file())
        return max(files, key=lambda path: path.stat().st_size)

    def meta_file(self, step):
        return self.path / str(step) / "meta" / "metadata"


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "checkpoints")


def test_nothing_is_restored_from_an_empty_folder(folder):
    assert folder.restore() is None


def test_what_was_saved_comes_back_bit_for_bit_with_its_types(folder):
    meta = {"epoch": 3, "lines": [{"loss": 0.1 + 0.2}], "name": "ü"}
    folder(lambda checkpoints: checkpoints.save(7, make(7), meta))
    found = folder.restore()
    assert (found.step, found.meta) == (7, meta)
    assert jax.tree.structure(found.tree) == jax.tree.structure(make(7))
    assert bits(found.tree) == bits(make(7))
    for actual, desired in zip(jax.tree.leaves(found.tree), jax.tree.leaves(make(7)), strict=True):
        assert (actual.dtype, actual.shape) == (desired.dtype, desired.shape)
    assert jax.random.uniform(found.tree["key"]) == jax.random.uniform(jax.random.key(7))


def test_the_arrays_may_be_given_away_at_once(folder):
    def action(checkpoints):
        array = np.zeros(100_000, np.float32)
        checkpoints.save(1, {"a": array}, {})
        array[:] = 1.0
        checkpoints.wait()
        return checkpoints.restore({"a": array})

    assert not np.any(folder(action).tree["a"])


def test_the_newest_stay_and_the_best(folder):
    def action(checkpoints):
        for step, score in enumerate([5.0, 1.0, None, 3.0, 4.0, 2.0, None]):
            checkpoints.save(step, make(step), {}, score=score)

    folder(action, keep=2)
    assert sorted(path.name for path in folder.path.iterdir()) == ["1", "5", "6"]
    folder(lambda checkpoints: checkpoints.save(7, make(7), {}), keep=2)  # it is known again in a new process
    assert sorted(path.name for path in folder.path.iterdir()) == ["1", "6", "7"]
    best = folder.read("best")
    assert (best.step, bits(best.leaves)) == (1, bits(make(1)))


def test_without_scores_there_is_no_best(folder):
    folder.save(1)
    with pytest.raises(NoCheckpointError, match="holds no checkpoint with a score"):
        folder.read("best")


def flip(file, at=0.5):
    raw = bytearray(file.read_bytes())
    raw[int(at * (len(raw) - 1))] ^= 16
    file.write_bytes(raw)


DAMAGES = {
    "array flipped": lambda folder: flip(folder.array_file(3), 0.9),
    "array truncated": lambda folder: folder.array_file(3).write_bytes(folder.array_file(3).read_bytes()[:-20]),
    "array emptied": lambda folder: folder.array_file(3).write_bytes(b""),
    "array missing": lambda folder: folder.array_file(3).unlink(),
    "arrays missing": lambda folder: shutil.rmtree(folder.path / "3" / "arrays"),
    "meta flipped": lambda folder: flip(folder.meta_file(3)),
    "meta truncated": lambda folder: folder.meta_file(3).write_bytes(folder.meta_file(3).read_bytes()[:-9]),
    "meta emptied": lambda folder: folder.meta_file(3).write_bytes(b""),
    "meta missing": lambda folder: folder.meta_file(3).unlink(),
    "meta is something else": lambda folder: folder.meta_file(3).write_text("[1]"),
    "all missing": lambda folder: [shutil.rmtree(folder.path / "3"), (folder.path / "3").mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_told_and_set_aside_and_the_next_older_is_used(folder, damage):
    folder.save(1, 2, 3)
    DAMAGES[damage](folder)
    before = folder.contents()
    read = folder.read("latest")
    found = folder.restore()
    assert (found.step, bits(found.tree)) == (2, bits(make(2)))
    assert (read.step, bits(read.leaves)) == (2, bits(make(2)))
    for line in folder.told:
        assert "\n" not in line
        assert "checkpoints/3" in line
        assert "step 2 is used" in line
    assert len(folder.told) == 2
    assert folder.contents() == before  # who only reads changes nothing

    def go_on(checkpoints):
        checkpoints.restore(make(0))
        checkpoints.save(3, make(3), {})  # its number is free again

    folder(go_on)
    assert (folder.path / "damaged" / "3").is_dir()
    assert bits(folder.restore().tree) == bits(make(3))


def test_any_single_file_may_be_missing(folder):
    folder.save(2, 3)
    names = [path.relative_to(folder.path / "3") for path in (folder.path / "3").rglob("*") if path.is_file()]
    shutil.copytree(folder.path, folder.path.with_name("copy"))
    for name in names:
        shutil.rmtree(folder.path)
        shutil.copytree(folder.path.with_name("copy"), folder.path)
        (folder.path / "3" / name).unlink()
        found = folder.restore()
        assert bits(found.tree) == bits(make(found.step)), name


def test_any_single_byte_of_the_small_files_may_be_wrong(folder):
    folder.save(2, 3)
    shutil.copytree(folder.path, folder.path.with_name("copy"))
    generator = np.random.default_rng(0)
    files = [path for path in (folder.path / "3").rglob("*") if path.is_file()]
    for file in files:
        for at in generator.random(3):
            shutil.rmtree(folder.path)
            shutil.copytree(folder.path.with_name("copy"), folder.path)
            flip(file, at)
            found = folder.restore()
            assert bits(found.tree) == bits(make(found.step)), (file, at)


def test_when_none_is_whole_that_is_an_error_and_nothing_is_moved(folder):
    folder.save(1, 2)
    for step in (1, 2):
        flip(folder.array_file(step), 0.9)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* is whole; step 2: .*checksum"):
            folder.restore()
    with pytest.raises(CheckpointError, match="none of the 2"):
        folder.read("latest")
    with pytest.raises(CheckpointError, match=r"checkpoints/1 is damaged \(ValueError: its arrays do not fit"):
        folder.read(1)
    assert not (folder.path / "damaged").exists()


def without(tree, name):
    return {key: leaf for key, leaf in tree.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree | {"step": jnp.zeros(2, jnp.int32)}, "['step'] is int32[] there, int32[2] here"),
        (lambda tree: tree | {"step": jnp.float32(0)}, "['step'] is int32[] there, float32[] here"),
        (lambda tree: without(tree, "half"), "['half'] is bfloat16[3] there, missing here"),
        (lambda tree: tree | {"new": jnp.zeros(3)}, "['new'] is missing there, float32[3] here"),
    ],
)
def test_one_of_another_tree_is_told_with_the_first_leaf_that_differs_and_left_alone(folder, change, words):
    folder.save(1, 2)
    before = folder.contents()
    with pytest.raises(CheckpointError) as caught:
        folder(lambda checkpoints: checkpoints.restore(change(make(0))))
    assert "checkpoints/2 (step 2) holds another tree" in str(caught.value)
    assert words in str(caught.value)
    assert folder.contents() == before
    assert not folder.told


def test_one_of_a_newer_format_is_an_error_that_says_so_and_is_left_alone(folder, monkeypatch):
    folder.save(1)
    monkeypatch.setattr(reading, "FORMAT", 3)
    folder.save(2)
    monkeypatch.undo()
    for read in (folder.restore, lambda: folder.read("latest"), lambda: folder.read(2)):
        with pytest.raises(CheckpointError, match="checkpoints/2 is of format 3, written by a newer version"):
            read()
    assert (folder.path / "2").is_dir()
    assert not folder.told


def test_what_a_killed_save_left_behind_is_removed_by_the_next(folder):
    folder.save(1)
    leftover = folder.path / "2.orbax-checkpoint-tmp"
    shutil.copytree(folder.path / "1", leftover)
    (folder.path / ".trash" / "0").mkdir(parents=True)
    assert folder.restore().step == 1
    assert folder.read("latest").step == 1
    assert leftover.exists()
    folder.save(2)
    assert sorted(path.name for path in folder.path.iterdir()) == ["1", "2"]


def test_a_step_that_is_not_newer_is_refused_aloud(folder):
    folder.save(5)
    with pytest.raises(CheckpointError):
        folder.save(5)
    with pytest.raises(CheckpointError, match="not after 5"):
        folder.save(4)


def test_a_save_that_fails_in_the_background_is_told_and_leaves_no_trace(folder, monkeypatch):
    folder.save(1)

    def action(checkpoints):
        # As when the disk is full: the folder that the writer is in takes no file.
        checkpoints.save(2, make(2), {})
        checkpoints.wait()
        handler = reading.orbax().JsonCheckpointHandler

        async def full(self, _item, path):
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(handler, "_save_fn", full)
        checkpoints.save(3, make(3), {})
        checkpoints.wait()

    with pytest.raises(CheckpointError, match=r"could not be written to .*: No space left on device$"):
        folder(action)
    assert sorted(path.name for path in folder.path.iterdir()) == ["1", "2"]
    monkeypatch.undo()
    assert folder.restore().step == 2


def test_nan_in_the_meta_data_is_a_mistake(folder):
    with pytest.raises(ValueError, match="JSON"):
        folder(lambda checkpoints: checkpoints.save(1, make(1), {"loss": float("nan")}))


def test_the_meta_file_is_json(folder):
    folder.save(1)
    whole = json.loads(folder.meta_file(1).read_text())
    assert (whole["format"], whole["content"]["meta"]) == (2, {"number": 1})


# --- Any tree


def test_what_jax_does_not_make_comes_back_as_it_was(folder):
    tree = {
        "int64": np.arange(3),
        "float64": np.array([0.1, np.nan]),
        "scalar": np.float64(0.1),
        "big-endian": np.arange(3, dtype=">i2"),
        "strings": np.array(["a", "bcd"]),
        "numbers": [3, -0.5, True, 2j],
        "bool": np.array(True),
        "jax": jnp.array(False),
    }
    folder(lambda checkpoints: checkpoints.save(1, tree, {}))
    found = folder(lambda checkpoints: checkpoints.restore(tree)).tree
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for actual, desired in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert isinstance(actual, jax.Array) == isinstance(desired, jax.Array)
        assert isinstance(desired, jax.Array) or type(actual) is type(desired)
        assert getattr(actual, "dtype", None) == getattr(desired, "dtype", None)
        np.testing.assert_array_equal(actual, desired)


def test_an_empty_tree(folder):
    folder(lambda checkpoints: checkpoints.save(1, {"nothing": []}, {"a": 1}))
    found = folder(lambda checkpoints: checkpoints.restore({"nothing": []}))
    assert (found.tree, found.meta) == ({"nothing": []}, {"a": 1})


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_typed_keys_given_as_shapes(folder, impl):
    tree = {"key": jax.random.key(7, impl=impl), "keys": jax.random.split(jax.random.key(1, impl=impl), 3)}
    folder(lambda checkpoints: checkpoints.save(1, tree, {}))
    shapes = jax.eval_shape(lambda: tree)
    found = folder(lambda checkpoints: checkpoints.restore(shapes)).tree
    assert bits(found) == bits(tree)
    assert [key.dtype for key in jax.tree.leaves(found)] == [key.dtype for key in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        ("text", r"got str as \['leaf'\]"),
        (np.array([None, "a"]), r"got object as \['leaf'\]"),
        (2**70, r"at most 64 bits; got 1180591620717411303424 as \['leaf'\]"),
        (json, r"got module as \['leaf'\]"),
    ],
)
def test_what_could_not_be_restored_is_refused_at_the_save(folder, leaf, words):
    with pytest.raises(TypeError, match=words):
        folder(lambda checkpoints: checkpoints.save(1, {"a": jnp.zeros(3), "leaf": leaf}, {}))
    assert not folder.path.exists()


# --- Whose folder it is, and whose logging


def test_opening_to_read_writes_nothing_not_even_a_folder(folder):
    assert folder.restore() is None
    with pytest.raises(NoCheckpointError, match="holds no checkpoint"):
        folder.read("latest")
    assert not folder.path.exists()


def test_reading_beside_a_process_that_deletes(folder, monkeypatch):
    folder.save(1, 2)
    listed = reading.steps(folder.path)
    shutil.rmtree(folder.path / "2")
    monkeypatch.setattr(reading, "steps", lambda directory: listed)  # as it was a moment ago
    assert folder.read("latest").step == 1
    assert not folder.told
    with pytest.raises(CheckpointError, match="checkpoints/2 is not there"):
        folder.read(2)


def test_a_reader_needs_no_right_to_write_and_fields_it_does_not_know_do_no_harm(folder):
    folder.save(1)
    whole = json.loads(folder.meta_file(1).read_text())
    whole["content"]["from the future"] = 1
    folder.meta_file(1).write_text(json.dumps(whole | {"crc32": reading.crc(whole["content"]), "more": 2}))
    found = folder.read("latest")
    assert (found.step, bits(found.leaves), found.meta) == (1, bits(make(1)), {"number": 1})
    assert found.leaves["['step']"] == 1


def test_logging_is_as_before(folder, caplog):
    logger = logging.getLogger("absl")
    before = (logger.level, list(logger.filters), list(logger.handlers), logger.disabled, logging.root.level)
    seen = []

    def action(checkpoints):
        seen.append((logger.level, list(logger.filters), list(logger.handlers), logger.disabled, logging.root.level))
        checkpoints.save(1, make(1), {})
        logger.warning("somebody else's")
        checkpoints.wait()
        checkpoints.restore(make(0))

    folder(action)
    assert [
        *seen,
        (logger.level, list(logger.filters), list(logger.handlers), logger.disabled, logging.root.level),
    ] == [
        before,
        before,
    ]
    assert [record.message for record in caplog.records if record.name == "absl"] == ["somebody else's"]


def test_a_checkpoint_is_synced_before_an_older_one_is_deleted(folder, monkeypatch):
    order = []
    sync, rename = files.sync, os.rename
    monkeypatch.setattr(files, "sync", lambda path: (order.append(path), sync(path)))
    monkeypatch.setattr(os, "rename", lambda source, target: (order.append(source), rename(source, target)))
    folder.save(1, 2, keep=1)
    own = set((folder.path / "2").rglob("*"))
    deleted = order.index(folder.path / "1", order.index(folder.path / "2"))
    assert {*own, folder.path / "2", folder.path} <= set(order[:deleted])
