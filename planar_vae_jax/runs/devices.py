"""The devices that a run computes on: batches split over them, everything else whole on each."""

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from planar_vae_jax.data.streamed import Streamed
from planar_vae_jax.runs import processes
from planar_vae_jax.runs.config import RunFlags, UsageError, flag
from planar_vae_jax.runs.files import RunError
from planar_vae_jax.train import mesh as meshes

# What a machine with an accelerator has, and what is installed to use one.
_SIGNS = ("/dev/nvidia0", "/dev/kfd", "/dev/accel0")
_PACKAGES = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm60_plugin", "jax_rocm7_plugin")


@dataclass(frozen=True)
class DeviceFlags(RunFlags):
    """Flags of a run that may use several devices; :func:`choose_devices` is given them."""

    devices: str = flag(
        "all", "how many to split batches over; all: as many as divide the batch", resumable=True, machine=True
    )
    coordinator: str | None = flag(
        None, "HOST:PORT of process 0, where a run has several processes", resumable=True, machine=True
    )
    num_processes: int = flag(None, "how many there are", at_least=1, resumable=True, machine=True)
    process_id: int = flag(None, "which of them this is, from 0", at_least=0, resumable=True, machine=True)
    device_memory: str | None = flag(
        None,
        "for the images on each device, as in 2GB; beyond, they are sent in chunks; default: half of what it has",
        resumable=True,
        machine=True,
    )


@dataclass(frozen=True)
class Devices:
    """What a run computes on."""

    used: tuple[jax.Device, ...]
    mesh: Mesh | None  # None: one device, and nothing is split
    size: int | None = None  # of what is split
    split: str = "examples of a step"

    def replicate(self, tree: Any) -> Any:
        """Arrays, whole on every device; of what is streamed, each chunk."""
        if isinstance(tree, Streamed):
            return dataclasses.replace(tree, put=self.replicate)
        return meshes.replicate(tree, self.mesh)

    def stack(self, trees: Sequence[Any]) -> Any:
        """Trees as one with a leading axis, which is split over the devices."""
        return meshes.stack(trees, self.mesh)

    def local(self, tree: Any) -> Any:
        """Such arrays as ordinary ones of one device; what is streamed is sent to one."""
        if isinstance(tree, Streamed):
            return dataclasses.replace(tree, put=lambda chunk: meshes.replicate(chunk, None))
        return tree if self.mesh is None else meshes.local(tree)

    def under(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, compiled for all of them when it is called; see :mod:`planar_vae_jax.train.mesh`."""
        if self.mesh is None:
            return function

        def called(*args: Any, **kwargs: Any) -> Any:
            with jax.set_mesh(self.mesh):
                return function(*args, **kwargs)

        return called

    def describe(self) -> dict[str, Any]:
        """For ``config.json``."""
        first = self.used[0]
        return {
            "platform": first.platform,
            "kind": first.device_kind,
            "count": jax.device_count(),
            "used": len(self.used),
            "processes": processes.count(),
            "cpus": os.cpu_count(),
        }

    def __str__(self) -> str:
        """For people: ``8 of 8 devices (cpu), 16 of the 128 examples of a step on each``."""
        kind = self.used[0].device_kind
        if self.mesh is None:
            return f"1 of {jax.device_count()} devices ({kind})" if jax.device_count() > 1 else f"1 device ({kind})"
        of = f" of {processes.count()} processes" if processes.count() > 1 else ""
        share = "" if self.size is None else f", {self.size // len(self.used)} {self.split} on each"
        return f"{len(self.used)} of {jax.device_count()} devices ({kind}){of}{share}"


def one_device() -> Devices:
    """JAX's first."""
    return Devices((_all_devices()[0],), None)


def choose_devices(config: DeviceFlags, batch_size: int) -> Devices:
    """Joins the run's other processes, if there are any (JAX may not have been used before); then what ``--devices``
    asks for: batches of this size are split over them evenly, and each process has as many.

    Raises:
        UsageError: there are not so many, or they do not divide the batch; the processes cannot be joined.
    """
    processes.join(config.coordinator, config.num_processes, config.process_id)
    there: list[list[jax.Device]] = [[] for _ in range(processes.count())]
    for device in _all_devices():
        there[device.process_index].append(device)
    number, most = len(there), min(map(len, there))
    sizes = [number * each for each in range(1, most + 1) if batch_size % (number * each) == 0]
    if not sizes:
        near = [batch_size // number * number, -(-batch_size // number) * number]
        raise UsageError(
            f"--batch_size must be a multiple of the {number} processes; got {batch_size}; the nearest: "
            f"{', '.join(str(size) for size in near if size)}"
        )
    count = sizes[-1] if config.devices == "all" else _count(config.devices)
    if count not in sizes:
        wish = f"divide --batch_size={batch_size}"
        if count > number * most:
            wish = f"be at most the {number * most} there are"
        elif count % number:
            wish = f"be a multiple of the {number} processes"
        raise UsageError(f"--devices must {wish}; got {count}; the nearest: {_nearest(count, sizes)}")
    used = tuple(device for devices in there for device in devices[: count // number])
    return Devices(used, meshes.data_mesh(used) if count > 1 else None, batch_size)


def choose_devices_of_seeds(config: DeviceFlags, seeds: int) -> Devices:
    """What seeds are split over: of the devices that ``--devices`` allows, the largest number that divides theirs.

    Raises:
        UsageError: there are not so many.
    """
    there = _all_devices()
    count = len(there) if config.devices == "all" else _count(config.devices)
    if count > len(there):
        raise UsageError(f"--devices must be at most the {len(there)} there are; got {count}")
    count = next(number for number in range(min(count, seeds), 0, -1) if seeds % number == 0)
    used = tuple(there[:count])
    return Devices(used, meshes.data_mesh(used) if count > 1 else None, seeds, f"of the {seeds} seeds")


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise UsageError(f"--devices must be all, or a whole number of at least 1; got {text!r}")
    return count


def _nearest(count: int, sizes: list[int]) -> str:
    """The greatest below and the least above."""
    below, above = [size for size in sizes if size < count], [size for size in sizes if size > count]
    return ", ".join(map(str, [*below[-1:], *above[:1]]))


def _all_devices() -> list[jax.Device]:
    try:
        return jax.devices()
    except RuntimeError as error:  # of JAX_PLATFORMS=cuda where there is no such thing
        raise RunError(f"JAX finds no device: {' '.join(str(error).split())}") from error


def missing_accelerator() -> str | None:
    """Why this machine seems to have an accelerator that JAX does not use, or ``None``."""
    if jax.default_backend() != "cpu" or getattr(jax.config, "jax_platforms", None):  # the CPU was asked for
        return None
    signs = [sign for sign in _SIGNS if Path(sign).exists()]
    packages = [package for package in _PACKAGES if importlib.util.find_spec(package)]
    if not signs and not packages:
        return None
    found = f"{signs[0]} is there" if signs else f"{packages[0]} is installed"
    return f"an accelerator was expected, as {found}, but JAX found none: this run computes on the CPU"
