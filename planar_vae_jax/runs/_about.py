"""What the page of a run says beside its figures: the command, the flags, how to load it, data, device and time."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planar_vae_jax.runs.config import RunFlags, as_json, shown
from planar_vae_jax.runs.page import Setting

# Flags that say how to start, resume or evaluate a run, not which run it is.
_OF_A_START = ("resume", "overwrite", "max_seconds", "eval_only", "checkpoint", "process_id")
_USAGE_OF_IMAGES = """\
from planar_vae_jax import load_run

run = load_run("WORKDIR", "CHECKPOINT", build=build)  # build(flags, image_shape) -> the module that was trained"""
_USAGE = """\
from pathlib import Path

from planar_vae_jax.runs.checkpoints import read_checkpoint

arrays = read_checkpoint(Path("WORKDIR") / "checkpoints", "CHECKPOINT").leaves  # by name"""


def settings(config: RunFlags, defaults: Mapping[str, Any]) -> list[Setting]:
    """Returns every flag with its value and its default; ``defaults``: those that are not the class's, by name."""
    return [
        Setting(
            field.name,
            as_json(getattr(config, field.name)),
            as_json(defaults.get(field.name, field.default)),
            field.metadata["help"],
        )
        for field in dataclasses.fields(config)
    ]


def command(config: RunFlags, defaults: Mapping[str, Any]) -> list[str]:
    """Returns the words of the command that repeats the run: flags at their defaults are left out.

    It is empty for a program without a file, as in a notebook.
    """
    named = {field.name for field in dataclasses.fields(config) if field.metadata["named"]}
    program = _program(config)
    flags = [
        _argument(one)
        for one in settings(config, defaults)
        if one.name not in _OF_A_START and (one.value != one.default or (one.name in named and one.value is not None))
    ]
    return [*program, *flags] if program else []


def _program(config: RunFlags) -> list[str]:
    """Returns the words that start the program that defines the flags."""
    name = type(config).__module__
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if file is None:
        return []
    if name == "__main__" and getattr(module, "__spec__", None) is not None:
        name = module.__spec__.name  # type: ignore[union-attr]
    return ["python", "-m", name] if "." in name else ["python", shlex.quote(Path(file).name)]


def _argument(setting: Setting) -> str:
    if isinstance(setting.value, bool):
        return f"--{'' if setting.value else 'no'}{setting.name}"
    return shlex.quote(f"--{setting.name}={shown(setting.value)}")


def usage(config: RunFlags, workdir: str, data: Mapping[str, Any] | None, *, best: bool) -> str:
    """Returns Python code that loads the run.

    Args:
        config: its flags; ``config.usage`` is the code, if there is one.
        workdir: the folder of the run as it was given.
        data: what ``config.json`` holds of the data.
        best: whether the run's figures are those of its best checkpoint.
    """
    code = config.usage or (_USAGE_OF_IMAGES if data and data.get("image_shape") else _USAGE)
    code = code.replace("CHECKPOINT", "best" if best else "latest")
    return code.replace('"WORKDIR"', json.dumps(workdir)).replace("WORKDIR", shlex.quote(workdir))


def facts(description: Mapping[str, Any], devices: str, seconds: float) -> dict[str, str]:
    """Returns data, device, time and versions of a run in words.

    Args:
        description: the content of ``config.json``.
        devices: the devices that the run computes on.
        seconds: the time that the run has taken.
    """
    data, device = description["data"], description["device"]
    of_data = {"data": shown_data(data)} if data else {}
    if data and data.get("image_shape"):
        of_data["image shape"] = " x ".join(map(str, data["image_shape"]))
    versions = (f"{name} {version}" for name, version in description["versions"].items() if version)
    return of_data | {
        "experiment": description["experiment"],
        "device": f"{devices}, {device.get('cpus')} CPU cores",
        "time": _duration(seconds),
        "versions": ", ".join(versions),
        "checksums of the code": ", ".join(f"{name} {crc:08x}" for name, crc in description.get("code", {}).items()),
    }


def shown_data(data: Mapping[str, Any]) -> str:
    """Returns the data of a run in words."""
    return f"{data['name']} from {data['source']} (CRC-32 {data['crc32']:08x})"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h" * (hours > 0), f"{minutes} min" * (hours + minutes > 0), f"{rest} s"]
    return " ".join(part for part in parts if part)
