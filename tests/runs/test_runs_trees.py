"""Any tree comes back as it was; whoever only reads changes nothing; logging is as before."""

import json
import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saving import Folder, bits, make

from planar_vae_jax.runs import files, reading
from planar_vae_jax.runs.checkpoints import CheckpointError, NoCheckpointError


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "checkpoints")


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
