"""Command-line flags from a dataclass: one field is one flag, with its check and its help.

A config is a frozen dataclass whose fields are made by :func:`flag`. :func:`parse` turns ``argv`` into a config, or
raises :class:`UsageError` with one line that names the flag, what it wants and what came.
"""

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from absl import flags

Config = TypeVar("Config")


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
    identity: bool = True,
) -> Any:
    """A dataclass field that is a flag; ``identity``: a run with another value is another run."""
    check = {"at_least": at_least, "above": above, "at_most": at_most, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": help, "identity": identity, **check})


def parse(
    config_class: type[Config], argv: Sequence[str], doc: str, defaults: Mapping[str, Any] | None = None
) -> Config:
    """Parses and checks ``argv`` (without the program's name).

    ``--help`` prints ``doc`` and the flags, and exits. ``defaults`` go before those of the class.

    Raises:
        UsageError: naming the first flag that is wrong.
    """
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "show this help", flag_values=values)
    try:
        for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
            default = (defaults or {}).get(field.name, field.default)
            _define(field, _type(config_class, field.name), default, values)
        rest = values([config_class.__name__, *argv])[1:]
    except (flags.Error, TypeError) as error:  # TypeError: a default of the wrong type
        raise UsageError(" ".join(str(error).split())) from None
    except (OSError, UnicodeDecodeError) as error:  # --flagfile=FILE
        raise UsageError(f"--flagfile: {error}") from None
    if values["help"].value:
        print(doc.strip(), "\n\nflags:\n", values.get_help(), sep="")
        sys.exit(0)
    if rest:
        raise UsageError(f"every argument is a flag, --name=value; got {rest[0]!r}")
    fields = dataclasses.fields(config_class)  # type: ignore[arg-type]
    config = config_class(**{field.name: _value(field, values) for field in fields})
    check(config)
    return config


def check(config: Any) -> None:
    """Checks each field of a config by its own rule.

    Raises:
        UsageError: naming the first that is wrong.
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
        wish = f"at least {at_least:g}"
    elif above is not None and value <= above:
        wish = f"greater than {above:g}"
    elif at_most is not None and value > at_most:
        wish = f"at most {at_most:g}"
    if wish is not None:
        raise UsageError(f"--{field.name} must be {wish}; got {value!r}")


def _type(config_class: type, name: str) -> Any:
    """The field's type without ``| None``; ``tuple`` for ``tuple[int, ...]``."""
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
        text = ",".join(value)
        raise UsageError(f"--{field.name} must be whole numbers joined by commas; got {text!r}") from None
