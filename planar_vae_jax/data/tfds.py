"""TFDS's data sets without TensorFlow: what it prepared as array_record, and the files that it registers."""

import io
import json
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from planar_vae_jax.data.dataset import Dataset, assemble
from planar_vae_jax.data.errors import DataError, Unavailable, brief, joined
from planar_vae_jax.data.places import is_file, tfds_folders

PROBE_SECONDS = 5.0


def load_prepared(name: str, data_dir: Path | None) -> Dataset:
    """What TFDS wrote as array_record, in its shuffled order."""
    roots = tfds_folders(data_dir)
    reason = f"no prepared TFDS data set in {joined(roots, ' or ')}"
    for root in roots:
        for info in sorted((root / name).glob("[0-9]*/dataset_info.json"), reverse=True):
            file_format = _file_format(info)
            if file_format == "array_record":
                return _assemble_prepared(name, info.parent)
            reason = f"{info.parent} is {file_format}, which TFDS reads with TensorFlow only"
    raise Unavailable(reason)


def _file_format(info: Path) -> str:
    try:
        return str(json.loads(info.read_bytes()).get("fileFormat", "tfrecord"))
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{info} cannot be read: {brief(error)}") from error


def _assemble_prepared(name: str, path: Path) -> Dataset:
    try:
        arrays = _read_prepared(path)
    except ImportError as error:
        raise Unavailable(f"{path} cannot be read here: {brief(error)}") from error
    except Exception as error:  # TFDS, protobuf and array_record share no class for damage
        raise DataError(f"{path} is damaged, repair or delete it: {brief(error)}") from error
    if name == "binarized_mnist":  # its PNGs hold 0 and 1
        arrays = {field: (x > 0) * np.uint8(255) for field, x in arrays.items()}
    return assemble(name, f"TFDS prepared data set in {path}", arrays)


def _read_prepared(path: Path) -> dict[str, np.ndarray]:
    import tensorflow_datasets as tfds
    from PIL import Image

    arrays = {}
    builder = tfds.builder_from_directory(path)
    # Batched reads and PNGs decoded here: several times faster than a loop over the source.
    decoders = {"image": tfds.decode.SkipDecoding()}
    for split in builder.info.splits:
        source = builder.as_data_source(split=split, decoders=decoders)
        examples = source.__getitems__(range(len(source)))
        short = "valid" if split == "validation" else split
        arrays[f"x_{short}"] = np.stack([np.asarray(Image.open(io.BytesIO(e["image"]))) for e in examples])
        if "label" in examples[0]:
            arrays[f"y_{short}"] = np.array([e["label"] for e in examples], np.uint8)
    return arrays


def registered(name: str) -> dict[str, Any]:
    """``{url: UrlInfo(size, checksum, filename)}``, read without a builder."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import checksums

    package = Path(tfds.__file__).parent
    path = package / "datasets" / name / "checksums.tsv"
    path = path if path.exists() else package / "url_checksums" / f"{name}.txt"
    infos: dict[str, Any] = checksums.load_url_infos(path)
    return infos


def fetch(name: str, data_dir: Path | None) -> tuple[Path, dict[Path, Any]]:
    """The registered files, from TFDS's cache or by its DownloadManager.

    Returns:
        The folder that has them, and ``{path: UrlInfo}``. Nothing in the cache has been hashed.
    """
    try:
        infos = registered(name)
    except ImportError as error:
        raise Unavailable(f"no TFDS download: {brief(error)}") from error
    roots = tfds_folders(data_dir)
    for root in roots:
        paths = {cached(root, name, url, info.checksum): info for url, info in infos.items()}
        if all(map(is_file, paths)):
            return root, paths
    downloaded = _download(name, roots[0], infos)
    return roots[0], {path: infos[url] for url, path in downloaded.items()}


def cached(root: Path, name: str, url: str, sha256: str) -> Path:
    """Where TFDS keeps a download."""
    from tensorflow_datasets.core.download import resource

    return root / "downloads" / name / str(resource.get_dl_fname(url, sha256))


def _download(name: str, root: Path, infos: Mapping[str, Any]) -> dict[str, Path]:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader

    probe(next(iter(infos)))  # one host has all the files of a data set
    tfds.disable_progress_bar()
    downloader.MAX_RETRIES = 2  # its ten, with growing pauses between, take 205 s to give up
    try:
        manager = tfds.download.DownloadManager(
            download_dir=root / "downloads",
            dataset_name=name,
            url_infos=dict(infos),
            force_checksums_validation=True,
        )
        paths = manager.download({url: url for url in infos})
    except Exception as error:  # requests, urllib3, the file system and TFDS each raise their own
        raise Unavailable(f"the TFDS download to {root} failed: {brief(error)}") from error
    return {url: Path(path) for url, path in paths.items()}


def probe(url: str) -> None:
    """Raises Unavailable within PROBE_SECONDS where the URL's host takes no connection.

    TFDS sets no time limit: without a network it tries for minutes. Behind a proxy this machine need not reach
    the host, so nothing is asked.
    """
    parts = urllib.parse.urlsplit(url)
    if {parts.scheme, "all"} & urllib.request.getproxies().keys():
        return
    error = _connect(parts.hostname or "", parts.port or {"http": 80, "https": 443}[parts.scheme])
    if error is not None:
        raise Unavailable(f"no TFDS download: {parts.hostname} not reached ({brief(error)})")


def _connect(host: str, port: int) -> OSError | None:
    """What went wrong, if anything did. The thread bounds what a socket's timeout does not: the look-up of the name,
    and the sum over a host's addresses."""
    answers: list[OSError | None] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
            answers.append(None)
        except OSError as error:
            answers.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers[0] if answers else TimeoutError(f"no answer in {PROBE_SECONDS:g} s")
