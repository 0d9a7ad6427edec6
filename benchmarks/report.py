"""What all benchmarks report: the machine, ratios of times, and the files in the results folder."""

import dataclasses
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from planar_vae_jax.runs import replacing, write_json
from planar_vae_jax.runs.config import UsageError

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "numpyro",
    "flowjax",
    "equinox",
    "normflows",
    "pyro-ppl",
    "torch",
    "schedulefree",
)


class Results:
    """The results folder: ``config.json`` at the start, ``summary.json`` and a figure at the end."""

    def __init__(self, config: Any, benchmark: str):
        """Creates ``config.workdir`` and writes the flags into it.

        Raises:
            UsageError: the folder cannot be created, or already holds results.
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
        """Writes ``summary.json`` and replaces an earlier one."""
        write_json(self.workdir / "summary.json", summary)

    def finish(self, summary: dict[str, Any], name: str, figure: Figure) -> None:
        """Writes ``summary.json`` and the figure, and prints where they are."""
        with replacing(self.workdir / name) as temporary:
            figure.savefig(temporary)
        self.write(summary)
        print(f"{name} and summary.json are in {self.workdir}", flush=True)


Ratios = dict[str, float | None]  # "a / b" -> its value; None if not measured in this run


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Returns the ratio, or None if a number is missing or the denominator is 0."""
    if numerator is None or denominator is None or denominator == 0:
        return None
    return numerator / denominator


def print_ratios(ratios: Ratios) -> None:
    """Prints one line for each ratio."""
    width = max(map(len, ratios), default=0)
    print()
    for name, value in ratios.items():
        print(f"{name:<{width}}  {'not measured' if value is None else format(value, '.3g')}")


def machine() -> dict[str, Any]:
    """Returns the device, the processors, and the versions of the installed packages."""
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
    """Returns the load average over the last minute, or None if the system does not report it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpu_name() -> str | None:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        return None
    return names[0] if names else None


def print_machine(facts: dict[str, Any]) -> None:
    """Prints one line about the machine, and a warning if other processes use it."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    print(f"device: {facts['device']} ({facts['platform']}); {facts['cpus']} x {facts['cpu']}; {versions}", flush=True)
    average = facts["load_average"]
    if average is not None and average > 0.5:
        print(
            f"the load average is {average:.1f}: other processes use this machine, which makes these times unreliable",
            flush=True,
        )
