"""Every flag of every experiment, with anything: accepted, or refused with one line that names a flag."""

import dataclasses
import importlib
import pkgutil
import re
import types
import typing

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import experiments
from experiments.files import RunError
from experiments.flags import UsageError
from experiments.resuming import parse_run
from faults.harness import STRENGTH, refuse
from planar_vae_jax.data import DATASETS, DataError

modules = [importlib.import_module(f"experiments.{info.name}") for info in pkgutil.iter_modules(experiments.__path__)]
EXPERIMENTS = {module.__name__.split(".")[1]: module for module in modules if hasattr(module, "prepare")}

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


def assert_clear(error, config_class):
    """One line that names a flag, or the argument that is none."""
    message = str(error)
    assert "\n" not in message
    names = "|".join(field.name for field in dataclasses.fields(config_class))
    assert re.search(rf"\b({names}|flagfile|unknown|undefok)\b|data set|every argument is a flag|\.npz", message), (
        message
    )


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
        try:
            config = module.prepare(parse_run(module.Config, argv, "doc"))
            if hasattr(module, "load_data") and config.dataset not in DATASETS[1:]:
                config = dataclasses.replace(config, dataset=str(images))
                module.load_data(config)
        except (UsageError, DataError) as error:
            assert_clear(error, module.Config)
            tally(f"flags of {name} at random", "refused in one line")
        else:
            accepted += 1
            tally(f"flags of {name} at random", "accepted")

    check()
    assert accepted


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_each_weird_value_of_each_flag_alone(name, tally, monkeypatch, tmp_path):
    module = EXPERIMENTS[name]
    monkeypatch.chdir(tmp_path)
    for field in dataclasses.fields(module.Config):
        for value in WEIRD:
            try:
                module.prepare(parse_run(module.Config, [f"--{field.name}={value}"], "doc"))
            except (UsageError, DataError) as error:
                assert_clear(error, module.Config)
                tally(f"each weird value of each flag of {name}", "refused in one line")
            else:
                tally(f"each weird value of each flag of {name}", "accepted")


# --- Accepted ones, run to their end

TINY = {  # what a run's time depends on
    "flows": st.integers(0, 3),
    "epochs": st.integers(1, 3),
    "steps": st.integers(1, 60),
    "batch_size": st.integers(1, 40),
    "hidden": st.integers(1, 6),
    "latent": st.integers(1, 4),
    "nll_samples": st.integers(1, 3),
    "learning_rate": st.sampled_from([1e-300, 1e-45, 1e-8, 1e-3, 0.5, 100.0, 1e6, 1e30]),
    "clip_norm": st.sampled_from([0.0, 1e-45, 1e-3, 1.0, 1e30]),
    "scale": st.sampled_from([0.01, 0.3, 1.0, 10.0]),
    "seed": st.sampled_from([0, 1, 2**31, 2**32 - 1]),
    "classes": st.sampled_from(["0", "0,1", "2,2,1"]),
    "keep": st.sampled_from([1, 2, 10**30]),
}
SPECIAL = ("workdir", "data_dir", "dataset", "eval_only", "checkpoint", "overwrite", "resume", "help")


def tiny(config_class):
    """Command lines with all flags but the special ones, each at times."""
    strategies = {
        field.name: TINY.get(field.name, plausible(config_class, field))
        for field in dataclasses.fields(config_class)
        if field.name not in SPECIAL
    }
    needed = {name: strategies.pop(name) for name in ("epochs", "steps", "hidden", "nll_samples") if name in strategies}
    return st.fixed_dictionaries(needed, optional=strategies).map(
        lambda values: [f"--{name}={value}" for name, value in values.items()]
    )


def assert_not_finite(error):
    assert "not finite" in str(error)
    assert "\n" not in str(error)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(max(1, STRENGTH // 2)))
@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_what_is_accepted_runs_to_its_end(name, part, tally, images, tmp_path_factory, monkeypatch):
    from experiments import density

    module = EXPERIMENTS[name]
    monkeypatch.setattr(density, "SAMPLES", 2**14)  # a 64th
    small = tmp_path_factory.mktemp("data") / "small.npz"
    with np.load(images) as arrays:
        np.savez(small, **{key: array[:60] for key, array in arrays.items()})

    runs, wanted = 0, 2 if STRENGTH == 1 else 5

    @settings(max_examples=200, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(tiny(module.Config))
    def check(argv):
        nonlocal runs
        if runs == wanted:
            return
        workdir = tmp_path_factory.mktemp("runs") / "run"
        data = [f"--dataset={small}"] if name == "mnist" else []
        try:
            config = module.prepare(parse_run(module.Config, [*argv, *data, f"--workdir={workdir}"], "doc"))
            if data:
                module.load_data(config)
        except (UsageError, DataError) as error:
            assert_clear(error, module.Config)
            return
        runs += 1
        try:
            with jax.numpy_dtype_promotion("standard"):
                module.main([*argv, *data, f"--workdir={workdir}"])
        except RunError as error:
            assert_not_finite(error)
            tally(f"accepted flags of {name}, run", "not finite, told in one line")
        else:
            tally(f"accepted flags of {name}, run", "ran to the end")

    check()
    assert runs == wanted


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
