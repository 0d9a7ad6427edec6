"""Points of a npy file: how they are split and standardised, and which files are refused."""

import numpy as np
import pytest
import scipy.stats

from planar_vae_jax.data import DataError, assemble_points, read_points, split_points

POINTS = np.random.default_rng(0).normal(size=(103, 3)) * [1.0, 1e-3, 1e6] + [0.0, 5.0, -1e7]


@pytest.fixture
def read(tmp_path):
    def read(array):
        np.save(tmp_path / "mine.npy", array, allow_pickle=True)
        return read_points(tmp_path / "mine.npy")

    return read


def test_each_point_is_in_one_split_and_the_same_permutation_splits_all_sets(read):
    points = read(POINTS)
    assert (points.name, points.dim) == ("mine", 3)
    assert [len(split) for split in (points.train, points.valid, points.test)] == [63, 20, 20]
    whole = np.concatenate([points.train, points.valid, points.test])
    np.testing.assert_array_equal(np.sort(whole, axis=0), np.sort(POINTS, axis=0))
    rows = split_points("rows", "memory", np.arange(103.0)[:, None])
    for name in ("train", "valid", "test"):
        np.testing.assert_array_equal(getattr(points, name), POINTS[getattr(rows, name)[:, 0].astype(int)])


def test_training_points_are_standardised_and_densities_change_by_the_volume(read):
    points = read(POINTS)
    z = points.standardised(points.train, np.float64)
    np.testing.assert_allclose(z.mean(0), np.zeros(3), atol=1e-8)
    np.testing.assert_allclose(z.std(0), np.ones(3), rtol=1e-8)
    assert points.standardised(points.test, np.float32).dtype == np.float32
    normal = scipy.stats.norm(points.mean, points.std)
    z = points.standardised(points.test, np.float64)
    standard = scipy.stats.norm.logpdf(z).sum(-1)
    np.testing.assert_allclose(standard - points.log_volume, normal.logpdf(points.test).sum(-1), rtol=1e-8)


def test_the_identity_tells_points_from_others(read):
    identity = read(POINTS).identity()
    assert identity["name"] == "mine"
    changed = POINTS.copy()
    changed[50, 1] += 1e-9
    assert read(changed).identity()["crc32"] != identity["crc32"] == read(POINTS).identity()["crc32"]


@pytest.mark.parametrize("dtype", ["float16", "<f4", ">f4", ">f8"])
def test_floats_of_any_width_and_order_are_read(read, dtype):
    array = np.random.default_rng(0).normal(size=(60, 1)).astype(dtype)
    points = read(array)
    assert points.train.dtype == np.float64
    np.testing.assert_array_equal(np.sort(np.concatenate(points[2:5]), axis=0), np.sort(array.astype(float), axis=0))


def with_value(array, row, column, value):
    array = array.copy()
    array[row, column] = value
    return array


WANTED = r"mine\.npy: wanted points \[N, D\], floats, N at least 50 and D from 1 to 100, got "


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (POINTS[:, 0], WANTED + r"\[103\] float64"),
        (POINTS[None], WANTED + r"\[1, 103, 3\] float64"),
        (POINTS[:49], WANTED + r"\[49, 3\] float64"),
        (np.zeros((60, 0)), WANTED + r"\[60, 0\] float64"),
        (np.random.default_rng(0).normal(size=(60, 101)), WANTED + r"\[60, 101\] float64"),
        (np.arange(120).reshape(60, 2), WANTED + r"\[60, 2\] int64"),
        (POINTS.astype(complex), WANTED + r"\[103, 3\] complex128"),
        (POINTS.astype(object), r"mine\.npy: wanted a npy file, got ValueError: Object arrays"),
        (with_value(POINTS, 7, 2, np.nan), r"mine\.npy: wanted finite numbers, got nan in row 7, column 2"),
        (with_value(POINTS, 0, 1, -np.inf), r"wanted finite numbers, got -inf in row 0, column 1"),
        (with_value(POINTS, 0, 1, 1e200), r"wanted finite numbers, got 1e\+200 in row 0, column 1"),
        (np.c_[POINTS, np.full(103, 0.1)], r"mine\.npy: wanted columns that vary, got column 3 of 0\.1 throughout"),
    ],
    ids=str,
)
def test_what_cannot_be_fitted_is_refused_in_one_line(read, array, said):
    with pytest.raises(DataError, match=said) as caught:
        read(array)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.npy cannot be read: No such file"):
        read_points(tmp_path / "none.npy")
    (tmp_path / "text.npy").write_text("1, 2, 3")
    with pytest.raises(DataError, match=r"text\.npy: wanted a npy file, got"):
        read_points(tmp_path / "text.npy")
    np.savez(tmp_path / "several.npz", a=POINTS)
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    with pytest.raises(DataError, match=r"wanted points .*, got several arrays"):
        read_points(tmp_path / "several.npy")


def test_a_column_is_constant_if_the_training_points_are():
    other = np.random.default_rng(0).normal(size=(50, 1))
    with pytest.raises(DataError, match="memory: wanted columns that vary"):
        assemble_points("points", "memory", np.full((50, 1), 3.0), other, other)
    assert assemble_points("points", "memory", other, np.ones((5, 1)), other).dim == 1
