"""Downloads by pooch, which checks SHA-256 sums and keeps the files."""

import contextlib
import threading
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from planar_vae_jax.data._errors import DataError, Unavailable, brief

CONNECT_SECONDS = 3.0
READ_SECONDS = 30.0  # without a byte
ANSWER_SECONDS = 8.0  # until the server begins to answer; the look-up of its name has no time-out of its own


def download(name: str, url: str, files: Iterable[tuple[str, str]], data_dir: Path | None) -> dict[str, Path]:
    """The files of a data set, from the folder of earlier downloads or from the network.

    Args:
        name: of the data set, and of the folder for its files.
        url: the address that the files' names are appended to.
        files: pairs of a file's name and its SHA-256 sum.
        data_dir: the folder that holds the data set's folder; by default pooch's cache for this package.

    Returns:
        The path of each file by its name. Each file has its SHA-256 sum.

    Raises:
        Unavailable: a file cannot be downloaded. Without a network this takes seconds.
        DataError: a file of an earlier download is damaged, and cannot be downloaded again.
    """
    try:
        import pooch
    except ImportError as error:
        raise Unavailable(f"no download without pooch: {brief(error)}") from error
    pooch.get_logger().setLevel("WARNING")
    folder = (data_dir or Path(pooch.os_cache("planar_vae_jax"))) / name
    if str(folder).startswith("~"):  # a user without a home folder
        raise Unavailable("no home folder for downloads, and no data_dir was given")
    paths = {}
    for file, sha256 in files:
        path = folder / file
        damaged = False
        try:
            if path.is_file():
                damaged = pooch.file_hash(str(path)) != sha256
            if damaged or not path.is_file():
                _retrieve(url + file, sha256, path)
        except Exception as error:  # requests, urllib3, the file system and pooch each raise their own
            with contextlib.suppress(OSError):
                folder.rmdir()  # pooch made it; only an empty folder is removed
            reason = _reason(error, url)
            if damaged:
                raise DataError(f"{path} is damaged, delete it; it cannot be downloaded again: {reason}") from error
            raise Unavailable(f"the download to {folder} failed: {reason}") from error
        paths[file] = path
    return paths


def _retrieve(url: str, sha256: str, path: Path) -> None:
    """Downloads one file. Gives up if the server has not begun to answer after ANSWER_SECONDS."""
    import pooch

    answered, given_up = threading.Event(), threading.Event()
    responses: list[Any] = []
    failures: list[Exception] = []

    def on_response(response: Any, *_: Any, **__: Any) -> None:
        responses.append(response)
        if given_up.is_set():
            raise TimeoutError("the answer came too late")
        answered.set()

    def work() -> None:
        try:
            timeout = (CONNECT_SECONDS, READ_SECONDS)
            downloader = pooch.HTTPDownloader(timeout=timeout, hooks={"response": on_response})
            pooch.retrieve(url, f"sha256:{sha256}", fname=path.name, path=path.parent, downloader=downloader)
        except Exception as error:
            failures.append(error)
        for response in responses:  # pooch leaves that of a failed download open
            response.close()
        answered.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    if not answered.wait(ANSWER_SECONDS):
        given_up.set()
        raise TimeoutError(f"no answer from {urllib.parse.urlsplit(url).hostname} in {ANSWER_SECONDS:g} s")
    thread.join()
    if failures:
        raise failures[0]


def _reason(error: Exception, url: str) -> str:
    """Why a download failed, without the long texts of failed connections."""
    import requests

    if isinstance(error, requests.ConnectionError | requests.Timeout):
        return f"{urllib.parse.urlsplit(url).hostname} cannot be reached ({type(error).__name__})"
    return str(error) if isinstance(error, TimeoutError) else brief(error)
