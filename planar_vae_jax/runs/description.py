"""What ``config.json`` says of a run: its flags, its data, and where it computes."""

import dataclasses
import importlib.metadata
import platform
from typing import Any

from planar_vae_jax.runs.config import LAYOUT, RunFlags, as_json
from planar_vae_jax.runs.devices import Devices

_PACKAGES = ("planar_vae_jax", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")


def describe(config: RunFlags, experiment: str, data: dict[str, Any] | None, devices: Devices) -> dict[str, Any]:
    """The contents of ``config.json``: every flag, the versions, the device, the data."""
    return {
        "layout": LAYOUT,
        "experiment": experiment,
        "flags": {name: as_json(value) for name, value in dataclasses.asdict(config).items()},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "device": devices.describe(),
        "data": data,
    }


def common(description: dict[str, Any]) -> dict[str, Any]:
    """What all processes of a run have in common."""
    flags = {name: value for name, value in description["flags"].items() if name not in ("process_id", "data_dir")}
    data = description["data"]
    return {
        **description,
        "flags": flags,
        "device": None,
        "data": data and [data["name"], data["crc32"], data.get("crc32_valid")],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a clone that is not installed
        return None


def shown_data(data: dict[str, Any]) -> str:
    """For people."""
    return f"{data['name']} from {data['source']} (CRC-32 {data['crc32']:08x})"
