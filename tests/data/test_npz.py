"""A user's own images, on whatever scale they were saved."""

import errno
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_samples import IMAGES, assert_same, digits, error_of, flipped

from planar_vae_jax.data import DataError, load_dataset, read_images

pytestmark = pytest.mark.usefixtures("offline")


def test_npz(tmp_path):
    arrays = digits(size=(5, 7))
    arrays["y_train"] = arrays["y_train"].astype(np.int64)
    arrays["x_valid"] = arrays["x_test"][:3]
    path = tmp_path / "mine.npz"
    np.savez_compressed(path, notes="anything else is left alone", **arrays)
    dataset = load_dataset(str(path), tmp_path)
    assert_same(dataset, arrays)
    assert (dataset.name, dataset.source) == ("mine", str(path))
    np.savez(path, x_train=arrays["x_train"], x_test=arrays["x_test"])
    assert_same(load_dataset(str(path)), {field: arrays[field] for field in ("x_train", "x_test")})


NAN = np.full((30, 28, 28), np.nan, np.float32)
# what replaces or (None) removes arrays, the array that the message must name, what it must say
NPZ_FAULTS = {
    "no x_train": ({"x_train": None}, "", r"wanted x_train, got only y_train, x_test, y_test"),
    "no x_test": ({"x_test": None}, "", r"wanted x_test, got only x_train, y_train, y_test"),
    "flat": (
        {"x_train": IMAGES.reshape(30, 784)},
        "x_train",
        r"wanted images \[N, H, W\].*\[30, 784\] uint8",
    ),
    "colours beside grey": (
        {"x_test": np.stack([IMAGES] * 3, -1)},
        "x_test",
        r"wanted \[N, 28, 28\] as in x_train, got \[30, 28, 28, 3\] uint8",
    ),
    "four channels": ({"x_train": np.stack([IMAGES] * 4, -1)}, "x_train", r"\[N, H, W, 3\].*got \[30, 28, 28, 4\]"),
    "an axis more": ({"x_train": np.stack([IMAGES] * 3, -1)[None]}, "x_train", r"got \[1, 30, 28, 28, 3\]"),
    "grey levels as floats": (
        {"x_train": IMAGES.astype(np.float32)},
        "x_train",
        r"float32 from 0 to 255: save x\.astype\(numpy\.uint8\) instead",
    ),
    "floats to 16": ({"x_test": IMAGES / 255 * 16}, "x_test", r"float64 from 0 to 16: save x / 16 instead"),
    "floats from -1": ({"x_test": IMAGES / 127.5 - 1}, "x_test", r"float64 from -1 to 1: scale them to 0 to 1 instead"),
    "floats above 255": ({"x_train": IMAGES * 2.0}, "x_train", r"from 0 to 510: scale them to 0 to 1 instead"),
    "infinite": ({"x_train": np.where(IMAGES > 250, np.inf, 0.5)}, "x_train", r"float64 with infinite values"),
    "negative": ({"x_test": IMAGES.astype(np.int64) - 1}, "x_test", r"int64 from -1 to 254: scale them to 0 to 255"),
    "above 255": ({"x_test": IMAGES.astype(np.uint16) * 257}, "x_test", r"uint16 from 0 to 65535: scale them"),
    "complex": ({"x_test": IMAGES * 1j}, "x_test", r"uint8.*got \[30, 28, 28\] complex128$"),
    "constant": ({"x_train": np.full_like(IMAGES, 7)}, "x_train", r"got the same grey level 7 in every pixel"),
    "constant test": ({"x_test": np.zeros_like(IMAGES[:20])}, "x_test", r"the same grey level 0"),
    "constant floats": ({"x_train": IMAGES * 0}, "x_train", r"the same grey level 0"),
    "nan": ({"x_train": NAN}, "x_train", r"got \[30, 28, 28\] float32 with NaN values"),
    "no images": ({"x_train": IMAGES[:0]}, "x_train", r"N > 0, got \[0, 28, 28\]"),
    "no pixels": ({"x_train": IMAGES[:, :0]}, "x_train", r"got \[30, 0, 28\]"),
    "sizes": (
        {"x_test": IMAGES[:, :27]},
        "x_test",
        r"wanted \[N, 28, 28\] as in x_train, got \[30, 27, 28\]",
    ),
    "valid size": ({"x_valid": IMAGES[:, :27]}, "x_valid", r"wanted \[N, 28, 28\] as in x_train"),
    "labels short": ({"y_train": np.arange(29)}, "y_train", r"wanted \[30\] labels.*got \[29\] int64"),
    "labels one-hot": (
        {"y_train": np.eye(30, dtype=int)},
        "y_train",
        r"wanted \[30\] labels.*got \[30, 30\]",
    ),
    "labels float": (
        {"y_test": np.zeros(20)},
        "y_test",
        r"wanted \[20\] labels, integers, got \[20\] float64",
    ),
    "labels bool": ({"y_test": np.zeros(20, bool)}, "y_test", r"wanted .*integers, got \[20\] bool"),
    "labels nan": ({"y_test": np.full(20, np.nan)}, "y_test", r"got \[20\] float64 with NaN values"),
    "excess": ({"x_test": np.clip(IMAGES / 255, 0, 1) * (1 + 3e-6)}, "x_test", r"from 0 to 1\.000003: save"),
    "labels alone": ({"y_valid": np.arange(3)}, "y_valid", r"labels without images x_valid"),
    "objects": ({"x_train": np.array([1, "a"], object)}, "x_train", r"cannot be read: .*allow_pickle=False"),
}


@pytest.mark.parametrize("case", NPZ_FAULTS)
def test_faulty_npz_names_file_and_array(tmp_path, case):
    changes, field, expected = NPZ_FAULTS[case]
    path = tmp_path / "mine.npz"
    np.savez(path, **{key: value for key, value in (digits() | changes).items() if value is not None})
    message = error_of(str(path))
    assert message.startswith(f"{path}: {field}")
    assert re.search(expected, message), message


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "npy", "member"])
def test_damaged_npz_is_named(tmp_path, damage):
    path = tmp_path / "mine.npz"
    np.savez(path, **digits())
    whole = path.read_bytes()
    if damage == "npy":
        with path.open("wb") as file:
            np.save(file, IMAGES)
    elif damage == "member":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("x_train", "no array")
    else:
        kinds = {"empty": b"", "text": b"x,y", "cut": whole[: len(whole) // 2], "flipped": flipped(whole)}
        path.write_bytes(kinds[damage])
    assert error_of(str(path)).startswith(str(path))


@pytest.mark.parametrize("read", [load_dataset, lambda place: read_images(place, (28, 28), print)])
def test_a_file_that_may_not_be_read_is_told_with_the_systems_reason(tmp_path, monkeypatch, read):
    path = tmp_path / "mine.npz"
    np.savez(path, **digits())

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    with pytest.raises(DataError, match=r"^\S*mine\.npz cannot be read: Permission denied$"):
        read(str(path))


def test_npz_never_unpickles(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    path = tmp_path / "mine.npz"
    np.savez(path, **digits() | {"y_train": np.array([Bomb()] * 30)})
    assert "mine.npz: y_train cannot be read" in error_of(str(path))
    assert not (tmp_path / "exploded").exists()


# --- Other scales and axes ---

GREY, FIELDS = IMAGES[:20], ("x_train", "x_test")
COLOUR = np.stack([GREY, GREY // 2, 255 - GREY], -1)
# what is saved -> what is read, and what is said of it
OTHERWISE_SAVED = {
    "float64": (GREY / 255, GREY, r"^\[N, H, W\] float64 taken as \[N, H, W\] uint8, 255 times what came, rounded$"),
    "float32": (GREY.astype(np.float32) / 255, GREY, r"^\[N, H, W\] float32 taken as .*rounded$"),
    "float16": ((GREY / 255).astype(np.float16), GREY, r"^\[N, H, W\] float16 taken as .*rounded$"),
    "a hair above 1": (GREY * ((1 + 1e-7) / 255), GREY, r"^\[N, H, W\] float64 taken as .*rounded$"),
    "bool": (GREY > 99, (GREY > 99) * np.uint8(255), r"^\[N, H, W\] bool taken as .*uint8, 255 times what came"),
    "int64": (GREY.astype(np.int64), GREY, r"^\[N, H, W\] int64 taken as \[N, H, W\] uint8$"),
    "big-endian": (GREY.astype(">u2"), GREY, r"^\[N, H, W\] >?uint16 taken as \[N, H, W\] uint8$|>u2 taken"),
    "last axis": (GREY[..., None], GREY, r"^\[N, H, W, 1\] uint8 taken as \[N, H, W\] uint8$"),
    "first axis": (GREY[:, None], GREY, r"^\[N, 1, H, W\] uint8 taken as \[N, H, W\] uint8$"),
    "torch tensors": ((GREY / 255).astype(np.float32)[:, None], GREY, r"^\[N, 1, H, W\] float32 taken as .*rounded$"),
    "colours": (COLOUR / 255, COLOUR, r"^\[N, H, W, 3\] float64 taken as \[N, H, W, 3\] uint8, 255 times"),
    "colours first": (np.moveaxis(COLOUR, 3, 1), COLOUR, r"^\[N, 3, H, W\] uint8 taken as \[N, H, W, 3\] uint8$"),
    "0 and 1": (
        GREY // 128,
        GREY // 128,
        r"^nearly black: their maximum is 1, where 255 is white\. If 1 was meant .*multiply by 255 // 1 = 255 before",
    ),
    "0 to 16": (
        (GREY // 16 + (GREY > 250)).astype(np.int64),
        GREY // 16 + (GREY > 250),
        r"^\[N, H, W\] int64 taken as .*; nearly black: their maximum is 16, .*255 // 16 = 15 before",
    ),
    "divided twice": (GREY / 255 / 16, np.rint(GREY / 16), r"taken as .*; nearly black: .* 0\.0625, where 1 is white"),
}


@pytest.mark.parametrize("case", OTHERWISE_SAVED)
def test_other_scales_and_axes_are_taken_and_said_in_one_line(tmp_path, case):
    saved, expected, said = OTHERWISE_SAVED[case]
    path = tmp_path / "mine.npz"
    plain = COLOUR if expected.ndim == 4 else GREY
    np.savez(path, x_train=saved, x_test=saved, x_valid=plain)
    lines = []
    dataset = load_dataset(str(path), warn=lines.append)
    assert_same(dataset, {"x_train": expected, "x_test": expected, "x_valid": plain})
    (line,) = lines  # nothing about x_valid
    opening = f"{path}: x_train, x_test: "
    assert line.startswith(opening)
    assert re.search(said, line[len(opening) :]), line


def test_a_split_on_a_scale_of_its_own_is_told(tmp_path):
    np.savez(tmp_path / "mine.npz", x_train=GREY, x_test=GREY // 255)
    with pytest.warns(UserWarning, match=r"mine\.npz: x_test: nearly black"):
        load_dataset(str(tmp_path / "mine.npz"))


def test_digits_of_scikit_learn(tmp_path):
    """0 to 16 in float64: refused with what to do; in integers: taken with a warning that names the cure."""
    images = pytest.importorskip("sklearn.datasets").load_digits().images
    path = tmp_path / "digits.npz"
    np.savez(path, x_train=images[:1500], x_test=images[1500:])
    assert "from 0 to 16: save x / 16 instead" in error_of(str(path))
    np.savez(path, x_train=images[:1500].astype(np.uint8), x_test=images[1500:].astype(np.uint8))
    with pytest.warns(UserWarning, match=r"x_train, x_test: .*maximum is 16.*multiply by 255 // 16 = 15"):
        assert load_dataset(str(path)).x_train.shape == (1500, 8, 8)
