"""One run in several processes, on JAX's distributed runtime: joining, agreeing, and the end of one of them.

All processes run the same program and take the same calls of what is compiled. Whatever touches the run's folder is
done by process 0 alone (:func:`on_first`), which shares the outcome; where processes could differ, process 0 decides
(:func:`of_first`). One that dies takes the others with it: their next exchange fails, or JAX's heartbeats end them
within 100 seconds, and each says so in one line.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from planar_vae_jax.runs import native_errors
from planar_vae_jax.runs.config import UsageError
from planar_vae_jax.runs.files import RunError

JOIN_SECONDS = 300  # for all processes to come
LOST = "another process of this run has ended; run the same command again in all of them to go on"
# Of errors that are no error of this process: gloo's, the coordination service's.
_OF_OTHERS = re.compile(
    r"gloo|closed by peer|connection reset|coordination|distributed service|heartbeat|barrier", re.I
)

_index, _count = 0, 1
_listener: Any = None  # to what C++ writes on stderr
_abort_handler: Any = None  # ctypes calls it for as long as the process lives


def index() -> int:
    """This process's number."""
    return _index


def count() -> int:
    """How many there are."""
    return _count


# --- Joining and leaving


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the others, before JAX is used: those of the arguments, of a SLURM step, or of the hosts of a TPU slice.

    Does nothing where there is nothing to join, or for a second time.

    Raises:
        UsageError: for arguments that do not fit each other; or JAX has computed already.
    """
    global _index, _count, _abort_handler
    if _count > 1 or not (_given(coordinator, num_processes, process_id) or _of_a_cluster()):
        return
    _hear_native_errors()
    _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: os._exit(1))  # with the text of _when_ended
    ctypes.CDLL(None).signal(signal.SIGABRT, _abort_handler)  # Python's handler would be too late
    _when_ended(
        f"not all of the {num_processes or ''} processes came within {JOIN_SECONDS} s; see that all are started, with "
        f"one --coordinator ({coordinator}) that can be reached from each"
    )
    handler = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(AttributeError):  # JAX 0.7 has no such option
        jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=JOIN_SECONDS,
            cluster_detection_method="deactivate" if coordinator else None,
        )
        _index, _count = jax.process_index(), jax.process_count()
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"--coordinator: the processes cannot be joined: {' '.join(str(error).split())}") from error
    _when_ended(LOST)
    signal.signal(signal.SIGTERM, handler)  # ours again: JAX may have taken it
    if _index:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 # until the end


def _given(coordinator: str | None, num_processes: int | None, process_id: int | None) -> bool:
    """Whether the flags say what to join."""
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise UsageError(
            f"--coordinator, --num_processes and --process_id belong together; {' and '.join(missing)} missing"
        )
    if missing:
        return False
    if not re.fullmatch(r"\S+:\d{1,5}", coordinator or ""):
        raise UsageError(f"--coordinator must be HOST:PORT, where process 0 can be reached; got {coordinator!r}")
    assert num_processes is not None
    if not 0 <= (process_id or 0) < num_processes:
        raise UsageError(f"--process_id must be less than --num_processes={num_processes}; got {process_id}")
    return num_processes > 1


def _of_a_cluster() -> bool:
    """Whether JAX finds the others by itself: in a SLURM step of several tasks, on a TPU slice of several hosts."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return (tasks.isdecimal() and int(tasks) > 1) or "," in hosts


def leave() -> None:
    """At an end that all processes have in common: waits for the others."""
    global _count
    if _count > 1:
        jax.distributed.shutdown()
        _count = 1
        _when_ended("")


def end() -> None:
    """Ends this process alone, with status 1, once it has said why; the others will notice."""
    _when_ended("")
    os._exit(1)


def is_of_others(error: Exception) -> bool:
    """Whether an error means that another process has ended."""
    return _count > 1 and _OF_OTHERS.search(str(error)) is not None


def _hear_native_errors() -> None:
    """From now on, what C++ writes on stderr goes through a process of its own; what Python writes does not."""
    global _listener
    reader, writer = os.pipe()
    ours = os.dup(2)
    sys.stderr = os.fdopen(ours, "w", buffering=1)
    command = [sys.executable, "-S", native_errors.__file__]
    _listener = subprocess.Popen(command, stdin=reader, stdout=ours, start_new_session=True)
    os.dup2(writer, 2)
    os.close(reader)
    os.close(writer)


def _when_ended(text: str) -> None:
    """What is to be said where the runtime ends this process; nothing if it is empty."""
    if _abort_handler is not None:
        os.write(2, f"\0{text}\n".encode())


# --- Agreeing. Every process calls these, in the same order.


def on_first(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, called by process 0 alone; all get what it returns, as JSON has it, or raise its error."""
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
    """What process 0 has."""
    return number if _count == 1 else int(_gather(number)[0])


def of_any(number: int | None) -> int | None:
    """What the first process has that has anything."""
    if _count == 1:
        return number
    return next((int(one) for one in _gather(number or 0) if one), None)


def check_same(content: Any) -> None:
    """Checks that all processes were given the same.

    Raises:
        UsageError: they were not.
    """
    if _count == 1:
        return
    sums = _gather(zlib.crc32(json.dumps(content, sort_keys=True).encode()) & 0x7FFFFFFF)
    others = [str(number) for number, one in enumerate(sums) if one != sums[0]]
    if others:
        raise UsageError(
            f"all processes need the same flags (but --process_id), data and versions; not so: {', '.join(others)}"
        )


def arrays_of_first(tree: Any) -> Any:
    """Arrays of process 0; the others give arrays of the same shapes."""
    if _count == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    plain = [np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf) for leaf in leaves]
    shared = jax.device_put(_broadcast(plain))
    kept = [
        jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if _is_key(old) else new
        for new, old in zip(shared, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, kept)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _share(content: Any) -> Any:
    """What process 0 gives, by way of JSON."""
    raw = np.frombuffer(json.dumps(content).encode() if _index == 0 else b"", np.uint8)
    size = of_first(len(raw))
    room = max(1024, 1 << (size - 1).bit_length())  # few sizes: each is compiled
    return json.loads(_broadcast(np.pad(raw, (0, room - len(raw))))[:size].tobytes())


def _gather(number: int) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.array(number, np.int32)))


def _broadcast(tree: Any) -> Any:
    from jax.experimental import multihost_utils

    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))
