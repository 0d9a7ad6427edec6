"""Every flag of every experiment, with anything: accepted, or refused with one line that names a flag."""

import dataclasses
import importlib
import pkgutil
import random
import re
import types
import typing

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import experiments
from campaign.harness import STRENGTH, refuse
from experiments import density, use
from planar_vae_jax.data import DATASETS, DataError
from planar_vae_jax.runs._files import RunError
from planar_vae_jax.runs.config import RunFlags, UsageError, parse, parse_run

modules = [importlib.import_module(f"experiments.{info.name}") for info in pkgutil.iter_modules(experiments.__path__)]
EXPERIMENTS = {module.__name__.split(".")[1]: module for module in modules if hasattr(module, "Config")}
RUNS = [name for name, module in EXPERIMENTS.items() if issubclass(module.Config, RunFlags)]  # "use" begins none

WEIRD = (
    *("", " ", "0", "-1", "1", "2", "3", " 3", "3 ", "3.0", "0x10", "1_000", "+2", "1e3", "1e400", "-1e400", "nan"),
    *("inf", "-inf", "1e-400", "-0.0", "٣", "½", "ü", "漢字", "\0", "\n", "\udcff", "~", "~nobody-here", "x.npz"),
    *("true", "True", "None", "auto", "a,b", "1,2", "1,,2", ",", "1,2,3,4,5,6,7,8,9,10", "--", "=", "--seed=1"),
    *(
        "x" * 5000,
        "9" * 40,
        "9" * 400,
        "9" * 5000,
        "1" + "0" * 5000 + ".5",
        "/dev/null",
        "/",
        "../..",
        "/proc/self/mem",
    ),
    "~nobody-here/x.npz",
)


def kind(config_class, field):
    """The type of a flag, without ``| None``."""
    annotation = typing.get_type_hints(config_class)[field.name]
    if isinstance(annotation, types.UnionType):
        (annotation,) = (one for one in typing.get_args(annotation) if one is not types.NoneType)
    return annotation


def plausible(config_class, field):
    """Values that a user may mean."""
    choices = field.metadata["choices"]
    if choices is not None:
        return st.sampled_from(sorted(choices))
    annotation = kind(config_class, field)
    if annotation is bool:
        return st.sampled_from(["true", "false"])
    if annotation is int:
        return st.integers(0, 40).map(str)
    if annotation is float:
        return st.floats(0.0, 10.0).map(str)
    if annotation == tuple[int, ...]:
        return st.lists(st.integers(0, 3), min_size=1, max_size=3).map(lambda some: ",".join(map(str, some)))
    return st.sampled_from(["some", "run"])


def arguments(config_class):
    """Command lines of some of the flags, plausible and weird values mixed."""

    def one(field):
        weird = st.one_of(
            st.sampled_from(WEIRD),
            st.text(max_size=20),
            st.integers().map(str),
            st.floats().map(str),
        )
        value = st.one_of(plausible(config_class, field), plausible(config_class, field), weird)
        form = st.sampled_from([f"--{field.name}={{}}", f"--{field.name}={{}}", f"-{field.name}={{}}"])
        given_value = st.builds(lambda form, value: form.format(value), form, value)
        return (
            st.one_of(given_value, st.just(f"--no{field.name}")) if kind(config_class, field) is bool else given_value
        )

    flags = st.sampled_from(dataclasses.fields(config_class)).flatmap(one)
    stray = st.sampled_from(["--unknown=1", "stray", "--flows", "--", "--undefok=x", "--flagfile=/", "--seed=1"])
    return st.lists(st.one_of(*[flags] * 9, stray), min_size=1, max_size=6)


def refusal(module, argv, images=None):
    """The one line by which a command line is refused, if it is; it names a flag, or the argument that is none.

    Args:
        images: is read instead of a data set that has a name of its own.
    """
    try:
        if module is use:
            module.the_task(parse(module.Config, argv, "doc"))
            return None
        config = parse_run(module.Config, argv, "doc", "x")
        module.check_flags(config)
        if hasattr(module, "load_images") and (images or config.dataset not in DATASETS):
            name = str(images or config.dataset)
            module.load_images(name, config.data_dir, config.classes, config.validation, lambda text: None)
    except (UsageError, DataError) as error:
        message = str(error)
    else:
        return None
    names = "|".join(field.name for field in dataclasses.fields(module.Config))
    named = rf"\b({names}|flagfile|[Uu]nknown|undefok)\b|data set|every argument is a flag|\.npz"
    assert re.search(named, message), message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_any_command_line_is_accepted_or_refused_in_a_line(name, tally, images, tmp_path_factory, monkeypatch):
    module = EXPERIMENTS[name]
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    accepted = 0

    @settings(
        max_examples=100 * STRENGTH,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(arguments(module.Config))
    def check(argv):
        nonlocal accepted
        refused = refusal(module, argv, images)
        accepted += not refused
        tally(f"flags of {name} at random", "refused in one line" if refused else "accepted")

    check()
    assert accepted or module is use  # one task of five, and a folder: rare at random


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["density"] if STRENGTH == 1 else sorted(EXPERIMENTS))
def test_each_weird_value_of_each_flag_alone(name, tally, monkeypatch, tmp_path):
    module = EXPERIMENTS[name]
    monkeypatch.chdir(tmp_path)
    for field in dataclasses.fields(module.Config):
        for value in WEIRD:
            refused = refusal(module, [f"--{field.name}={value}"])
            end = "refused in one line" if refused else "accepted"
            tally(f"each weird value of each flag of {name}", end)


# --- Accepted ones, run to their end

TINY = {  # what a run's time depends on, and the extremes
    "flows": range(4),
    "epochs": range(1, 4),
    "steps": range(1, 61),
    "batch_size": range(1, 41),
    "hidden": range(1, 7),
    "latent": range(1, 5),
    "nll_samples": range(1, 4),
    "learning_rate": [1e-300, 1e-45, 1e-8, 1e-3, 0.5, 100.0, 1e6, 1e30],
    "clip_norm": [0.0, 1e-45, 1e-3, 1.0, 1e30],
    "scale": [0.01, 0.3, 1.0, 10.0],
    "seed": [0, 1, 2**31, 2**32 - 1],
    "classes": ["0", "0,1", "2,2,1"],
    "keep": [1, 2, 10**30],
    "validation": [0, 1, 20],
}
# Of other processes, the process's end, or tried elsewhere.
SPECIAL = (
    *("workdir", "data_dir", "dataset", "eval_only", "checkpoint", "overwrite", "resume"),
    *("max_seconds", "coordinator", "num_processes", "process_id"),
)


def tiny(config_class, rng):
    """A command line of all flags but the special ones, each at times; those that make a run long always."""
    argv = []
    for field in dataclasses.fields(config_class):
        if field.name in SPECIAL:
            continue
        values = TINY.get(field.name) or field.metadata["choices"]
        if values is None:
            values = ["true", "false"] if kind(config_class, field) is bool else range(41)
        if field.name in ("epochs", "steps", "hidden", "nll_samples") or rng.random() < 0.5:
            argv.append(f"--{field.name}={rng.choice(list(values))}")
    return argv


def run_in_this_process(module, argv):
    """Tells how it ended; any error but the one that is told in a line is raised."""
    try:
        with jax.numpy_dtype_promotion("standard"):
            module.main(argv)
    except RunError as error:
        message = str(error)
        if "not finite" not in message or "\n" in message:
            raise
        return "not finite, told in one line"
    return "ran to the end"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(max(1, STRENGTH // 2)))
@pytest.mark.parametrize("name", sorted(RUNS))
def test_what_is_accepted_runs_to_its_end(name, part, tally, images, tmp_path, monkeypatch):
    monkeypatch.setattr(density, "SAMPLES", 2**14)  # a 64th
    module, rng, small = EXPERIMENTS[name], random.Random(f"{name} {part}"), tmp_path / "small.npz"
    with np.load(images) as arrays:
        np.savez(small, **{key: array[:60] for key, array in arrays.items()})
    data = [f"--dataset={small}"] if hasattr(module, "load_images") else []
    for turn in range(2 if STRENGTH == 1 else 5):
        argv = refused = None
        while argv is None or refused:
            argv = [*tiny(module.Config, rng), *data, f"--workdir={tmp_path / str(turn)}"]
            refused = refusal(module, argv)
        try:
            end = run_in_this_process(module, argv)
        except UsageError:  # too few images of the classes for a batch, say
            continue
        tally(f"accepted flags of {name}, run", end)
        assert (tmp_path / str(turn) / "summary.json").exists() == (end == "ran to the end")


# --- By the command: what only a process shows


@pytest.mark.parametrize(
    "flag",
    [
        "--flagfile=/bin/sh",
        "--data_dir=~nobody-here",
        "--dataset=~nobody-here/x.npz",
        "--dataset=\udcff.npz",
        "--workdir=\udcff",
    ],
)
def test_a_process_with_weird_flags_ends_with_one_line(flag, tmp_path, tally):
    refuse("mnist", tmp_path / "run", flag, status=2, words="flagfile|data_dir|no such file|--workdir")
    tally("weird flags of a process", "one line, status 2")
