"""A folder of npy files: what an npz file of the same arrays is, without being in memory."""

import re

import numpy as np
import pytest
from data_samples import FIELDS, assert_valid, digits, error_of, no_warning

from planar_vae_jax.data import dataset, dataset_identity, hold_out, load_dataset, select_classes


def write(folder, arrays):
    folder.mkdir(exist_ok=True)
    for field, array in arrays.items():
        np.save(folder / f"{field}.npy", array)
    return folder


@pytest.fixture
def both(tmp_path, monkeypatch):
    """The same arrays from a folder and from an npz file; what is looked at at a time are two images."""
    monkeypatch.setattr(dataset, "_BLOCK", 2 * 35)
    arrays = digits(size=(5, 7))
    arrays |= {"x_valid": arrays["x_test"][:17], "y_valid": arrays["y_test"][:17]}
    folder = write(tmp_path / "mine", arrays)
    np.savez(tmp_path / "mine.npz", **arrays)
    return tuple(load_dataset(str(path), warn=no_warning) for path in (folder, tmp_path / "mine.npz"))


def assert_equal(ours, theirs):
    assert_valid(theirs)
    for field in (*FIELDS, "train_index", "valid_index", "test_index"):
        one, other = getattr(ours, field), getattr(theirs, field)
        assert (one is None) == (other is None)
        if one is not None:
            assert (len(one), one.shape, one.dtype, one.ndim) == (len(other), other.shape, other.dtype, other.ndim)
            assert (one.size, one.nbytes) == (other.size, other.nbytes)
            np.testing.assert_array_equal(np.asarray(one), other)
    ours, theirs = dataset_identity(ours), dataset_identity(theirs)
    assert {**ours, "source": None} == {**theirs, "source": None}


def test_it_is_the_npz_file_of_its_arrays_and_nothing_is_copied(both):
    assert_equal(*both)
    assert all(isinstance(getattr(both[0], f"x_{split}"), np.memmap) for split in ("train", "valid", "test"))


def test_classes_and_images_held_out(both):
    mapped, arrays = (select_classes(one, [3, 8]) for one in both)
    assert_equal(mapped, arrays)
    mapped, arrays = (hold_out(one._replace(x_valid=None, valid_index=None), 4) for one in (mapped, arrays))
    assert_equal(mapped, arrays)


X = digits()["x_train"]
FAULTS = {
    "no training images": ({"x_train": None}, "wanted x_train.npy, got y_train.npy, x_test.npy, y_test.npy"),
    "nothing": (
        dict.fromkeys(FIELDS),
        "wanted x_train.npy, got none of its files; give a folder of IDX files as data_dir",
    ),
    "floats": ({"x_test": X / 255}, r"x_test.npy: .*uint8.*\] float64: save numpy.rint\(255 \* x\)"),
    "booleans": ({"x_train": X > 99}, r"x_train.npy: .*\] bool: save x.astype\(numpy.uint8\) \* 255"),
    "integers": ({"x_train": X.astype(int)}, r"x_train.npy: wanted .*uint8.*got \[30, 28, 28\] int64"),
    "flat": ({"x_train": X.reshape(30, 784)}, r"x_train.npy: wanted images \[N, H, W\].*\[30, 784\] uint8"),
    "another size": ({"x_test": X[:, 1:]}, r"x_test.npy: wanted \[N, 28, 28\] as in x_train, got \[30, 27, 28\]"),
    "Fortran order": ({"x_train": np.asfortranarray(X)}, r"x_train.npy: .*numpy.ascontiguousarray\(x\)"),
    "one grey level": ({"x_train": np.full_like(X, 7)}, "x_train.npy: wanted pictures, got the same grey level 7"),
    "labels of others": ({"y_train": np.arange(29)}, r"y_train.npy: wanted \[30\] labels, integers, got \[29\]"),
    "objects": ({"x_train": np.array([{}, []], object)}, "x_train.npy: wanted a whole npy file.*bject"),
    "no images": ({"x_test": X[:0]}, "x_test.npy: wanted (images|a whole)"),
}


@pytest.mark.parametrize(("changed", "words"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_is_told_with_the_file(tmp_path, changed, words):
    arrays = {field: array for field, array in {**digits(), **changed}.items() if array is not None}
    folder = write(tmp_path / "images", arrays)
    message = error_of(str(folder))
    assert message.startswith(f"dataset: {folder}")
    assert re.search(words, message), message


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: raw[:-100], "wanted a whole npy file"),
        (lambda raw: raw + b"more", r"wanted 23520 bytes of data, got 23524"),
        (lambda raw: b"", "wanted a whole npy file"),
        (lambda raw: b"PK" + raw[2:], "wanted a whole npy file"),
        (lambda raw: raw[:20], "wanted a whole npy file"),
    ],
)
def test_damage_is_told(tmp_path, damage, words):
    path = write(tmp_path / "images", digits()) / "x_train.npy"
    path.write_bytes(damage(path.read_bytes()))
    assert re.search(f"^dataset: {re.escape(str(path))}: {words}", error_of(str(path.parent)))


def test_images_that_are_nearly_black_are_told(tmp_path):
    folder, said = write(tmp_path / "images", {**digits(), "x_train": (X > 99).astype(np.uint8)}), []
    load_dataset(str(folder), warn=said.append)
    (line,) = said
    assert f"{folder / 'x_train.npy'}: nearly black: their maximum is 1" in line


def test_a_folder_with_the_name_of_a_data_set_is_the_data_set(tmp_path, monkeypatch, offline):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "kmnist", digits())
    assert "kmnist is unavailable" in error_of("kmnist")
    assert load_dataset("./kmnist").name == "kmnist"
    assert "unknown data set 'nowhere'; wanted" in error_of("nowhere")
