"""A damaged checkpoint gives no wrong state.

It is reported and an older one is used, or one line says that none is whole.
"""

import random
import re
import shutil

import jax
import numpy as np
import pytest

from campaign.harness import STRENGTH, contents, finish, refuse, result, steps
from planar_vae_jax.runs import checkpoints as module
from planar_vae_jax.runs.checkpoints import CheckpointError, Checkpoints, read_checkpoint


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
    return (saved / "3" / "meta" / "metadata").read_bytes().index(b'"format": 3') + 10


def files_of(saved):
    """The files of the newest checkpoint; Orbax chooses the names of those with arrays."""
    return sorted(path.relative_to(saved / "3") for path in (saved / "3").rglob("*") if path.is_file())


def restore_after(folder, damage, path):
    """Restores with the file damaged; returns whether step 3 was still whole."""
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
    if not told:  # the file has no part in the arrays
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


DAMAGES = {
    "emptied": cut_to(0),
    "one byte left": cut_to(1),
    "half": cut_to(0.5),
    "last byte missing": cut_last,
    "grown": grow,
    "missing": remove,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_file_cut_or_missing(copy, saved, tally, damage):
    for path in files_of(saved):
        whole = restore_after(copy(), damage, path)
        assert not (whole and path.parts[0] == "meta" and path.name == "metadata" and damage is not grow)
        tally(
            "a file of the newest checkpoint cut, emptied, longer, missing",
            "harmless, right" if whole else "reported, older used",
        )


@pytest.mark.smoke
def test_a_byte_flipped(copy, saved, tally):
    rng = random.Random(0)
    for path in files_of(saved):
        size = (saved / "3" / path).stat().st_size
        positions = range(size) if size <= 10 * STRENGTH else {0, size - 1, *rng.sample(range(size), 10 * STRENGTH)}
        for position in positions:
            if (str(path), position) == ("meta/metadata", format_position(saved)):
                continue  # below
            whole = restore_after(copy(), flip(position, rng.randrange(1, 256)), path)
            tally("a byte of the newest checkpoint flipped", "harmless, right" if whole else "reported, older used")


@pytest.mark.parametrize("digit", "456789")
def test_a_flipped_format_number_looks_like_a_newer_version_and_the_line_says_so(copy, saved, tally, digit):
    folder = copy()
    position = format_position(saved)
    flip(position, ord("3") ^ ord(digit))(folder / "3" / "meta" / "metadata")
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
    for step in range(4):
        damage(folder / str(step) / "meta" / "metadata")
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
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(whole, tally, half_toy):
    newest = half_toy / "checkpoints" / str(steps(half_toy)[-1])
    cut_to(0.5)(newest / "meta" / "metadata")
    run = finish("toy", half_toy)
    assert run.said(f"checkpoints/{newest.name}")
    assert run.said("is damaged")
    assert (half_toy / "checkpoints" / "damaged" / newest.name).is_dir()
    assert result(half_toy) == whole("toy")
    tally("newest checkpoint cut, run again", "reported, same end bit for bit", 1)


@pytest.mark.slow
def test_a_run_whose_arrays_are_damaged_says_so_without_a_traceback(whole, tally, half_toy):
    newest = half_toy / "checkpoints" / str(steps(half_toy)[-1])
    for path in (newest / "state").rglob("d/*"):
        cut_to(0.5)(path)
    run = finish("toy", half_toy)
    assert run.said("is damaged")
    assert not run.said("Exception ignored")
    assert result(half_toy) == whole("toy")
    tally("arrays of the newest checkpoint cut, run again", "reported, same end bit for bit", 1)


@pytest.mark.slow
def test_a_run_without_a_whole_checkpoint_is_refused_and_loses_nothing(tally, half_toy):
    for path in (half_toy / "checkpoints").glob("*tmp*"):  # under way when the run was killed
        shutil.rmtree(path)
    for step in steps(half_toy):
        remove(half_toy / "checkpoints" / str(step) / "meta" / "metadata")
    before = contents(half_toy / "checkpoints")
    for _ in range(2):
        refuse("toy", half_toy, status=1, words=r"none of the \d checkpoints in .* is whole")
    assert contents(half_toy / "checkpoints") == before
    tally("every checkpoint damaged, run again", "one line, status 1, nothing moved")


@pytest.mark.slow
def test_a_checkpoint_of_a_newer_format_is_refused_and_stays(tally, half_toy, monkeypatch):
    newest = half_toy / "checkpoints" / str(steps(half_toy)[-1])
    shutil.rmtree(newest)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_FORMAT", 4)
        checkpoints = Checkpoints(newest.parent)
        checkpoints.save(int(newest.name), tree(0), {})
        checkpoints.close()
    before = contents(half_toy / "checkpoints")
    refuse("toy", half_toy, status=1, words=f"{newest} is of format 4, written by a newer version")
    assert contents(half_toy / "checkpoints") == before
    tally("checkpoint of a newer format, run again", "one line, status 1, not moved")
