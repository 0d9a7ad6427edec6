"""Images that a user has in files, for a trained model."""

import struct
import zlib

import numpy as np
import pytest
from data_samples import IMAGES as NOISE
from PIL import Image

from planar_vae_jax.data import DataError, read_images

FIGURE = np.zeros((8, 6), np.uint8)
FIGURE[2:6, 3:5] = FIGURE[2, 5] = 255


def read(place, shape=(8, 6), **options):
    """The images, and what was said of them."""
    lines = []
    return read_images(str(place), shape, lines.append, **options).pixels, lines


def refused(place, shape=(8, 6)) -> str:
    with pytest.raises(DataError) as caught:
        read_images(str(place), shape, lambda line: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ink(mode, level):
    """The figure drawn with a level of grey on a transparent page."""
    pixels = np.full((8, 6, len(mode)), level, np.uint8)
    pixels[..., -1] = FIGURE
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 3)], ids=["grey", "colour"])
@pytest.mark.parametrize(
    ("level", "expected", "said"), [(0, 255 - FIGURE, "taken as white"), (255, FIGURE, "taken as black")]
)
def test_transparency_is_put_where_the_drawing_stands_out(tmp_path, mode, shape, level, expected, said):
    ink(mode, level).save(tmp_path / "a.png")
    images, lines = read(tmp_path / "a.png", shape)
    np.testing.assert_array_equal(images[0] if len(shape) == 2 else images[0, ..., 1], expected)
    (line,) = lines
    assert line.startswith(f"{tmp_path / 'a.png'}: transparent pixels {said}")


def test_a_transparent_colour_of_a_palette(tmp_path):
    picture = Image.new("P", (6, 8))
    picture.putdata((FIGURE // 255).ravel().tolist())
    picture.putpalette([0, 0, 0, 40, 40, 40])
    picture.save(tmp_path / "a.png", transparency=0)
    images, (line,) = read(tmp_path / "a.png")
    np.testing.assert_array_equal(images[0], np.where(FIGURE == 255, 40, 255))
    assert "taken as white" in line


def test_alpha_that_covers_everything_is_not_mentioned(tmp_path):
    Image.fromarray(np.dstack([FIGURE] * 3 + [np.full_like(FIGURE, 255)])).save(tmp_path / "a.png")
    images, lines = read(tmp_path / "a.png")
    np.testing.assert_array_equal(images[0], FIGURE)
    assert lines == []


@pytest.mark.parametrize(
    ("orientation", "seen"),
    [(3, lambda x: np.rot90(x, 2)), (6, lambda x: np.rot90(x, -1)), (8, np.rot90), (2, np.fliplr)],
)
def test_a_picture_is_turned_as_its_exif_says(tmp_path, orientation, seen):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in "ab":
        Image.fromarray(FIGURE).save(tmp_path / f"{name}.png", exif=exif)
    images, lines = read(tmp_path / "*.png", seen(FIGURE).shape)
    np.testing.assert_array_equal(images, [seen(FIGURE)] * 2)
    assert lines == [f"{tmp_path / 'a.png'} and 1 more: turned as its EXIF orientation says"]


def test_a_picture_too_large_for_pillow(tmp_path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(b"\0")), chunk(b"IEND", b""))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert "a.png: wanted a picture, got DecompressionBombError" in refused(tmp_path / "a.png")


def test_what_is_neither_a_picture_nor_an_npz_file_names_the_cure(tmp_path):
    np.save(tmp_path / "x.npy", NOISE)
    assert "got an npy file; save numpy.savez('FILE.npz', x_test=images)" in refused(tmp_path / "x.npy")
    assert f"got a folder; for its pictures give {tmp_path}/*.png" in refused(tmp_path)
    assert refused(tmp_path / "no.png") == f"{tmp_path / 'no.png'}: no such file"


def test_an_npz_file_in_capitals(tmp_path):
    np.savez(tmp_path / "x.npz", x_test=NOISE)
    (tmp_path / "x.npz").rename(tmp_path / "X.NPZ")
    images, lines = read(tmp_path / "X.NPZ", (28, 28))
    np.testing.assert_array_equal(images, NOISE)
    assert lines == []


def test_brackets_in_a_path(tmp_path):
    folder = tmp_path / "run[1]"
    folder.mkdir()
    for name in ("a[2].png", "b.png"):
        Image.fromarray(FIGURE).save(folder / name)
    assert len(read(folder / "a[2].png")[0]) == 1
    assert len(read(folder / "*.png")[0]) == 2
    assert len(read(tmp_path / "run?1?" / "[b-c].png")[0]) == 1


def test_only_images_of_another_size_are_resized(tmp_path):
    """An even page keeps its level, and so do rows of a page of two halves that are far from its edge."""
    half = np.zeros((24, 30), np.uint8)
    half[12:] = 200
    for name, image in {"a": FIGURE, "b": np.full((16, 12), 7, np.uint8), "c": half}.items():
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    images, lines = read(tmp_path / "*.png", resize=True)
    np.testing.assert_array_equal(images[0], FIGURE)
    np.testing.assert_array_equal(images[1], 7)
    np.testing.assert_array_equal(images[2][[0, 1, 6, 7]], np.repeat(np.uint8([0, 0, 200, 200]), 6).reshape(4, 6))
    assert lines == ["2 of 3 images resized to 8 x 6 pixels, from 16 x 12, 24 x 30"]
    assert read(tmp_path / "a.png", resize=True)[1] == ["0 of 1 image resized to 8 x 6 pixels"]


def test_colours_are_resized_and_channels_are_not(tmp_path):
    colours = np.zeros((2, 16, 12, 3), np.uint8) + np.uint8([10, 20, 30])
    np.savez(tmp_path / "x.npz", x_test=colours)
    images, _ = read(tmp_path / "x.npz", (8, 6, 3), resize=True)
    np.testing.assert_array_equal(images, colours[:, :8, :6])
    with pytest.raises(DataError, match=r"wanted images of 8 x 6 pixels.*got 8 x 6 x 3$"):
        read(tmp_path / "x.npz", (8, 6), resize=True)


def test_black_on_white_becomes_white_on_black(tmp_path):
    np.savez(tmp_path / "x.npz", x_test=np.stack([255 - FIGURE, FIGURE // 2]))
    images, lines = read(tmp_path / "x.npz", invert=True)
    np.testing.assert_array_equal(images, [FIGURE, 255 - FIGURE // 2])
    assert lines == ["2 images inverted: black became white, and white black"]
