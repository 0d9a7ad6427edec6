"""A damaged checkpoint is never restored wrong.

An older one is used and the damage is told, or one line says that none is whole.
"""

import random
import re
import shutil

import jax
import numpy as np
import pytest

from campaign.harness import STRENGTH, contents, finish, refuse, result, steps
from planar_vae_jax.runs import reading
from planar_vae_jax.runs.checkpoints import CheckpointError, Checkpoints, read_checkpoint

FILES = (
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
    "arrays/_METADATA",
    "arrays/commit_success.txt",
    "arrays/checkpoint/.zarray",
    "arrays/checkpoint/0",
    "meta/commit_success.txt",
    "meta/metadata",
)


def tree(step):
    generator = np.random.default_rng(step)
    return {
        "params": {"w": generator.normal(size=(5, 7)).astype(np.float32), "n": np.int32(step)},
        "key": jax.random.key(step),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of the steps 1 to 3."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder)
    for step in (1, 2, 3):
        checkpoints.save(step, tree(step), {"lines": [step] * 20}, score=1.0 / step)
    checkpoints.close()
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """Gives a fresh copy of them, as often as is asked."""

    def again():
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return shutil.copytree(saved, tmp_path / "copy")

    return again


def cut_to(size):
    def damage(path):
        raw = path.read_bytes()
        path.write_bytes(raw[: int(size * len(raw)) if isinstance(size, float) else size])

    return damage


def cut_last(path):
    path.write_bytes(path.read_bytes()[:-1])


def grow(path):
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path):
    path.unlink()


def flip(position, mask):
    def damage(path):
        raw = bytearray(path.read_bytes())
        raw[position] ^= mask
        path.write_bytes(raw)

    return damage


def is_step(found, step):
    """Whether just that was saved."""
    same = jax.tree.map(lambda a, b: np.array_equal(data(a), data(b)), found.tree, tree(step))
    return found.step == step and all(jax.tree.leaves(same)) and found.meta == {"lines": [step] * 20}


def data(leaf):
    return jax.random.key_data(leaf) if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)


def format_position(saved):
    return (saved / "3" / "meta" / "metadata").read_bytes().index(b'"format": 2') + 10


def restore_after(folder, damage, path):
    """Restores with the file damaged; tells whether step 3 was still the one."""
    damage(folder / "3" / path)
    told, before = [], contents(folder)
    read = read_checkpoint(folder, warn=told.append)
    assert contents(folder) == before
    checkpoints = Checkpoints(folder, warn=told.append)
    found = checkpoints.restore(tree(0))
    assert contents(folder) == before
    checkpoints.begin_to_write()
    checkpoints.close()
    assert read.step == found.step
    if not told:  # what was damaged tells nothing of the arrays
        assert is_step(found, 3)
        return True
    assert is_step(found, 2)
    assert len(told) == 2
    for line in told:
        assert f"checkpoint {folder / '3'}" in line
        assert "step 2 is used instead" in line
        assert "\n" not in line
    assert (folder / "damaged" / "3" / path).exists() == (damage is not remove)
    return False


def test_the_files_are_those_of_a_checkpoint(saved):
    assert set(contents(saved / "3")) == set(FILES)


DAMAGES = {
    "emptied": cut_to(0),
    "one byte left": cut_to(1),
    "half": cut_to(0.5),
    "last byte missing": cut_last,
    "grown": grow,
    "missing": remove,
}


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_file_cut_or_missing(copy, tally, damage, path):
    whole = restore_after(copy(), damage, path)
    assert not (whole and path in ("arrays/checkpoint/0", "meta/metadata") and damage is not grow)
    tally(
        "a file of the newest checkpoint cut, emptied, longer, missing",
        "harmless, right" if whole else "told, older used",
    )


@pytest.mark.smoke
@pytest.mark.parametrize("path", FILES)
def test_a_byte_flipped(copy, saved, tally, path):
    size = (saved / "3" / path).stat().st_size
    rng = random.Random(path)
    positions = range(size) if size <= 10 * STRENGTH else {0, size - 1, *rng.sample(range(size), 10 * STRENGTH)}
    for position in positions:
        if (path, position) == ("meta/metadata", format_position(saved)):
            continue  # below
        mask = rng.randrange(1, 256)
        whole = restore_after(copy(), flip(position, mask), path)
        tally("a byte of the newest checkpoint flipped", "harmless, right" if whole else "told, older used")


@pytest.mark.parametrize("digit", "3456789")
def test_a_flipped_format_number_cannot_be_told_from_a_newer_version_and_the_line_says_so(copy, saved, tally, digit):
    folder = copy()
    position = format_position(saved)
    flip(position, ord("2") ^ ord(digit))(folder / "3" / "meta" / "metadata")
    before = contents(folder)
    checkpoints = Checkpoints(folder)
    with pytest.raises(CheckpointError, match=rf"3 is of format {digit}, .*it is damaged: move it elsewhere"):
        checkpoints.restore(tree(0))
    checkpoints.close()
    assert contents(folder) == before
    tally("the format number of the newest checkpoint flipped", "one line, nothing moved")


@pytest.mark.parametrize("name", ["init_timestamp_nsecs", "commit_timestamp_nsecs"])
@pytest.mark.parametrize("step", ["1", "3"])
def test_a_time_that_became_a_fraction_does_not_close_the_folder(copy, tally, name, step):
    """Orbax's manager would then open none of the checkpoints."""
    folder = copy()
    path = folder / step / "_CHECKPOINT_METADATA"
    raw = path.read_bytes()
    path.write_bytes(re.sub(rb"(%s\": \d{5})\d" % name.encode(), rb"\1.", raw))
    assert raw != path.read_bytes()
    checkpoints = Checkpoints(folder, warn=pytest.fail)
    checkpoints.begin_to_write()
    assert is_step(checkpoints.restore(tree(0)), 3)
    checkpoints.close()
    tally("a byte of the newest checkpoint flipped", "harmless, right")


@pytest.mark.parametrize("damage", [cut_to(0), remove, flip(40, 1)], ids=["emptied", "missing", "flipped"])
def test_none_whole_is_one_line_and_nothing_is_moved(copy, tally, damage):
    folder = copy()
    shutil.copytree(folder / "1", folder / "0")  # one more than are kept
    for step, path in (
        (0, "meta/metadata"),
        (1, "meta/metadata"),
        (2, "arrays/checkpoint/0"),
        (3, "arrays/checkpoint/0"),
    ):
        damage(folder / str(step) / path)
    before = contents(folder)
    checkpoints = Checkpoints(folder)
    with pytest.raises(CheckpointError, match=r"none of the 4 checkpoints in .* is whole; step 3: ") as caught:
        checkpoints.restore(tree(0))
    checkpoints.close()
    assert "\n" not in str(caught.value)
    assert contents(folder) == before
    tally("no checkpoint whole", "one line, nothing moved")


def test_a_folder_emptied_or_a_stray_file(copy):
    folder = copy()
    shutil.rmtree(folder / "3")
    (folder / "3").mkdir()
    (folder / "7").write_text("")
    (folder / "notes").mkdir()
    told = []
    checkpoints = Checkpoints(folder, warn=told.append)
    assert is_step(checkpoints.restore(tree(0)), 2)
    checkpoints.close()


# --- The same by the command


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(data, whole, tally, half):
    newest = half / "checkpoints" / str(steps(half)[-1])
    cut_to(0.5)(newest / "arrays" / "checkpoint" / "0")
    run = finish("mnist", half, *data["mnist"])
    assert run.said(f"checkpoints/{newest.name}")
    assert run.said("is damaged")
    assert (half / "checkpoints" / "damaged" / newest.name).is_dir()
    assert result(half) == whole("mnist")
    tally("newest checkpoint cut, run again", "told, same end bit for bit", 1)


@pytest.mark.slow
def test_a_run_without_a_whole_checkpoint_is_refused_and_loses_nothing(data, tally, half):
    for path in (half / "checkpoints").glob("*tmp*"):  # under way when the run was killed
        shutil.rmtree(path)
    for step in steps(half):
        remove(half / "checkpoints" / str(step) / "meta" / "metadata")
    before = contents(half / "checkpoints")
    for _ in range(2):
        refuse("mnist", half, *data["mnist"], status=1, words=r"none of the \d checkpoints in .* is whole")
    assert contents(half / "checkpoints") == before
    tally("every checkpoint damaged, run again", "one line, status 1, nothing moved")


@pytest.mark.slow
def test_a_checkpoint_of_a_newer_format_is_refused_and_stays(data, tally, half, monkeypatch):
    newest = half / "checkpoints" / str(steps(half)[-1])
    shutil.rmtree(newest)
    with monkeypatch.context() as patch:
        patch.setattr(reading, "FORMAT", reading.FORMAT + 1)
        checkpoints = Checkpoints(newest.parent)
        checkpoints.save(int(newest.name), tree(0), {})
        checkpoints.close()
    before = contents(half / "checkpoints")
    refuse("mnist", half, *data["mnist"], status=1, words=f"{newest} is of format 3, written by a newer version")
    assert contents(half / "checkpoints") == before
    tally("checkpoint of a newer format, run again", "one line, status 1, not moved")
