"""``--device_memory``: how many bytes of images a device holds, in words and in numbers."""

import re
from collections.abc import Sequence
from decimal import Decimal

import jax

from planar_vae_jax.runs import processes
from planar_vae_jax.runs.config import UsageError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """``2GB``, ``1.5 GiB``, ``512mb`` or a whole number of bytes.

    Raises:
        UsageError: for anything else, or less than a byte.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    number, unit = found.groups() if found else ("0", "")
    size = int(Decimal(number) * _UNITS.get(unit.upper(), 0))
    if size < 1:
        units = "KB, MB, GB, TB (thousands) or KiB, MiB, GiB, TiB (of 1024)"
        raise UsageError(f"--device_memory must be a size as in 2GB or 512MB, in bytes, {units}; got {text!r}")
    return size


def show_bytes(size: int) -> str:
    """For people: ``47 MB``, ``1.88 GB``."""
    unit = next((unit for unit in ("TB", "GB", "MB", "kB") if size >= _UNITS[unit.upper()]), "bytes")
    return f"{size / _UNITS.get(unit.upper(), 1):.3g} {unit}"


def device_limit(asked: str | None, devices: Sequence[jax.Device]) -> int | None:
    """Bytes that each device may hold of the images; of a run in several processes, what the first one says.

    Args:
        asked: ``--device_memory``.
        devices: that are computed on.

    Returns:
        What is asked for; else half of what the smallest of these devices has; ``None``: they do not tell, as a CPU.
    """
    if asked is not None:
        return parse_bytes(asked)
    limit: int | None = processes.on_first(_half_of_smallest, devices)
    return limit


def _half_of_smallest(devices: Sequence[jax.Device]) -> int | None:
    own = [device for device in devices if device.process_index == processes.index()]
    told = [(device.memory_stats() or {}).get("bytes_limit") for device in own]
    return min((int(limit) // 2 for limit in told if limit), default=None)
