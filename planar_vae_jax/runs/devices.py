"""The devices that a run computes on: batches are split over them, everything else is whole on each."""

import contextlib
import dataclasses
import importlib.util
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from planar_vae_jax.data.streamed import Streamed
from planar_vae_jax.runs import _hosts
from planar_vae_jax.runs._files import RunError
from planar_vae_jax.runs.config import RunFlags, UsageError, flag
from planar_vae_jax.train import mesh as meshes

# Files that exist on a machine with an accelerator, and packages that are installed to use one.
_SIGNS = ("/dev/nvidia0", "/dev/kfd", "/dev/accel0")
_PACKAGES = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm60_plugin", "jax_rocm7_plugin")


@dataclass(frozen=True)
class DeviceFlags(RunFlags):
    """Flags of a run that may use several devices; the values go to :func:`choose_devices`."""

    devices: str = flag(
        "all", "number of devices to split batches over; all: as many as divide the batch", resumable=True, machine=True
    )
    coordinator: str | None = flag(
        None, "HOST:PORT of process 0, for a run in several processes", resumable=True, machine=True
    )
    num_processes: int = flag(None, "number of processes", at_least=1, resumable=True, machine=True)
    process_id: int = flag(None, "number of this process, from 0", at_least=0, resumable=True, machine=True)
    images: str = flag(
        None,
        "where images are kept: whole on each device, or on the host, from which chunks are sent ahead of their use; "
        "default: device, but host for a folder of npy files",
        choices=("device", "host"),
        resumable=True,
        machine=True,
    )


@dataclass(frozen=True)
class Devices:
    """The devices that a run computes on."""

    used: tuple[jax.Device, ...]
    mesh: Mesh | None  # None: one device, and nothing is split
    batch_size: int | None = None  # examples in each batch that is split

    def replicate(self, tree: Any) -> Any:
        """Returns the arrays, whole on every device; for :class:`Streamed` examples, this holds for each chunk."""
        if isinstance(tree, Streamed):
            return dataclasses.replace(tree, put=self.replicate)
        return meshes.replicate(tree, self.mesh)

    def local(self, tree: Any) -> Any:
        """Returns arrays that are whole on every device as ordinary arrays of one device."""
        if isinstance(tree, Streamed):
            return dataclasses.replace(tree, put=lambda chunk: meshes.replicate(chunk, None))
        return tree if self.mesh is None else meshes.local(tree)

    def active(self) -> AbstractContextManager[Any]:
        """A context in which functions are compiled for all of these devices (:mod:`planar_vae_jax.train.mesh`)."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def describe(self) -> dict[str, Any]:
        """Returns the facts about the devices that ``config.json`` holds."""
        first = self.used[0]
        return {
            "platform": first.platform,
            "kind": first.device_kind,
            "count": jax.device_count(),
            "used": len(self.used),
            "processes": _hosts.count(),
            "cpus": os.cpu_count(),
        }

    def __str__(self) -> str:
        """For people: ``8 of 8 devices (cpu), 16 examples of a step on each``."""
        kind = self.used[0].device_kind
        if self.mesh is None:
            return f"1 of {jax.device_count()} devices ({kind})" if jax.device_count() > 1 else f"1 device ({kind})"
        of = f" of {_hosts.count()} processes" if _hosts.count() > 1 else ""
        share = "" if self.batch_size is None else f", {self.batch_size // len(self.used)} examples of a step on each"
        return f"{len(self.used)} of {jax.device_count()} devices ({kind}){of}{share}"


def one_device() -> Devices:
    """Returns JAX's first device, without a mesh."""
    return Devices((_all_devices()[0],), None)


def choose_devices(
    batch_size: int,
    devices: str = "all",
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Devices:
    """Joins the other processes of the run, if there are any, and chooses the devices that batches are split over.

    JAX must not have been used before in a run of several processes. Batches are split evenly, and every process uses
    as many devices as the others.

    Args:
        batch_size: examples a step.
        devices: the value of ``--devices``: "all", or a number.
        coordinator, num_processes, process_id: the values of the flags of the same names.

    Raises:
        UsageError: the machine has fewer devices, their number does not divide the batch, or the processes cannot be
            joined.
        RunError: JAX finds no device.
    """
    _hosts.join(coordinator, num_processes, process_id)
    there: list[list[jax.Device]] = [[] for _ in range(_hosts.count())]
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
    count = sizes[-1] if devices == "all" else _count(devices)
    if count not in sizes:
        wish = f"divide --batch_size={batch_size}"
        if count > number * most:
            wish = f"be at most the {number * most} there are"
        elif count % number:
            wish = f"be a multiple of the {number} processes"
        raise UsageError(f"--devices must {wish}; got {count}; the nearest: {_nearest(count, sizes)}")
    used = tuple(device for mine in there for device in mine[: count // number])
    return Devices(used, meshes.data_mesh(used) if count > 1 else None, batch_size)


def _count(text: str) -> int:
    count = int(text) if text.isdecimal() else 0
    if count < 1:
        raise UsageError(f"--devices must be all, or a whole number of at least 1; got {text!r}")
    return count


def _nearest(count: int, sizes: list[int]) -> str:
    """Returns the greatest size below ``count`` and the least above it."""
    below, above = [size for size in sizes if size < count], [size for size in sizes if size > count]
    return ", ".join(map(str, [*below[-1:], *above[:1]]))


def _all_devices() -> list[jax.Device]:
    try:
        return jax.devices()
    except RuntimeError as error:  # such as JAX_PLATFORMS=cuda on a machine without CUDA
        raise RunError(f"JAX finds no device: {' '.join(str(error).split())}") from error


def missing_accelerator() -> str | None:
    """Returns why this machine seems to have an accelerator that JAX does not use; None if it seems to have none."""
    if jax.default_backend() != "cpu" or getattr(jax.config, "jax_platforms", None):  # the CPU was asked for
        return None
    signs = [sign for sign in _SIGNS if Path(sign).exists()]
    packages = [package for package in _PACKAGES if importlib.util.find_spec(package)]
    if not signs and not packages:
        return None
    found = f"{signs[0]} exists" if signs else f"{packages[0]} is installed"
    return f"an accelerator was expected, as {found}, but JAX found none: this run computes on the CPU"
