"""A data set in memory: fewer classes, images held out, its identity."""

import json

import numpy as np
import pytest
from data_samples import IMAGES, as_dataset, assert_same, assert_valid, binary, digits

from planar_vae_jax.data import (
    ArgumentError,
    DataError,
    assemble,
    choose_images,
    dataset_identity,
    hold_out,
    select_classes,
)


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


def test_chosen_images_have_the_identity_of_the_images_before_some_are_held_out():
    dataset = as_dataset(digits())
    chosen, identity = choose_images(dataset, (3, 8), 2)
    assert identity == dataset_identity(select_classes(dataset, (3, 8)))
    np.testing.assert_array_equal(chosen.valid_index, hold_out(select_classes(dataset, (3, 8)), 2).valid_index)
    whole, identity = choose_images(dataset, None, 0)
    assert whole is dataset
    assert identity == dataset_identity(dataset)


def test_labels_below_zero():
    arrays = digits()
    arrays |= {field: arrays[field].astype(int) - 1 for field in ("y_train", "y_test")}
    chosen = select_classes(as_dataset(arrays), [-1])
    assert chosen.train_index.tolist() == [0, 10, 20]


def test_labels_of_two_axes_are_taken():
    """As Keras gives those of CIFAR."""
    arrays = digits()
    columns = {field: y[:, None] for field, y in arrays.items() if field[0] == "y"}
    assert_same(assemble("mine", "memory", arrays | columns), arrays)
