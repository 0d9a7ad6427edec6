"""One run in several processes, on JAX's distributed runtime: joining, agreeing, leaving.

All processes run the same program and make the same calls of compiled functions. They share the run's folder; process 0
alone writes into it (:func:`on_first`), and where processes could differ, process 0 decides. If one process dies, the
next exchange of the others fails, or JAX ends them within two minutes and says why; the same command resumes the run.
"""

import contextlib
import json
import os
import re
import signal
import sys
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from planar_vae_jax.runs._files import RunError
from planar_vae_jax.runs.config import UsageError

_JOIN_SECONDS = 300  # within which all processes must have started

_index, _count = 0, 1


def index() -> int:
    """Returns the number of this process, from 0."""
    return _index


def count() -> int:
    """Returns the number of processes of the run."""
    return _count


def are_asked_for(coordinator: str | None, num_processes: int | None, process_id: int | None) -> bool:
    """Returns whether flags, a SLURM step of several tasks or a TPU slice of several hosts ask for several processes.

    Raises:
        UsageError: the flags contradict each other.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == 3:
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        return (tasks.isdecimal() and int(tasks) > 1) or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if missing:
        raise UsageError(
            f"--coordinator, --num_processes and --process_id belong together; {' and '.join(missing)} missing"
        )
    if not re.fullmatch(r"\S+:\d{1,5}", coordinator or ""):
        raise UsageError(f"--coordinator must be HOST:PORT, where process 0 can be reached; got {coordinator!r}")
    assert num_processes is not None
    if not 0 <= (process_id or 0) < num_processes:
        raise UsageError(f"--process_id must be less than --num_processes={num_processes}; got {process_id}")
    return num_processes > 1


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes, if there are any, before JAX is used; a second call does nothing.

    Raises:
        UsageError: the flags contradict each other, or JAX cannot join the processes.
    """
    global _index, _count
    if _count > 1 or not are_asked_for(coordinator, num_processes, process_id):
        return
    handler = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(AttributeError):  # JAX 0.7 has no such option
        jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=_JOIN_SECONDS,
            cluster_detection_method="deactivate" if coordinator else None,
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"--coordinator: the processes cannot be joined: {' '.join(str(error).split())}") from error
    _index, _count = jax.process_index(), jax.process_count()
    signal.signal(signal.SIGTERM, handler)  # JAX may have installed a handler
    if _index:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 # until the process ends


def leave() -> None:
    """Waits for the other processes, at an end that all of them reach."""
    global _count
    if _count > 1:
        jax.distributed.shutdown()
        _count = 1


# --- Agreeing. Every process calls these functions, in the same order.


def on_first(function: Callable[..., Any], *args: Any) -> Any:
    """Calls ``function(*args)`` in process 0 alone; every process gets its result (sent as JSON) or its error."""
    if _count == 1:
        return function(*args)
    told: dict[str, Any] = {}
    mine: Exception | None = None
    if _index == 0:
        try:
            told = {"value": function(*args)}
        except (UsageError, RunError, OSError) as error:
            mine, told = error, {"usage": isinstance(error, UsageError), "error": str(error)}
    told = _share(told)
    if mine is not None:
        raise mine
    if "error" in told:
        raise (UsageError if told["usage"] else RunError)(told["error"])
    return told["value"]


def of_first(number: int) -> int:
    """Returns the number that process 0 passes."""
    return number if _count == 1 else int(_gather(number)[0])


def of_any(number: int | None) -> int | None:
    """Returns the number that the first process with a number passes; None if no process passes one."""
    if _count == 1:
        return number
    return next((int(one) for one in _gather(number or 0) if one), None)


def check_same(content: Any) -> None:
    """Checks that all processes pass the same content.

    Raises:
        UsageError: the contents differ.
    """
    if _count == 1:
        return
    sums = _gather(zlib.crc32(json.dumps(content, sort_keys=True).encode()) & 0x7FFFFFFF)
    others = [str(number) for number, one in enumerate(sums) if one != sums[0]]
    if others:
        raise UsageError(
            f"all processes need the same flags (but --process_id), data and versions; these differ from process 0: "
            f"{', '.join(others)}"
        )


def _share(content: Any) -> Any:
    """Returns what process 0 passes, sent as JSON."""
    raw = np.frombuffer(json.dumps(content).encode() if _index == 0 else b"", np.uint8)
    size = of_first(len(raw))
    room = max(1024, 1 << (size - 1).bit_length())  # few different sizes, as each is compiled
    from jax.experimental import multihost_utils

    padded = multihost_utils.broadcast_one_to_all(np.pad(raw, (0, room - len(raw))))
    return json.loads(np.asarray(padded)[:size].tobytes())


def _gather(number: int) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.array(number, np.int32)))
