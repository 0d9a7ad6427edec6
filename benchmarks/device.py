"""Operations, bytes and kernels of a compiled program, and the peaks of the device that it runs on."""

import re
from typing import Any, NamedTuple

NO_KERNELS = {"parameter", "get-tuple-element", "tuple", "constant", "bitcast", "call"}


class Limits(NamedTuple):
    """Peaks of a device as its maker states them; None if not stated."""

    flops: float | None  # float32 operations per second, without tensor cores
    bytes: float  # memory traffic per second


# The first entry whose name occurs in JAX's ``device_kind`` applies.
LIMITS = {
    "H200": Limits(67e12, 4.8e12),
    "H100 PCIe": Limits(51e12, 2.0e12),
    "H100": Limits(67e12, 3.35e12),
    "A100-SXM4-80GB": Limits(19.5e12, 2.039e12),
    "A100": Limits(19.5e12, 1.555e12),
    "V100": Limits(15.7e12, 0.9e12),
    "L4": Limits(30.3e12, 0.3e12),
    "T4": Limits(8.1e12, 0.32e12),
    "TPU v6 lite": Limits(None, 1.64e12),
    "TPU v5 lite": Limits(None, 0.819e12),
    "TPU v4": Limits(None, 1.2e12),
}


def limits(device_kind: str) -> Limits | None:
    """Returns the peaks of a device, or None if they are unknown."""
    return next((found for name, found in LIMITS.items() if name in device_kind), None)


def costs(compiled: Any) -> dict[str, float | None]:
    """Returns operations, bytes read and written, and kernels of a compiled program; None for what is unknown.

    The compiler counts the body of a loop once, and counts nothing inside the kernels of external libraries.
    """
    found = compiled.cost_analysis()
    analysis = found[0] if isinstance(found, list) and found else found or {}
    text = compiled.as_text()
    return {
        "operations": analysis.get("flops"),
        "bytes": analysis.get("bytes accessed"),
        "kernels": None if text is None else kernels(text),
    }


def kernels(hlo: str) -> int:
    """Returns the number of instructions that an HLO program launches one after the other; a loop counts as one."""
    count, inside = 0, False
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):  # a computation; CUDA graphs are computations of their own
            inside = line.startswith("ENTRY") or line.startswith("%command_buffer")
        opcode = re.search(r"[\])}] ([a-z][-a-z]*)\(", line)
        count += inside and opcode is not None and opcode[1] not in NO_KERNELS
    return count


def share(amount: float | None, peak: float | None, milliseconds: float) -> float | None:
    """Returns ``amount`` per time as a fraction of the peak per second; None if either is unknown."""
    return None if amount is None or peak is None else amount / (milliseconds / 1e3) / peak
