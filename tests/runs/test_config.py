"""Flags are read once, and each mistake is one line that names the flag."""

import dataclasses
import json
from dataclasses import dataclass

import pytest
import toy

from planar_vae_jax.runs.config import RunFlags, UsageError, default_workdir, flag, parse, parse_run


@dataclass(frozen=True)
class Config(RunFlags):
    flows: int = flag(5, "layers", at_least=0, at_most=100, named=True)
    rate: float = flag(1e-3, "of learning", above=0.0)
    optimizer: str = flag("new", "which", choices=("new", "adam"))
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
def test_a_wrong_flag_is_an_error_of_one_line(argv, words):
    with pytest.raises(UsageError) as caught:
        parse_run(Config, [argv], "")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_without_a_docstring_prints_the_flags(capsys):
    """python -OO removes docstrings."""
    with pytest.raises(SystemExit) as ended:
        parse(Config, ["--help"], None)
    assert ended.value.code == 0
    assert "--flows" in capsys.readouterr().out


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
    config = {"layout": 3, "experiment": "x", "flags": flags, "versions": {}, "device": {}}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_stored_flag_is_no_default_of_a_run_that_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "run", flows=5, optimizer="adam")
    assert parse_run(Config, ["--workdir=run"], "").optimizer == "new"  # open_run refuses it
    assert parse_run(Config, ["--workdir=run", "--overwrite"], "").optimizer == "new"
    assert parse_run(Config, ["--workdir=none"], "").optimizer == "new"


def test_eval_only_takes_the_flags_of_the_run(tmp_path):
    write_config(tmp_path / "run", flows=7, classes=[1, 2], data_dir="/data", workdir="elsewhere", keep=9, unknown=1)
    config = parse_run(Config, [f"--workdir={tmp_path / 'run'}", "--eval_only"], "")
    assert config == Config(workdir=str(tmp_path / "run"), eval_only=True, flows=7, classes=(1, 2), data_dir="/data")
    with pytest.raises(UsageError, match="--eval_only needs --workdir"):
        parse_run(Config, ["--eval_only"], "")


def test_the_toy_is_a_config_too():
    assert parse_run(toy.Config, ["--bomb=3"], "", "toy").workdir == "runs/toy-seed=0"
