"""What TFDS prepared or registers, with its own code against a server of our own. TensorFlow is not needed."""

import importlib.resources
import importlib.util
import io
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from data_samples import (
    AMAT,
    IDX,
    amat_files,
    as_dataset,
    assert_same,
    assert_valid,
    binary,
    connect,
    digits,
    error_of,
    gz,
    idx_files,
    no_warning,
    serve,
    to_idx,
    write_gz,
)

from planar_vae_jax.data import DataError, Dataset, load, load_dataset, tfds

pytestmark = pytest.mark.usefixtures("offline")


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
    root = Path(tfds.__file__).parents[2]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def registered_by(base: str, directory: Path):
    """Stands for tfds.registered: the files of `directory`, at `base`, with their true checksums."""
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
            patch.setattr(tfds, "registered", registered_by(base, site))
            patch.setattr(tfds, "tfds_folders", lambda d: [d or offline])
            patch.setattr(socket, "create_connection", connect)
            dataset = load_dataset(name, data_dir, warn=no_warning)
            assert len(asked) == len(list(site.iterdir()))
            patch.undo()
            patch.setattr(tfds, "registered", registered_by(base, site))
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
        monkeypatch.setattr(tfds, "registered", lambda name: infos)
        monkeypatch.setattr(socket, "create_connection", connect)
        file = site / f"{IDX[0]}.gz"
        if fault == "other bytes":
            file.write_bytes(gz(b"another file"))
        elif fault == "not found":
            file.unlink()
        else:
            (offline / "downloads").touch()
        message = error_of("mnist")
        monkeypatch.setattr(load, "load_mnist5k", lambda: as_dataset(digits()))
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
    monkeypatch.setattr(tfds, "registered", lambda name: infos)
    (offline / "downloads" / "mnist").mkdir(parents=True)
    for url, info in infos.items():
        shutil.copy(tmp_path / info.filename, tfds.cached(offline, "mnist", url, info.checksum))
    assert_same(load_dataset("mnist"), digits())
    damaged = tfds.cached(offline, "mnist", base + f"{IDX[1]}.gz", infos[base + f"{IDX[1]}.gz"].checksum)
    damaged.write_bytes(gz(to_idx(digits()["y_train"][::-1])))
    for name in ("mnist", "auto"):
        assert f"{damaged} is damaged, delete it" in error_of(name)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist", "binarized_mnist"])
def test_registered_files_are_the_ones_that_we_read(name):
    infos = tfds.registered(name)
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
    monkeypatch.setattr(tfds, "PROBE_SECONDS", 0.05)

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
    tfds.probe("https://storage.googleapis.com/x")
    with pytest.raises(DataError, match=r"codh\.rois\.ac\.jp not reached"):
        tfds.probe("http://codh.rois.ac.jp/x")  # that proxy is for https only
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    tfds.probe("http://codh.rois.ac.jp/x")
