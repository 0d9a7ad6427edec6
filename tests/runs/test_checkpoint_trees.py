"""Any tree of arrays comes back as it was; readers change nothing; the logging of others is left alone."""

import json
import logging
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from saving import Folder, bits, make

from planar_vae_jax.runs import checkpoints as module
from planar_vae_jax.runs.checkpoints import CheckpointError, NoCheckpointError, fill, fill_params, named_arrays


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "checkpoints")


# --- Any tree


def test_arrays_of_any_kind_come_back_as_jax_arrays_of_their_values(folder):
    tree = {
        "int32": np.arange(3, dtype=np.int32),
        "scalar": np.float32(0.1),
        "bool": np.array(True),
        "complex": jnp.array([1 + 2j], jnp.complex64),
        "float8": jnp.arange(3).astype(jnp.float8_e4m3fn),
        "empty": jnp.zeros((0, 3), jnp.int8),
        "a/b.c": jnp.arange(2.0),
        "of one": [(jnp.ones((2, 1)),)],
    }
    folder(lambda checkpoints: checkpoints.save(1, tree, {}))
    found = folder(lambda checkpoints: checkpoints.restore(tree)).tree
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for actual, desired in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert isinstance(actual, jax.Array)
        assert (actual.dtype, actual.shape) == (desired.dtype, desired.shape)
        np.testing.assert_array_equal(actual, desired)


@pytest.mark.parametrize("array", [np.arange(3), np.array([0.1, np.nan]), np.arange(3, dtype=">i2")], ids=str)
def test_arrays_that_jax_has_not_are_read_as_numpy_arrays(folder, array):
    folder(lambda checkpoints: checkpoints.save(1, {"a": array}, {}))
    found = folder.read("latest").leaves["a"]
    assert found.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, array)


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
        ("text", "got str as leaf"),
        (3.0, "got float as leaf"),
        (np.array(["a", "bcd"]), "got ndarray as leaf"),
        (np.array([None, "a"]), "got ndarray as leaf"),
        (json, "got module as leaf"),
    ],
)
def test_anything_but_arrays_of_numbers_and_keys_is_refused_at_the_save(folder, leaf, words):
    with pytest.raises(TypeError, match=f"arrays of numbers and PRNG keys; {words}"):
        folder(lambda checkpoints: checkpoints.save(1, {"a": jnp.zeros(3), "leaf": leaf}, {}))
    assert not folder.path.exists()


def test_two_leaves_of_one_path_are_refused(folder):
    tree = {"a": [jnp.zeros(1)], "a.0": jnp.zeros(1)}
    with pytest.raises(TypeError, match=r"two leaves with the path a\.0"):
        folder(lambda checkpoints: checkpoints.save(1, tree, {}))
    assert not folder.path.exists()


# --- Names


def test_names_are_paths_and_do_not_depend_on_how_flax_wraps_parameters(folder):
    module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    plain = {"kernel": module.kernel[...], "bias": module.bias[...]}
    folder(lambda checkpoints: checkpoints.save(1, {"params": module, "all": [jnp.zeros(2)]}, {}))
    leaves = folder.read("latest").leaves
    assert set(leaves) == {"params.kernel", "params.bias", "all.0"}
    np.testing.assert_array_equal(leaves["params.kernel"], plain["kernel"])
    for like in (module, plain, jax.eval_shape(lambda: plain)):
        found = fill(leaves, like, "params")
        assert jax.tree.structure(found) == jax.tree.structure(like)
        assert_same_leaves(found, module)


def assert_same_leaves(actual, desired):
    jax.tree.map(np.testing.assert_array_equal, dict(named_arrays(actual)), dict(named_arrays(desired)))


def test_fill_names_the_leaf_that_does_not_fit():
    leaves = {"state.params.w": np.zeros(3, np.float32), "state.params.b": np.zeros((), np.float32)}
    for like, words in (
        ({"w": jnp.zeros(4), "b": jnp.zeros(())}, r"state\.params\.w is float32\[3\] there, float32\[4\] here"),
        ({"w": jnp.zeros(3)}, r"state\.params\.b is float32\[\] there, missing here"),
        (
            {"w": jnp.zeros(3), "b": jnp.zeros(()), "c": jnp.zeros(1)},
            r"state\.params\.c is missing there, float32\[1\]",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            fill(leaves, like, "state.params")


def test_the_parameters_to_evaluate_are_the_average_if_there_is_one():
    newest, average = {"state.params.w": np.zeros(3, np.float32)}, {"average.w": np.ones(3, np.float32)}
    like = {"w": jnp.zeros(3)}
    np.testing.assert_array_equal(fill_params(newest, like)["w"], np.zeros(3))
    np.testing.assert_array_equal(fill_params(newest | average, like)["w"], np.ones(3))
    single = {"state.params": np.zeros(3, np.float32)}
    np.testing.assert_array_equal(fill_params(single, jnp.zeros(3)), np.zeros(3))


# --- Readers, and the logging of others


def test_opening_to_read_writes_nothing_not_even_a_folder(folder):
    assert folder.restore() is None
    with pytest.raises(NoCheckpointError, match="holds no checkpoint"):
        folder.read("latest")
    assert not folder.path.exists()


def test_reading_beside_a_process_that_deletes(folder, monkeypatch):
    folder.save(1, 2)
    listed = module._steps(folder.path)
    shutil.rmtree(folder.path / "2")
    monkeypatch.setattr(module, "_steps", lambda directory: listed)  # as it was a moment ago
    assert folder.read("latest").step == 1
    assert not folder.told
    with pytest.raises(CheckpointError, match="checkpoints/2 does not exist"):
        folder.read(2)


def test_fields_that_a_reader_does_not_know_do_no_harm(folder):
    folder.save(1)
    whole = json.loads(folder.meta_file(1).read_text())
    content = whole["content"] | {"from the future": 1}
    crc = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    folder.meta_file(1).write_text(json.dumps(whole | {"content": content, "crc32": crc, "more": 2}))
    found = folder.read("latest")
    assert (found.step, bits(found.leaves), found.meta) == (1, bits(make(1)), {"number": 1})
    assert found.leaves["step"] == 1


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
    after = (logger.level, list(logger.filters), list(logger.handlers), logger.disabled, logging.root.level)
    assert [*seen, after] == [before, before]
    assert [record.message for record in caplog.records if record.name == "absl"] == ["somebody else's"]
