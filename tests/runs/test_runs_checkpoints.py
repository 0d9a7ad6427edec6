"""Checkpoints come back bit for bit or not at all."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saving import Folder, bits, flip, make

from planar_vae_jax.runs import reading
from planar_vae_jax.runs.checkpoints import CheckpointError, NoCheckpointError


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


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "checkpoints")


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
