"""Command-line flags from a dataclass: each field is a flag with its check and its help.

A config is a frozen dataclass whose fields are made by :func:`flag`. :func:`parse` turns ``argv`` into a config, or
raises :class:`UsageError` with one line that names the flag, what it accepts and what came. The config of a run extends
:class:`RunFlags`; :func:`parse_run` takes the flags of a stored run into account.
"""

import dataclasses
import importlib.util
import math
import os
import re
import sys
import types
import typing
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from absl import flags

from planar_vae_jax.runs._files import read_json

Config = TypeVar("Config")
RunConfig = TypeVar("RunConfig", bound="RunFlags")

LAYOUT = 3  # version of the layout of a run's folder
_WHOLE_NUMBERS = "whole numbers joined by commas"


class UsageError(Exception):
    """A user's mistake; the message is one line that says how to mend it."""


def flag(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    choices: Sequence[str] | None = None,
    resumable: bool = False,
    evaluation: bool = False,
    named: bool = False,
    machine: bool = False,
) -> Any:
    """Returns a dataclass field that is a command-line flag.

    Args:
        default: the value if the flag is not given.
        help: one line.
        at_least, above, at_most, choices: what the value, or each entry of a tuple, must satisfy.
        resumable: a run may be resumed with another value.
        evaluation: another value may be given with ``--eval_only``.
        named: the name of the default folder contains it, even at its default.
        machine: the flag says where a run computes, so its value is not taken from a stored run.
    """
    check = {"at_least": at_least, "above": above, "at_most": at_most, "choices": choices}
    kind = {"resumable": resumable, "evaluation": evaluation, "named": named, "machine": machine}
    return dataclasses.field(default=default, metadata={"help": help, **check, **kind})


def parse(
    config_class: type[Config], argv: Sequence[str], doc: str | None, defaults: Mapping[str, Any] | None = None
) -> Config:
    """Parses and checks ``argv``, which does not contain the program's name.

    ``--help`` prints ``doc`` and the flags, and exits. ``defaults`` replace those of the class.

    Raises:
        UsageError: a flag is wrong; the message names the first such flag.
    """
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "show this help", flag_values=values)
    try:
        for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
            default = (defaults or {}).get(field.name, field.default)
            _define(field, _type(config_class, field.name), default, values)
        rest = values([config_class.__name__, *argv])[1:]
    except (OSError, UnicodeDecodeError) as error:  # --flagfile=FILE
        raise UsageError(f"--flagfile: {error}") from None
    except (flags.Error, TypeError, ValueError) as error:  # a default of the wrong type; --noFLAG=VALUE
        raise UsageError(_of_absl(config_class, error)) from None
    if values["help"].value:
        print((doc or "").strip(), "\n\nflags:\n", values.get_help(), sep="")  # python -OO has no docstrings
        sys.exit(0)
    if rest:
        raise UsageError(f"every argument is a flag, --name=value; got {rest[0]!r}")
    fields = dataclasses.fields(config_class)  # type: ignore[arg-type]
    config = config_class(**{field.name: _value(field, values) for field in fields})
    check(config)
    return config


def _of_absl(config_class: type, error: Exception) -> str:
    """Returns absl's message about a wrong flag as one line."""
    wrong = re.match(r"flag --(\w+)=(.*?): ", str(error), re.DOTALL)
    if not isinstance(error, flags.IllegalFlagValueError) or wrong is None:
        return " ".join(str(error).split())
    name, value = wrong.groups()
    kinds: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", tuple: _WHOLE_NUMBERS}
    wish = kinds[bool if name == "help" else _type(config_class, name)]
    return f"--{name} must be {wish}; got {value!r}"


def check(config: Any) -> None:
    """Checks each field of a config by the rule of its flag.

    Raises:
        UsageError: a value is wrong; the message names the first such flag.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None:
            continue
        for one in value if isinstance(value, tuple) else (value,):
            _check_one(field, one)


def _check_one(field: dataclasses.Field[Any], value: Any) -> None:
    at_least, above, at_most, choices = (field.metadata[key] for key in ("at_least", "above", "at_most", "choices"))
    wish = None
    if choices is not None and value not in choices:
        wish = f"one of {', '.join(choices)}"
    elif isinstance(value, float) and not math.isfinite(value):
        wish = "a finite number"
    elif at_least is not None and value < at_least:
        wish = f"at least {at_least:.10g}"
    elif above is not None and value <= above:
        wish = f"greater than {above:.10g}"
    elif at_most is not None and value > at_most:
        wish = f"at most {at_most:.10g}"
    if wish is not None:
        raise UsageError(f"--{field.name} must be {wish}; got {value!r}")


def _type(config_class: type, name: str) -> Any:
    """Returns the field's type without ``| None``; ``tuple`` for ``tuple[int, ...]``."""
    annotation = typing.get_type_hints(config_class)[name]
    if isinstance(annotation, types.UnionType):
        (annotation,) = (arm for arm in typing.get_args(annotation) if arm is not types.NoneType)
    return typing.get_origin(annotation) or annotation


def _define(field: dataclasses.Field[Any], kind: Any, default: Any, values: flags.FlagValues) -> None:
    define: dict[Any, Callable[..., Any]] = {
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
        bool: flags.DEFINE_bool,
    }
    help = field.metadata["help"]
    if field.metadata["choices"] is not None:
        help = f"{help} ({'|'.join(field.metadata['choices'])})"
    if kind is tuple:  # a comma-separated list of whole numbers
        default = None if default is None else ",".join(map(str, default))
        flags.DEFINE_list(field.name, default, help, flag_values=values)
    else:
        define[kind](field.name, default, help, flag_values=values)


def _value(field: dataclasses.Field[Any], values: flags.FlagValues) -> Any:
    value = values[field.name].value
    if not isinstance(value, list):
        return value
    try:
        return tuple(int(item) for item in value)
    except ValueError:
        raise UsageError(f"--{field.name} must be {_WHOLE_NUMBERS}; got {','.join(value)!r}") from None


# --- Configs of runs


@dataclass(frozen=True)
class RunFlags:
    """Flags that every run has."""

    drawn_again: typing.ClassVar[bool] = True  # whether --eval_only draws the figures of this experiment
    # Python code for report.html that loads a run, with "WORKDIR" and "CHECKPOINT" in it; None: code for any model.
    usage: typing.ClassVar[str | None] = None
    workdir: str | None = flag(
        None, "folder for what the run writes; default: one in runs/ named after the flags", resumable=True
    )
    resume: str = flag(
        "auto",
        "auto: resume the run in --workdir, or begin one; always: only resume, also with code that has changed; never: "
        "only begin",
        choices=("auto", "always", "never"),
        resumable=True,
    )
    overwrite: bool = flag(False, "begin afresh; the run in --workdir is moved to WORKDIR.old-N", resumable=True)
    init_from: str | None = flag(None, "a run's folder: training starts from its newest parameters")
    keep: int = flag(3, "how many of the newest checkpoints stay, beside the best", at_least=1, resumable=True)
    checkpoint_every: int = flag(1, "lines of metrics.jsonl between checkpoints", at_least=1, resumable=True)
    max_seconds: float = flag(
        None, "seconds after which the run saves and stops; the same command resumes it", above=0.0, resumable=True
    )
    eval_only: bool = flag(False, "compute the figures of the run in --workdir again", resumable=True)
    checkpoint: str = flag(
        None,
        "read by --eval_only; default: latest, or best with --patience",
        choices=("latest", "best"),
        resumable=True,
    )
    tensorboard: bool = flag(
        False, "also write metrics and pictures for TensorBoard, into WORKDIR/tensorboard", resumable=True
    )


def parse_run(
    config_class: type[RunConfig], argv: Sequence[str], doc: str | None, experiment: str | None = None
) -> RunConfig:
    """:func:`parse` for a run; with ``--eval_only`` the flags of the stored run are the defaults.

    Args:
        experiment: names the default folder; without it, ``config.workdir`` may be None.

    Raises:
        UsageError: a flag is wrong, flags contradict each other, there is no run to evaluate, or the stored config
            cannot be read.
    """
    config = parse(config_class, argv, doc)
    _check_run(config)
    if config.workdir is None and experiment is not None:
        config = dataclasses.replace(config, workdir=default_workdir(config, experiment))
    if config.workdir is None or config.overwrite or not config.eval_only:
        return config
    stored = read_config(config.workdir)
    if stored is None:
        raise UsageError(f"--eval_only needs a run; --workdir={config.workdir} holds none")
    of_every_run = {field.name for field in dataclasses.fields(RunFlags)} - {"init_from"}
    own = [f for f in dataclasses.fields(config) if f.name not in of_every_run and not f.metadata["machine"]]
    defaults = {field.name: stored["flags"][field.name] for field in own if field.name in stored["flags"]}
    return dataclasses.replace(parse(config_class, argv, doc, defaults), workdir=config.workdir)


def _check_run(config: RunFlags) -> None:
    if config.checkpoint == "best" and not config.eval_only:
        raise UsageError(f"--checkpoint={config.checkpoint} needs --eval_only")
    if config.overwrite and (config.eval_only or config.resume == "always"):
        other = "--eval_only" if config.eval_only else "--resume=always"
        raise UsageError(f"--overwrite begins afresh, which contradicts {other}")
    if config.workdir == "":  # an unset variable of the shell, perhaps
        raise UsageError("--workdir must be a folder; got ''")
    if config.workdir is None and config.eval_only:
        raise UsageError("--eval_only needs --workdir, the folder of a run")
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UsageError("--tensorboard needs the extra 'tensorboard': pip install 'planar_vae_jax[tensorboard]'")
    for name in ("workdir", "init_from"):
        if getattr(config, name) is not None:
            check_local(name, getattr(config, name))


def check_local(name: str, place: str) -> None:
    """Checks that a flag names a folder of this machine, and not an address as in gs://bucket.

    Raises:
        UsageError: the place is an address.
    """
    if re.match(r"[A-Za-z][-+.A-Za-z0-9]*://", place):
        raise UsageError(f"--{name} must be a folder of this machine; got {place!r}")


def read_config(workdir: str | Path) -> dict[str, Any] | None:
    """Returns the contents of a run's ``config.json``, or None if there is no such file.

    Raises:
        UsageError: the file cannot be read, or a version with another layout of folders wrote it.
    """
    path = Path(os.path.expanduser(workdir)) / "config.json"
    kinds = {"experiment": str, "flags": dict, "versions": dict, "device": dict}
    try:
        stored = read_json(path)
        if stored is not None and not all(isinstance(stored.get(key), kind) for key, kind in kinds.items()):
            raise ValueError("not the config of a run")
    except (OSError, ValueError) as error:
        if not os.path.isdir(path.parent):  # reported when the folder is made
            return None
        raise UsageError(f"{path} cannot be read ({error}); name another --workdir, or --overwrite it") from None
    if stored is not None and stored.get("layout", 1) != LAYOUT:
        raise UsageError(
            f"{path} is of another version of planar_vae_jax (layout {stored.get('layout', 1)}, this one reads "
            f"{LAYOUT}); name another --workdir, or --overwrite it"
        )
    return stored


def default_workdir(config: RunFlags, experiment: str) -> str:
    """Returns ``runs/EXPERIMENT-FLAG=VALUE-...``, with the flags that are always named and those not at their defaults.

    So two runs share a folder only if they are the same run.
    """
    fields = [field for field in dataclasses.fields(config) if not field.metadata["resumable"]]
    parts = [experiment]
    for field in sorted(fields, key=lambda field: not field.metadata["named"]):
        value = getattr(config, field.name)
        if field.metadata["named"] or value != field.default:
            text = shown(as_json(value)).removesuffix(".npz")
            parts.append(f"{field.name}={re.sub(r'[^-+.,0-9A-Za-z]', '_', text)}")
    name = "-".join(parts)
    return f"runs/{name}" if len(name) <= 200 else f"runs/{name[:190]}-{zlib.crc32(name.encode()):08x}"


def as_json(value: Any) -> Any:
    """Returns a flag's value as it is after being stored as JSON: a tuple becomes a list."""
    return list(value) if isinstance(value, tuple) else value


def shown(value: Any) -> str:
    """Returns a flag's value as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
