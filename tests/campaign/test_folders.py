"""Whose folder it is: two processes, other settings, ``--overwrite`` killed; data that cannot be used."""

import gzip
import random
import shutil
import signal
import struct
import time

import numpy as np
import pytest

from campaign.harness import STRENGTH, Run, contents, finish, refuse, result

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


# --- Two processes


@pytest.mark.slow
def test_a_second_process_is_refused_and_the_first_goes_on(data, whole, tally, half):
    first = Run("mnist", half, *data["mnist"])
    assert first.until(first.begun)
    first.process.send_signal(signal.SIGSTOP)  # it would be done before the others
    for flags in ([], ["--overwrite"], ["--eval_only"]):
        refuse("mnist", half, *data["mnist"], *flags, status=2, words=f"--workdir={half} is in use by another process")
        tally("a second process on the folder", "one line, status 2, the first ends as ever")
    first.process.send_signal(signal.SIGCONT)
    assert first.end() == 0
    assert result(half) == whole("mnist")


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(STRENGTH))
def test_of_processes_started_at_once_one_has_the_folder(tally, tmp_path, turn):
    runs = [Run("density", tmp_path / "run") for _ in range(2)]
    statuses = sorted(run.end() for run in runs)
    assert statuses == [0, 2]
    assert sum(run.said("is in use by another process") for run in runs) == 1
    tally("two processes at once on a new folder", "one has it, the other one line and status 2")


# --- Other settings


@pytest.mark.slow
def test_other_settings_are_refused_with_their_names(data, tally, half):
    before = contents(half)
    words = "--seed: 0 there, 1 here; --latent: 2 there, 3 here.*--overwrite"
    refuse("mnist", half, *data["mnist"], "--latent=3", "--seed=1", status=2, words=words)
    assert contents(half) == before
    tally("other settings", "one line, status 2, nothing touched")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(STRENGTH))
def test_overwriting_killed_at_any_moment_loses_nothing(data, tally, half, seed):
    before, rng = contents(half), random.Random(seed)
    run = Run("mnist", half, *data["mnist"], "--overwrite")
    moved = half.with_name("run.old-1")
    if seed % 2 == 0:
        run.until(moved.exists)
    else:
        time.sleep(rng.uniform(0.8, 2.0))
    run.stop(signal.SIGKILL)
    assert contents(moved if moved.exists() else half) == before
    finish("mnist", half, *data["mnist"], "--overwrite", "--epochs=1")
    assert contents(moved) == before
    assert len(result(half)["metrics"]) == 1
    tally("--overwrite killed at any moment", "nothing lost, the same command begins")


# --- Data


def idx(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


@pytest.mark.slow
def test_unusable_data_are_told_and_leave_the_folder_free(data, whole, tally, tmp_path):
    generator, workdir = np.random.default_rng(0), tmp_path / "run"
    arrays = [
        generator.integers(0, 256, (40, 28, 28), np.uint8),
        generator.integers(0, 10, 40).astype(np.uint8),
        generator.integers(0, 256, (20, 28, 28), np.uint8),
        generator.integers(0, 10, 20).astype(np.uint8),
    ]
    files = {f"{name}.gz": gzip.compress(idx(array)) for name, array in zip(IDX, arrays, strict=True)}
    images, labels = f"{IDX[0]}.gz", f"{IDX[1]}.gz"
    cases = {
        "truncated": (images, files[images][:-500]),
        "swapped": (images, files[labels]),
        "wrong magic number": (images, gzip.compress(b"\1\2\3\4" + idx(arrays[0])[4:])),
        "not gzip": (labels, idx(arrays[1])),
        "empty": (labels, b""),
    }
    for case, (file, raw) in cases.items():
        folder = tmp_path / case
        folder.mkdir()
        for name, content in {**files, file: raw}.items():
            (folder / name).write_bytes(content)
        refuse("mnist", workdir, "--dataset=mnist", f"--data_dir={folder}", status=2, words=file)
        assert not workdir.exists()
        tally("data file truncated, swapped, not IDX, not gzip, empty", "one line, status 2, no folder")
    bad = tmp_path / "bad.npz"
    for content in ({"x_test": arrays[2]}, {"x_train": arrays[0][0], "x_test": arrays[2]}):
        np.savez(bad, **content)
        refuse("mnist", workdir, f"--dataset={bad}", status=2, words="x_train")
        assert not workdir.exists()
        tally("npz without x_train, of another rank", "one line, status 2, no folder")
    bad.write_bytes(bad.read_bytes()[:-30])
    refuse("mnist", workdir, f"--dataset={bad}", status=2, words="wanted an npz file")
    finish("mnist", workdir, *data["mnist"])
    assert result(workdir) == whole("mnist")


@pytest.mark.slow
def test_data_damaged_between_two_starts_stop_the_run_and_it_goes_on_once_they_are_whole(whole, tally, half, images):
    copy = shutil.copy(images, half.parent / images.name)
    raw = copy.read_bytes()
    copy.write_bytes(raw[:-100])
    before = contents(half)
    refuse("mnist", half, f"--dataset={copy}", status=2, words="--dataset: .* there, .* here|wanted an npz file")
    assert contents(half) == before
    tally("data damaged between two starts", "one line, status 2, nothing touched")
