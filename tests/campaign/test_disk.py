"""A disk that is full or cannot be written: one line; the last whole checkpoint stays, and the run can be resumed.

Full in two ways: a small file system of its own, filled while the run writes (mounting needs root; elsewhere that is
skipped), and everywhere a limit on the size of files from one file of the run on: then too the kernel refuses each
write ("File too large" for "No space left on device").
"""

import contextlib
import os
import random
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import toy

from campaign.harness import MODULES, STRENGTH, Run, contents, finish, metrics, refuse, result, steps
from planar_vae_jax.runs import folder
from planar_vae_jax.runs.config import UsageError, parse_run

PAGES = ("reconstructions", "samples", "posteriors", "interpolations", "traversals", "aggregate", "loss", "classes")
FIGURES = [f"{page}.png" for page in PAGES]  # in the order they are drawn
PAGE = 4096  # what the small file system gives away at a time


def assert_told(run, words):
    """A run that could not write ends with one line."""
    assert run.end() == 1
    line = run.error()
    assert re.search(rf"^error: .*{words}", line), line
    assert re.search("No space left|File too large", line, re.IGNORECASE), line
    metrics(run.workdir)
    assert not list(run.workdir.rglob("*unfinished*"))


# --- No write at all from some file on, anywhere

LIMITED = Path(__file__).with_name("limited.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy", "mnist"])
def test_files_that_cannot_grow(data, whole, tally, tmp_path, name):
    workdir = tmp_path / "run"
    for file, nth, words in (
        ("config", 1, "config.json could not be written"),
        ("metrics", 3, "metrics.jsonl could not be written"),
        ("checkpoint", 2, f"a checkpoint could not be written to {workdir}"),
        ("reconstructions", 1, "reconstructions.png could not be written"),
        ("report", 1, "report.html could not be written"),
        ("summary", 1, "summary.json could not be written"),
    ):
        if (name, file) == ("toy", "reconstructions"):
            continue
        before = set(steps(workdir)) if (workdir / "checkpoints").exists() else set()
        run = Run(name, workdir, *data[name], program=(str(LIMITED), file, str(nth), MODULES[name]))
        assert_told(run, words)
        if before:
            assert max(before) <= max(steps(workdir))
        tally(f"no write from {file} on (limit, {name})", "one line, status 1, same end bit for bit")
    finish(name, workdir, *data[name])
    assert result(workdir) == whole(name)


# --- A small file system


@pytest.fixture
def disk(tmp_path):
    """A file system of 4 MB in a folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here; the limit on file sizes is tested in its stead")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk, pages=0):
    """Leaves so many free pages."""
    free = os.statvfs(disk).f_bavail - pages
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        for _ in range(free):
            file.write(b"x" * PAGE)


def pages(sizes):
    return sum(-(-size // PAGE) for size in sizes)


@pytest.mark.slow
def test_a_disk_full_in_training_then_in_the_figures_then_in_the_page(data, whole, tally, disk):
    workdir = disk / "run"
    figures = [len(whole("mnist")["figures"][name]) for name in FIGURES]
    cases = [
        (lambda run: run.lines() == 3, 0, "could not be written", "training"),
        (lambda run: run.said("test figures"), pages(figures[:-1]), r"classes\.png", "the figures"),
        (lambda run: run.said("test figures"), pages(figures), r"report\.html", "the page"),
    ]
    for moment, free, words, name in cases:
        run = Run("mnist", workdir, *data["mnist"])
        assert run.until(lambda moment=moment, run=run: moment(run))
        for figure in FIGURES:
            (workdir / figure).unlink(missing_ok=True)
        fill(disk, free)
        assert_told(run, words)
        assert steps(workdir)
        (disk / "filler").unlink()
        tally(f"disk full in {name} (tmpfs)", "one line, status 1, same end bit for bit")
    finish("mnist", workdir, *data["mnist"])
    assert result(workdir) == whole("mnist")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy", "mnist"])
@pytest.mark.parametrize("seed", range(STRENGTH))
def test_a_disk_filled_at_any_moment(data, whole, tally, disk, name, seed):
    rng, workdir = random.Random(seed), disk / "run"
    for _ in range(3):
        run = Run(name, workdir, *data[name])
        first = run.lines() + rng.randint(0, 3)
        run.until(lambda run=run, first=first: run.begun() and run.lines() >= first)
        fill(disk, rng.randint(0, 30))
        if run.process.wait() == 0:  # there was room enough
            break
        assert_told(run, "could not be|cannot|No space")
        (disk / "filler").unlink()
        tally(f"disk nearly filled at a random moment (tmpfs, {name})", "one line, status 1, same end bit for bit")
    (disk / "filler").unlink(missing_ok=True)
    finish(name, workdir, *data[name])
    assert result(workdir) == whole(name)


# --- A folder that cannot be written


@contextlib.contextmanager
def unprivileged():
    """As a user whom permissions bind, which root is not."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def open_run(workdir):
    with folder.open_run(parse_run(toy.Config, [f"--workdir={workdir}"], ""), "toy"):
        pass


@pytest.fixture
def open_folder():
    """A folder that anybody may enter and write into."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


@pytest.mark.parametrize("inner", ["", "run", "a/b"])
@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_folder_without_permission(open_folder, tally, inner, mode):
    closed = open_folder / "closed"
    closed.mkdir(mode=mode)
    with unprivileged():
        with pytest.raises(UsageError, match=r"Permission denied") as caught:
            open_run(closed / inner)
        assert re.search("--workdir must be a folder that can be written|config.json cannot be read", str(caught.value))
        open_run(open_folder / "run")  # it is the folder
    closed.chmod(0o777)
    assert not any(closed.iterdir())
    tally("workdir or its parent without permission", "one line, status 2")


def test_a_run_that_may_only_be_read_is_refused(open_folder, tally):
    open_run(open_folder)
    before = contents(open_folder)
    for path in (*open_folder.iterdir(), open_folder):
        path.chmod(0o555)
    with unprivileged(), pytest.raises(UsageError, match="--workdir must be a folder that can be written"):
        open_run(open_folder)
    assert contents(open_folder) == before
    open_folder.chmod(0o777)


def test_a_read_only_file_system(disk, tally):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for workdir in (disk, disk / "run"):
        refuse("toy", workdir, status=2, words=r"--workdir must be a folder .*Read-only file system")
    tally("read-only file system", "one line, status 2")


@pytest.mark.parametrize("where", ["file", "file/run", "\0", "x" * 300, "loop/run"])
def test_a_workdir_that_cannot_be_a_folder(tally, tmp_path, where):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="--workdir must be a folder that can be written") as caught:
        open_run(tmp_path / where)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"
    tally("workdir a file, under a file, an impossible name", "one line, status 2")


def test_a_workdir_in_proc_is_refused_by_the_command():
    refuse("toy", Path("/proc/run"), status=2, words="--workdir must be a folder that can be written")
