"""Downloads from a server of our own, and what is said without a network."""

import hashlib
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from data_samples import (
    AMAT,
    IDX,
    amat_files,
    as_dataset,
    assert_same,
    binary,
    digits,
    error_of,
    gz,
    idx_files,
    no_warning,
    serve,
    to_idx,
    write_gz,
)

from planar_vae_jax.data import _download, load_dataset, sources
from planar_vae_jax.data.sources import _File, _Named

pytestmark = pytest.mark.usefixtures("offline")
NAMES = ("mnist", "fashion_mnist", "kmnist", "binarized_mnist")


def register(monkeypatch, name: str, site: Path, base: str) -> None:
    """The files of `site` are those of the data set, at `base`, with their true sums."""
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in site.iterdir()}
    files = tuple(file._replace(sha256=sums[file.name]) for file in sources._NAMED[name].files)
    monkeypatch.setitem(sources._NAMED, name, sources._NAMED[name]._replace(url=base, files=files))


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    return write_gz(folder, idx_files(digits()))


@pytest.mark.parametrize("name", ["mnist", "auto", "kmnist", "binarized_mnist"])
def test_download_then_no_network(site, tmp_path, offline, monkeypatch, capfd, name):
    arrays = binary(7, 3, 5) if name == "binarized_mnist" else digits()
    for file, raw in amat_files(binary(7, 3, 5)).items():
        (site / file).write_bytes(raw)
    home = tmp_path / "home"
    home.mkdir()
    real = "mnist" if name == "auto" else name
    for data_dir in (None, home):
        with serve(site) as (base, asked):
            register(monkeypatch, real, site, base)
            dataset = load_dataset(name, data_dir, warn=no_warning)
            count = len(asked)
        again = load_dataset(name, data_dir, warn=no_warning)  # the server is gone
        assert count == len(arrays)
        for one in (dataset, again):
            assert_same(one, arrays)
            assert one.name == real
            assert one.source.startswith(f"download in {(data_dir or offline) / real}")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fault", ["other bytes", "not found", "no directory"])
def test_failed_download(site, offline, monkeypatch, fault):
    with serve(site) as (base, _):
        register(monkeypatch, "mnist", site, base)
        file = site / f"{IDX[0]}.gz"
        if fault == "other bytes":
            file.write_bytes(gz(b"another file"))
        elif fault == "not found":
            file.unlink()
        else:
            (offline / "mnist").touch()
        message = error_of("mnist")
        monkeypatch.setattr(sources, "_load_mnist5k", lambda: as_dataset(digits()))
        warnings = []
        load_dataset("auto", warn=warnings.append)
    expected = {"other bytes": "SHA256 hash", "not found": "404", "no directory": "Not a directory"}[fault]
    assert f"the download to {offline / 'mnist'} failed" in message
    assert expected in message
    assert expected in warnings[0]


def test_a_damaged_download_is_fetched_again_or_named(site, offline, monkeypatch):
    damaged = offline / "mnist" / f"{IDX[1]}.gz"
    for repaired in (True, False):
        with serve(site) as (base, asked):
            register(monkeypatch, "mnist", site, base)
            load_dataset("mnist")
            damaged.write_bytes(gz(to_idx(digits()["y_train"][::-1])))
            if repaired:
                assert_same(load_dataset("mnist"), digits())
                assert asked.count(f"/{damaged.name}") == 2
                damaged.unlink()
    for name in ("mnist", "auto"):  # the server is gone
        assert f"{damaged} is damaged, delete it; it cannot be downloaded again: 127.0.0.1 cannot be" in error_of(name)


def test_a_new_data_set_is_one_entry(site, tmp_path, monkeypatch):
    """Of npz files: one with all arrays, or one for each array, on other scales too."""
    arrays = digits()
    np.savez(site / "all.npz", **arrays)
    np.savez(site / "train.npz", arrays["x_train"] / 255)
    np.savez(site / "test.npz", arrays["x_test"])
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in site.glob("*.npz")}
    lines = []
    with serve(site) as (base, _):
        whole = _Named(base, (_File(None, "all.npz", sums["all.npz"]),))
        parts = tuple(_File(f"x_{split}", f"{split}.npz", sums[f"{split}.npz"]) for split in ("train", "test"))
        monkeypatch.setitem(sources._NAMED, "whole", whole)
        monkeypatch.setitem(sources._NAMED, "parts", _Named(base, parts))
        monkeypatch.setattr(sources, "DATASETS", (*sources.DATASETS, "whole", "parts"))
        assert_same(load_dataset("whole", warn=no_warning), arrays)
        dataset = load_dataset("parts", warn=lines.append)
    assert_same(dataset, {field: arrays[field] for field in ("x_train", "x_test")})
    (line,) = lines
    assert "train.npz: x_train: [N, H, W] float64 taken as [N, H, W] uint8" in line
    assert load_dataset("parts", site, warn=lines.append).source == f"npz files in {site}"


@pytest.mark.parametrize("name", NAMES)
def test_the_table_has_the_files_that_tfds_registers(name):
    """Their addresses, and their SHA-256 sums."""
    package = Path(pytest.importorskip("tensorflow_datasets").__file__).parent
    table = package / "datasets" / name / "checksums.tsv"
    table = table if table.exists() else package / "url_checksums" / f"{name}.txt"
    theirs = {(url, sha256) for url, _, sha256, _ in (line.split("\t") for line in table.read_text().splitlines())}
    ours = sources._NAMED[name]
    assert {(ours.url + file.name, file.sha256) for file in ours.files} == theirs
    names = [file.name.removesuffix(".gz") for file in ours.files]
    assert sorted(names) == sorted(AMAT if name == "binarized_mnist" else IDX)


@pytest.mark.parametrize("name", NAMES)
def test_offline_is_told_at_once(offline, tmp_path, name):
    start = time.monotonic()
    message = error_of(name, tmp_path)
    assert time.monotonic() - start < 3
    for part in (str(tmp_path), "cannot be reached", "data_dir", "mnist5k", "[offline]"):
        assert part in message
    assert not any(tmp_path.iterdir())  # and leaves no empty directories behind
    error_of(name)
    assert not any(offline.iterdir())


def test_a_name_server_that_does_not_answer_is_given_up(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(_download, "ANSWER_SECONDS", 0.05)

    def wait(*args, **kwargs):
        over.wait(60)
        raise OSError("at last")

    monkeypatch.setattr(socket, "getaddrinfo", wait)
    start = time.monotonic()
    message = error_of("mnist")
    over.set()
    assert time.monotonic() - start < 3
    assert "no answer from storage.googleapis.com in 0.05 s" in message


def test_a_host_that_takes_no_connection_is_given_up(site, monkeypatch):
    """Its backlog is full: connections are neither taken nor refused."""
    monkeypatch.setattr(_download, "CONNECT_SECONDS", 0.1)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        address = server.getsockname()
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        register(monkeypatch, "mnist", site, f"http://127.0.0.1:{address[1]}/")
        start = time.monotonic()
        message = error_of("mnist")
        assert time.monotonic() - start < 3
        for one in waiting:
            one.close()
    assert "127.0.0.1 cannot be reached (ConnectTimeout)" in message
