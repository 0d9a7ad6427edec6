"""The checkpoints of a run in several processes: process 0 reads and writes them, and shares what it reads.

In one process these are :class:`planar_vae_jax.runs.checkpoints.Checkpoints` and :func:`read_checkpoint` as they are.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax

from planar_vae_jax.runs import processes, reading
from planar_vae_jax.runs.checkpoints import Checkpoints, Restored
from planar_vae_jax.train import mesh as meshes


class _OneProcess:
    """``jax`` as it is where there is one process."""

    def __getattr__(self, name: str) -> Any:
        return {"process_count": lambda: 1, "process_index": lambda: 0}.get(name) or getattr(jax, name)


def _orbax_alone() -> None:
    """Process 0 calls Orbax alone, which would wait for all processes that JAX knows, in places without an option."""
    if processes.count() == 1:
        return
    reading.orbax()
    for name, module in list(sys.modules.items()):
        if name.startswith("orbax.") and getattr(module, "jax", None) is jax:
            module.jax = _OneProcess()  # type: ignore[attr-defined]


class SharedCheckpoints:
    """Those that process 0 has; every process calls each method, in the same order, and gets the same."""

    def __init__(self, own: Checkpoints):
        _orbax_alone()
        self._own = own

    def restore(self, like: Any) -> Restored | None:
        """See :meth:`Checkpoints.restore`."""
        like, found = meshes.local(like), None

        def read() -> dict[str, Any] | None:
            nonlocal found
            found = self._own.restore(like)
            return None if found is None else {"step": found.step, "meta": found.meta}

        told = processes.on_first(read)
        if told is None:
            return None
        return Restored(told["step"], processes.arrays_of_first(like if found is None else found.tree), told["meta"])

    def begin_to_write(self) -> None:
        """See :meth:`Checkpoints.begin_to_write`."""
        processes.on_first(self._own.begin_to_write)

    def save(self, step: int, tree: Any, meta: dict[str, Any], *, score: float | None = None) -> None:
        """See :meth:`Checkpoints.save`; the arrays are whole on every device."""
        tree = meshes.local(tree)
        processes.on_first(lambda: self._own.save(step, tree, meta, score=score))

    def wait(self) -> None:
        """See :meth:`Checkpoints.wait`."""
        processes.on_first(self._own.wait)

    def __enter__(self) -> "SharedCheckpoints":
        return self

    def __exit__(self, *error: Any) -> None:
        """Each by itself: the processes may be here for reasons of their own."""
        self._own.__exit__(*error)


def read_together(read: Callable[[], tuple[Any, Any]], like: Any) -> tuple[Any, Any]:
    """What process 0 reads: a tree of arrays like ``like``, and facts that fit into JSON."""
    _orbax_alone()
    found = like

    def call() -> Any:
        nonlocal found
        found, facts = read()
        return facts

    facts = processes.on_first(call)
    return processes.arrays_of_first(found), facts
