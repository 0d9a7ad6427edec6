"""What every benchmark says beside its own figures: the machine and its ratios; and the folder that it writes."""

import dataclasses
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from planar_vae_jax.runs.config import UsageError
from planar_vae_jax.runs.files import finite, replacing, write_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "flowjax", "equinox", "normflows", "pyro-ppl", "torch", "schedulefree")


class Results:
    """The folder of a benchmark: ``config.json`` at once, ``summary.json`` and a figure at the end."""

    def __init__(self, config: Any, benchmark: str):
        """Makes ``config.workdir`` and writes the flags into it.

        Raises:
            UsageError: the folder cannot be made, or holds results already.
        """
        self.workdir = Path(config.workdir).expanduser()
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"--workdir must be a folder that can be written; got {config.workdir!r} ({error.strerror})"
            raise UsageError(message) from None
        if (self.workdir / "config.json").exists():
            raise UsageError(f"--workdir={config.workdir} holds results already; name another, or move it away")
        flags = dataclasses.asdict(config)
        write_json(self.workdir / "config.json", {"benchmark": benchmark, "flags": flags, "machine": machine()})
        print(f"writing to {self.workdir}", flush=True)

    def write(self, summary: dict[str, Any]) -> None:
        """Writes ``summary.json``, in place of an earlier one."""
        write_json(self.workdir / "summary.json", finite(summary))

    def finish(self, summary: dict[str, Any], name: str, figure: Figure) -> None:
        """Writes ``summary.json`` and the figure, and says where they are."""
        with replacing(self.workdir / name) as temporary:
            figure.savefig(temporary)
        self.write(summary)
        print(f"{name} and summary.json are in {self.workdir}", flush=True)


Ratios = dict[str, float | None]  # what over what -> its value; None: not measured in this run


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """None where either is missing."""
    if numerator is None or denominator is None or denominator == 0:
        return None
    return numerator / denominator


def print_ratios(ratios: Ratios) -> None:
    """A line a ratio."""
    width = max(map(len, ratios), default=0)
    print()
    for name, value in ratios.items():
        print(f"{name:<{width}}  {'not measured' if value is None else format(value, '.3g')}")


def machine() -> dict[str, Any]:
    """The device, the processors and the versions of whatever is installed."""
    device = jax.devices()[0]
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "cpus": os.cpu_count(),
        "cpu": _cpu_name(),
        "load_average": load(),
        "versions": versions,
    }


def load() -> float | None:
    """Processes that wanted a CPU over the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpu_name() -> str | None:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        return None
    return names[0] if names else None


def print_machine(facts: dict[str, Any]) -> None:
    """One line, and a warning where something else is running."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    print(f"device: {facts['device']} ({facts['platform']}); {facts['cpus']} x {facts['cpu']}; {versions}", flush=True)
    average = facts["load_average"]
    if average is not None and average > 0.5:
        print(f"the load average is {average:.1f}: something else runs here, and these times will show it", flush=True)
