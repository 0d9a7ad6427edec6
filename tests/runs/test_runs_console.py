"""What a run says fits 80 columns; flags are read once, and each mistake is a line that names the flag."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import jax
import pytest
import toy

from planar_vae_jax.runs import compiled, console
from planar_vae_jax.runs.config import RunFlags, UsageError, default_workdir, flag, parse, parse_run
from planar_vae_jax.runs.console import Progress, table, warn
from planar_vae_jax.runs.files import RunError
from planar_vae_jax.runs.signals import Stopped

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
def test_each_end_has_its_status_and_its_line(monkeypatch, capsys, error, status, text):
    def main(argv):
        assert argv == ["--seed=1"]
        if error is not None:
            raise error

    monkeypatch.setattr(sys, "argv", ["run", "--seed=1"])
    for name in ("install", "ignore"):
        monkeypatch.setattr(console.signals, name, lambda: None)
    monkeypatch.setattr(compiled, "keep_programs", lambda: None)
    if status is None:
        console.run_main(main)
    else:
        with pytest.raises(SystemExit) as ended:
            console.run_main(main)
        assert ended.value.code == status
    err = capsys.readouterr().err
    assert err.startswith(text)
    assert err.count("\n") == bool(text)


def test_what_a_terminal_cannot_show_ends_nothing(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(console.signals, "install", lambda: None)
    monkeypatch.setattr(console.signals, "ignore", lambda: None)
    monkeypatch.setattr(compiled, "keep_programs", lambda: None)
    console.run_main(lambda argv: print("1.0 ± 0.1", flush=True))
    assert out.buffer.getvalue() == b"1.0 ? 0.1\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def main(argv):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    for name in ("install", "ignore"):
        monkeypatch.setattr(console.signals, name, lambda: None)
    monkeypatch.setattr(compiled, "keep_programs", lambda: None)
    with pytest.raises(jax.errors.JaxRuntimeError):
        console.run_main(main)


# --- Compiled programs

KEEP = """
import jax, sys
from planar_vae_jax.runs.compiled import keep_programs
keep_programs()
print(jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size)
"""


def kept(code=KEEP, **environment):
    names = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")
    base = {name: os.environ[name] for name in names if name in os.environ} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=base | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_programs_are_kept_in_a_folder_of_bounded_size(tmp_path):
    folder = tmp_path / "planar_vae_jax" / "programs"
    folder.mkdir(parents=True)
    for name in ("whole-cache", "whole-atime", "killed-cache"):
        (folder / name).touch()
    assert kept(XDG_CACHE_HOME=str(tmp_path)) == [str(folder), str(2**29)]
    assert sorted(os.listdir(folder)) == ["whole-atime", "whole-cache"]
    assert kept(JAX_COMPILATION_CACHE_DIR="/named", HOME=str(tmp_path)) == ["/named", "-1"]
    assert kept(XDG_CACHE_HOME="/proc/none") == ["None", "-1"]


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's place")
def test_without_a_home_folder_nothing_is_kept():
    # Imported before it becomes a user that the list of users does not know: Python may lie in a home folder.
    nobody = "import os; os.environ.pop('HOME', None); os.setuid(54321)\nkeep_programs()\n"
    assert kept(KEEP.replace("keep_programs()\n", nobody)) == ["None", "-1"]


# --- Flags


@dataclass(frozen=True)
class Config(RunFlags):
    flows: int = flag(5, "layers", at_least=0, at_most=100, named=True)
    rate: float = flag(1e-3, "of learning", above=0.0)
    optimizer: str = flag("new", "which", choices=("new", "adam"), default_before="adam")
    classes: tuple[int, ...] | None = flag(None, "labels", at_least=0)
    binary: bool = flag(False, "whether")
    data_dir: str | None = flag(None, "folder", resumable=True)


def test_flags_become_a_config():
    argv = ["--flows=7", "--rate=0.5", "--classes=3,8", "--binary", "--workdir=x"]
    assert parse(Config, argv, "") == Config(workdir="x", flows=7, rate=0.5, classes=(3, 8), binary=True)
    assert parse(Config, [], "", {"flows": 3, "classes": [1]}) == Config(flows=3, classes=(1,))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--flows=-1", "--flows must be at least 0; got -1"),
        ("--flows=101", "--flows must be at most 100; got 101"),
        ("--flows=two", "--flows must be a whole number; got 'two'"),
        ("--flows=2.5", "--flows must be a whole number; got '2.5'"),
        ("--rate=fast", "--rate must be a number; got 'fast'"),
        ("--overwrite=perhaps", "--overwrite must be true or false; got 'perhaps'"),
        ("--nooverwrite=3", "--nooverwrite=3 does not take an argument"),
        ("--workdir=", "--workdir must be a folder; got ''"),
        ("--rate=0", "--rate must be greater than 0; got 0.0"),
        ("--rate=nan", "--rate must be a finite number; got nan"),
        ("--optimizer=sgd", "--optimizer must be one of new, adam; got 'sgd'"),
        ("--classes=1,x", "--classes must be whole numbers joined by commas; got '1,x'"),
        ('--classes="', "--classes must be whole numbers joined by commas; got '\"'"),
        ("--classes=-1", "--classes must be at least 0; got -1"),
        ("--unknown=1", "unknown"),
        ("stray", "every argument is a flag, --name=value; got 'stray'"),
        ("--flagfile=/nowhere", "flagfile: "),
        ("--flagfile=/bin/sh", "--flagfile: "),
        ("--keep=0", "--keep must be at least 1; got 0"),
    ],
)
def test_a_wrong_flag_is_told_in_a_line(argv, words):
    with pytest.raises(UsageError) as caught:
        parse_run(Config, [argv], "")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_prints_the_doc_and_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Config, ["--help"], "What it does.")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("What it does.")
    assert all(f"--{'[no]' * (field.type is bool)}{field.name}" in out for field in dataclasses.fields(Config))


def test_a_run_without_a_workdir_is_named_after_what_makes_it_another_run():
    assert default_workdir(Config(), "mnist") == "runs/mnist-flows=5"
    config = Config(classes=(3, 8), data_dir="/x", keep=7, rate=0.5, binary=True)
    assert default_workdir(config, "mnist") == "runs/mnist-flows=5-rate=0.5-classes=3,8-binary=True"
    assert parse_run(Config, ["--flows=3"], "", "mnist").workdir == "runs/mnist-flows=3"
    long = default_workdir(Config(classes=tuple(range(200))), "mnist")
    assert len(long) < 220
    assert long != default_workdir(Config(classes=tuple(range(201))), "mnist")


def write_config(folder, **flags):
    folder.mkdir(parents=True)
    config = {"layout": 2, "experiment": "x", "flags": flags, "versions": {}, "device": {}}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_run_that_was_begun_before_a_flag_goes_on_with_its_default_then(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "old", flows=5)
    write_config(tmp_path / "new", flows=5, optimizer="new")
    assert parse_run(Config, ["--workdir=old"], "").optimizer == "adam"
    assert parse_run(Config, ["--workdir=old", "--optimizer=new"], "").optimizer == "new"  # refused by open_run
    assert parse_run(Config, ["--workdir=old", "--overwrite"], "").optimizer == "new"
    assert parse_run(Config, ["--workdir=new"], "").optimizer == "new"
    assert parse_run(Config, ["--workdir=none"], "").optimizer == "new"
    write_config(tmp_path / "runs" / "mnist-flows=5", flows=5)
    assert parse_run(Config, [], "", "mnist").optimizer == "adam"


def test_eval_only_takes_the_runs_flags(tmp_path):
    write_config(tmp_path / "run", flows=7, classes=[1, 2], data_dir="/data", workdir="elsewhere", keep=9, unknown=1)
    config = parse_run(Config, [f"--workdir={tmp_path / 'run'}", "--eval_only"], "")
    assert config == Config(
        workdir=str(tmp_path / "run"), eval_only=True, flows=7, classes=(1, 2), data_dir="/data", optimizer="adam"
    )
    with pytest.raises(UsageError, match="--eval_only needs --workdir"):
        parse_run(Config, ["--eval_only"], "")


def test_the_toy_is_a_config_too():
    assert parse_run(toy.Config, ["--bomb=3"], "", "toy").workdir == "runs/toy-seed=0"
