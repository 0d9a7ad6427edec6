"""What a run prints fits 80 columns; each end of a process has its status and its line."""

import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import pytest

from planar_vae_jax.runs import console
from planar_vae_jax.runs._files import RunError
from planar_vae_jax.runs._signals import Stopped
from planar_vae_jax.runs.config import UsageError
from planar_vae_jax.runs.console import Progress, table, warn

# --- Figures


def test_a_table_of_many_columns_is_broken_into_blocks_of_80():
    names = ("free_energy", "nll", "reconstruction", "kl", "squared_error", "effective_sample_size")
    row = dict.fromkeys(names, 123.456) | {f"{name}_se": 0.4567 for name in names} | {"images": 10000}
    rows = dict.fromkeys(("all", *map(str, range(10))), row)
    text = table(rows, ("images", *names))
    blocks = [block.splitlines() for block in text.split("\n\n")]
    assert max(len(line) for block in blocks for line in block) <= 80
    assert all(len(block) == 12 for block in blocks)
    assert all(block[1].split()[0] == "all" for block in blocks)
    assert text.count("123.46 ± 0.46") == 6 * 11
    assert text.count("10000") == 11
    for name in names:
        assert name.replace("_", " ") in text
    for block in blocks:
        assert len({len(line) for line in block}) == 1  # columns stand under one another


def test_warnings_are_wrapped(capsys):
    warn("one: " + "word " * 40 + "\n  two")
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) < 80
    assert lines[1].startswith("one: word word")
    assert lines[-2] == "  two"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_the_bar_is_readable_at_80_columns(monkeypatch, unit):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    with Progress(1500, unit, 30) as progress:
        progress.update(60, {"loss": 99.123, "validation_loss": 102.4321, "nothing": None})
        progress.update(90, {"train_loss": 198.123, "validation_loss": 101.4321, "validation_loss_se": 1.234})
        warn("something")
    frames = terminal.getvalue().replace("\n", "\r").split("\r")
    last = [frame for frame in frames if f"{unit} 90/1500" in frame][-1]
    assert len(last) <= 80
    assert "train 198.1, validation 101.4 ± 1.2" in last
    assert "|" in last
    assert any(frame.rstrip("\x1b[A ") == "something" for frame in frames)  # on a line of its own
    assert terminal.getvalue().endswith("\n")  # what is said next too


def test_without_a_terminal_each_update_is_a_line(capsys):
    with Progress(5, "epoch", 1) as progress:
        progress.update(2, {"loss": 1.23456})
    assert capsys.readouterr().out == "epoch 2/5: loss 1.235\n"


# --- The end of a process


@pytest.fixture
def run_main(monkeypatch):
    """``run_main`` without what it changes in the whole process: the handling of signals, the cache of programs."""
    for name in ("install", "ignore"):
        monkeypatch.setattr(console._signals, name, lambda: None)
    monkeypatch.setattr(console, "_keep_programs", lambda: None)
    return console.run_main


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (None, None, ""),
        (UsageError("--seed must"), 2, "error: --seed must\n"),
        (RunError("not finite"), 1, "error: not finite\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (Stopped(15, "after epoch 3"), 143, "stopped by SIGTERM after epoch 3; "),
        (Stopped(2, "after epoch 3"), 130, "stopped by Ctrl-C after epoch 3; "),
        (MemoryError("big"), 1, "error: out of memory; try smaller sizes (big)\n"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x\ny"), 1, "error: out of memory; try smaller"),
    ],
    ids=str,
)
def test_each_end_has_its_status_and_its_line(run_main, monkeypatch, capsys, error, status, text):
    def main(argv):
        assert argv == ["--seed=1"]
        if error is not None:
            raise error

    monkeypatch.setattr(sys, "argv", ["run", "--seed=1"])
    if status is None:
        run_main(main)
    else:
        with pytest.raises(SystemExit) as ended:
            run_main(main)
        assert ended.value.code == status
    err = capsys.readouterr().err
    assert err.startswith(text)
    assert err.count("\n") == bool(text)


def test_a_character_that_the_terminal_lacks_ends_nothing(run_main, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    run_main(lambda argv: print("1.0 ± 0.1", flush=True))
    assert out.buffer.getvalue() == b"1.0 ? 0.1\n"


def test_a_bug_keeps_its_traceback(run_main):
    def main(argv):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError):
        run_main(main)


# --- Compiled programs


@pytest.fixture
def kept(monkeypatch):
    """``kept(**environment)``: JAX's folder of programs and its greatest size, as a run sets them."""
    before = {name: getattr(jax.config, name) for name in CACHE}

    def get(**environment):
        for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        for name, value in CACHE.items():
            jax.config.update(name, value)
        console._keep_programs()
        return tuple(getattr(jax.config, name) for name in CACHE)

    yield get
    for name, value in before.items():
        jax.config.update(name, value)


CACHE = {"jax_compilation_cache_dir": None, "jax_compilation_cache_max_size": -1}


def test_programs_are_kept_in_a_folder_of_bounded_size(tmp_path, kept):
    folder = tmp_path / "planar_vae_jax" / "programs"
    folder.mkdir(parents=True)
    for name in ("whole-cache", "whole-atime", "killed-cache"):
        (folder / name).touch()
    assert kept(XDG_CACHE_HOME=tmp_path) == (str(folder), 2**29)
    assert sorted(os.listdir(folder)) == ["whole-atime", "whole-cache"]
    assert kept(HOME=tmp_path) == (str(tmp_path / ".cache" / "planar_vae_jax" / "programs"), 2**29)


def test_a_folder_that_the_user_names_is_left_to_jax(tmp_path, kept):
    assert kept(JAX_COMPILATION_CACHE_DIR="/named", HOME=tmp_path) == (None, -1)  # JAX has read the variable itself
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_no_error(kept):
    assert kept(XDG_CACHE_HOME="/proc/none") == (None, -1)


NOBODY = """
import os, sys, jax
from planar_vae_jax.runs.console import _keep_programs as keep_programs
os.environ.pop("HOME", None)
os.setuid(54321)
keep_programs()
os.environ["XDG_CACHE_HOME"] = sys.argv[1]
keep_programs()
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's place")
def test_without_a_home_or_in_another_users_folder_nothing_is_kept():
    """The other user's folder exists, as sudo or a container leaves it; the user has no entry in the list of users."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "planar_vae_jax" / "programs"
        folder.mkdir(parents=True)
        for path in (folder, folder.parent, Path(place)):
            path.chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        command = [sys.executable, "-c", NOBODY, place]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
