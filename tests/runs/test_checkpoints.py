"""Checkpoints come back bit for bit or not at all."""

import json
import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from saving import Folder, bits, flip, make

from planar_vae_jax.runs import checkpoints as module
from planar_vae_jax.runs.checkpoints import CheckpointError, Checkpoints, NoCheckpointError, read_checkpoint


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "checkpoints")


def test_an_empty_folder_gives_nothing(folder):
    assert folder.restore() is None


def test_a_saved_tree_comes_back_bit_for_bit_with_its_types(folder):
    meta = {"epoch": 3, "lines": [{"loss": 0.1 + 0.2}], "name": "ü"}
    folder(lambda checkpoints: checkpoints.save(7, make(7), meta))
    found = folder.restore()
    assert (found.step, found.meta) == (7, meta)
    assert jax.tree.structure(found.tree) == jax.tree.structure(make(7))
    assert bits(found.tree) == bits(make(7))
    for actual, desired in zip(jax.tree.leaves(found.tree), jax.tree.leaves(make(7)), strict=True):
        assert (actual.dtype, actual.shape) == (desired.dtype, desired.shape)
    assert jax.random.uniform(found.tree["key"]) == jax.random.uniform(jax.random.key(7))


def test_arrays_may_change_once_save_has_returned(folder):
    def action(checkpoints):
        array = np.zeros(100_000, np.float32)
        checkpoints.save(1, {"a": array}, {})
        array[:] = 1.0
        checkpoints.wait()
        return checkpoints.restore({"a": array})

    assert not np.any(folder(action).tree["a"])


def test_the_newest_and_the_best_stay(folder):
    def action(checkpoints):
        for step, score in enumerate([5.0, 1.0, None, 3.0, 4.0, 2.0, None]):
            checkpoints.save(step, make(step), {}, score=score)

    folder(action, keep=2)
    assert folder.steps() == [1, 5, 6]
    folder(lambda checkpoints: checkpoints.save(7, make(7), {}), keep=2)  # a new process knows the best one
    assert folder.steps() == [1, 6, 7]
    best = folder.read("best")
    assert (best.step, best.score, bits(best.leaves)) == (1, 1.0, bits(make(1)))


def test_of_equal_scores_the_first_is_the_best(folder):
    def action(checkpoints):
        for step in range(4):
            checkpoints.save(step, make(step), {}, score=1.0)

    folder(action, keep=1)
    assert folder.steps() == [0, 3]
    assert folder.read("best").step == 0


def test_without_scores_there_is_no_best(folder):
    folder.save(1)
    with pytest.raises(NoCheckpointError, match="holds no checkpoint with a score"):
        folder.read("best")


# --- Damage

DAMAGES = {
    "array flipped": lambda folder: flip(folder.array_file(3)),
    "array truncated": lambda folder: folder.array_file(3).write_bytes(folder.array_file(3).read_bytes()[:1000]),
    "array emptied": lambda folder: folder.array_file(3).write_bytes(b""),
    "array missing": lambda folder: folder.array_file(3).unlink(),
    "arrays missing": lambda folder: shutil.rmtree(folder.path / "3" / "state"),
    "meta flipped": lambda folder: flip(folder.meta_file(3)),
    "meta truncated": lambda folder: folder.meta_file(3).write_bytes(folder.meta_file(3).read_bytes()[:-9]),
    "meta emptied": lambda folder: folder.meta_file(3).write_bytes(b""),
    "meta missing": lambda folder: folder.meta_file(3).unlink(),
    "meta is something else": lambda folder: folder.meta_file(3).write_text("[1]"),
    "all missing": lambda folder: [shutil.rmtree(folder.path / "3"), (folder.path / "3").mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_reported_and_set_aside_and_the_next_older_is_used(folder, damage):
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
    assert folder.contents() == before  # reading changes nothing

    def resume(checkpoints):
        checkpoints.restore(make(0))
        checkpoints.save(3, make(3), {})  # its number is free again

    folder(resume)
    assert (folder.path / "damaged" / "3").is_dir()
    assert bits(folder.restore().tree) == bits(make(3))


def restored_after(folder, damage):
    """Damages a fresh copy of the folder; what is restored is a state that was saved, never another one."""
    shutil.rmtree(folder.path)
    shutil.copytree(folder.path.with_name("copy"), folder.path)
    damage()
    found = folder.restore()
    assert bits(found.tree) == bits(make(found.step))
    assert found.meta == {"number": found.step}
    return found.step


def test_any_single_file_may_be_missing(folder):
    folder.save(2, 3)
    shutil.copytree(folder.path, folder.path.with_name("copy"))
    files = [path for path in (folder.path / "3").rglob("*") if path.is_file()]
    steps = {restored_after(folder, file.unlink) for file in files}
    assert 2 in steps


def test_any_single_byte_of_any_file_may_be_wrong(folder):
    folder.save(2, 3)
    shutil.copytree(folder.path, folder.path.with_name("copy"))
    generator = np.random.default_rng(0)
    files = [path for path in (folder.path / "3").rglob("*") if path.is_file()]
    places = [(file, at) for file in files for at in generator.random(3)]
    steps = {restored_after(folder, lambda file=file, at=at: flip(file, at)) for file, at in places}
    assert 2 in steps


def test_when_none_is_whole_that_is_an_error_and_nothing_is_moved(folder):
    folder.save(1, 2)
    for step in (1, 2):
        flip(folder.array_file(step))
    before = folder.contents()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* is whole; step 2: "):
            folder.restore()
    with pytest.raises(CheckpointError, match="none of the 2"):
        folder.read("latest")
    with pytest.raises(CheckpointError, match=r"checkpoints/1 is damaged \("):
        folder.read(1)
    assert folder.contents() == before


@pytest.mark.parametrize("left", ["meta", "state", "nothing"])
@pytest.mark.parametrize("score", [0.5, 5.0, None])
def test_an_old_one_whose_deletion_was_interrupted_does_no_harm(folder, left, score):
    """Orbax deletes file by file, so a killed process can leave a part of an old checkpoint under its real name."""

    def save(checkpoints):
        for step in (1, 2):
            checkpoints.save(step, make(step), {}, score={1: score, 2: 1.0}[step])

    folder(save)
    for part in {"meta", "state"} - {left}:
        shutil.rmtree(folder.path / "1" / part)
    (folder.path / "1" / "_CHECKPOINT_METADATA").unlink()
    found = folder.restore()
    assert (found.step, bits(found.tree)) == (2, bits(make(2)))
    assert folder.read("latest").step == 2
    if score == 0.5 and left == "meta":  # its score is there, its state is not
        with pytest.raises(CheckpointError, match=r"checkpoints/1 is damaged \("):
            folder.read("best")
    else:
        assert bits(folder.read("best").leaves) == bits(make(2))

    def resume(checkpoints):
        checkpoints.restore(make(0))
        for step in (3, 4):
            checkpoints.save(step, make(step), {}, score=0.1)

    folder(resume, keep=1)
    assert not folder.told
    assert folder.steps() == [3, 4]
    assert bits(folder.read("best").leaves) == bits(make(3))


@pytest.mark.parametrize("name", ["init_timestamp_nsecs", "commit_timestamp_nsecs"])
def test_a_damaged_time_in_orbax_metadata_does_not_close_the_folder(folder, name):
    folder.save(1, 2)
    path = folder.path / "1" / "_CHECKPOINT_METADATA"
    times = json.loads(path.read_text())
    assert isinstance(times[name], int)
    path.write_text(json.dumps({**times, name: 0.5}))
    folder.save(3)
    assert folder.steps() == [1, 2, 3]
    assert not folder.told


# --- Other trees and formats


def without(tree, name):
    return {key: leaf for key, leaf in tree.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree | {"step": jnp.zeros(2, jnp.int32)}, "step is int32[] there, int32[2] here"),
        (lambda tree: tree | {"step": jnp.float32(0)}, "step is int32[] there, float32[] here"),
        (lambda tree: tree | {"key": jax.random.key(0, impl="rbg")}, "key is key<fry>[] there, key<rbg>[] here"),
        (lambda tree: without(tree, "half"), "half is bfloat16[3] there, missing here"),
        (lambda tree: tree | {"new": jnp.zeros(3)}, "new is missing there, float32[3] here"),
    ],
)
def test_one_of_another_tree_is_an_error_that_names_the_first_leaf_and_is_left_alone(folder, change, words):
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
    monkeypatch.setattr(module, "_FORMAT", 9)
    folder.save(2)
    monkeypatch.undo()
    for read in (folder.restore, lambda: folder.read("latest"), lambda: folder.read(2)):
        with pytest.raises(CheckpointError, match="checkpoints/2 is of format 9, written by a newer version"):
            read()
    assert (folder.path / "2").is_dir()
    assert not folder.told


# --- Saves


def test_what_a_killed_save_left_behind_is_removed_by_the_next(folder):
    folder.save(1)
    leftover = folder.path / "2.orbax-checkpoint-tmp"
    shutil.copytree(folder.path / "1", leftover)
    assert folder.restore().step == 1
    assert folder.read("latest").step == 1
    assert leftover.exists()
    folder.save(2)
    assert sorted(path.name for path in folder.path.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("step", [5, 4])
def test_a_step_that_is_not_newer_is_refused(folder, step):
    folder.save(5)
    before = folder.contents()
    with pytest.raises(CheckpointError, match=f"step {step} is not after 5"):
        folder.save(step)
    assert folder.contents() == before


def full_disk(monkeypatch, at=1):
    """From the save of this number on, the folder takes no file; the event says that a save has failed."""
    handler, saves, failed = ocp.JsonCheckpointHandler, 0, threading.Event()
    write = handler._save_fn

    async def save(self, item, path):
        nonlocal saves
        saves += 1
        if saves >= at:
            failed.set()
            raise OSError(28, "No space left on device", str(path))
        await write(self, item, path)

    monkeypatch.setattr(handler, "_save_fn", save)
    return failed


def test_a_save_that_fails_in_the_background_is_reported_and_is_no_checkpoint(folder, monkeypatch):
    folder.save(1)
    full_disk(monkeypatch, at=2)
    with pytest.raises(CheckpointError, match=r"could not be written to .*: No space left on device$"):
        folder.save(2, 3)
    assert folder.steps() == [1, 2]
    monkeypatch.undo()
    assert folder.restore().step == 2
    folder.save(3)
    assert sorted(path.name for path in folder.path.iterdir()) == ["1", "2", "3"]


def test_after_a_failed_save_the_same_object_saves_and_keeps_the_best(folder, monkeypatch):
    def action(checkpoints):
        checkpoints.save(1, make(1), {}, score=2.0)
        checkpoints.wait()
        with monkeypatch.context() as patch:
            full_disk(patch)
            checkpoints.save(2, make(2), {}, score=1.0)
            with pytest.raises(CheckpointError, match="No space left"):
                checkpoints.wait()
        checkpoints.wait()  # reported once
        for step in (3, 4):
            checkpoints.save(step, make(step), {}, score=3.0)

    folder(action, keep=1)
    assert folder.steps() == [1, 4]
    assert folder.read("best").step == 1


def test_a_save_is_on_the_disk_when_wait_returns(folder, monkeypatch):
    synced = []
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), sync(handle))
    )
    folder.save(2)
    own = [folder.path, folder.path / "2", *(folder.path / "2").rglob("*")]
    assert {str(path) for path in own} <= set(synced)


def test_a_save_returns_before_orbax_has_begun_and_its_failure_to_begin_is_reported_once(folder, monkeypatch):
    waiting, begin = threading.Event(), ocp.CheckpointManager.save

    def save(self, step, **kwargs):
        assert waiting.wait(60)
        if step == 2:
            raise OSError(28, "No space left on device")
        return begin(self, step, **kwargs)

    def action(checkpoints):
        for step in (1, 2):
            waiting.clear()
            checkpoints.save(step, make(step), {})
            waiting.set()
        with pytest.raises(CheckpointError, match=r"No space left on device$"):
            checkpoints.wait()
        checkpoints.save(3, make(3), {})

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    folder(action)
    assert folder.steps() == [1, 3]


def test_nan_in_the_meta_data_is_a_mistake(folder):
    with pytest.raises(ValueError, match="JSON"):
        folder(lambda checkpoints: checkpoints.save(1, make(1), {"loss": float("nan")}))


def test_the_meta_file_is_json(folder):
    folder.save(1)
    whole = json.loads(folder.meta_file(1).read_text())
    assert (whole["format"], whole["content"]["meta"]) == (3, {"number": 1})


# --- Several at once


def test_threads_save_into_folders_of_their_own_at_the_same_time(tmp_path):
    errors = []

    def save(name):
        try:
            with Checkpoints(tmp_path / name, keep=2) as checkpoints:
                for step in range(1, 9):
                    checkpoints.save(step, {"w": np.full(1000, step, np.float64)}, {"name": name})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors
    for number in range(4):
        found = read_checkpoint(tmp_path / str(number))
        assert (found.step, found.meta) == (8, {"name": str(number)})
        np.testing.assert_array_equal(found.leaves["w"], np.full(1000, 8.0))


def test_two_folders_are_written_in_turns_and_each_reports_its_own_error(tmp_path, monkeypatch):
    one, two = (Checkpoints(tmp_path / name) for name in ("one", "two"))
    for folder in (one, two):
        folder.save(1, {"a": np.arange(1)}, {})
    two.wait()
    one.wait()
    failed = full_disk(monkeypatch)
    one.save(2, {"a": np.arange(2)}, {})
    assert failed.wait(60)
    monkeypatch.undo()
    two.save(2, {"a": np.arange(2)}, {})
    two.close()
    with pytest.raises(CheckpointError, match="one: No space left on device"):
        one.close()
    assert read_checkpoint(tmp_path / "one").step == 1
    assert read_checkpoint(tmp_path / "two").step == 2


def test_ctrl_c_in_a_save_leaves_the_process_able_to_save(folder, monkeypatch, tmp_path):
    def interrupted(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "sync_tree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folder.save(1)
    other = Folder(tmp_path / "other")
    other.save(1)
    assert other.restore().step == 1
    folder.save(2)
    assert folder.restore().step == 2
