"""On a GPU the host launches every kernel, which takes longer than most kernels of a flow do.

There, loops over layers write a few layers out in each step, in operations that XLA puts into one kernel.
"""

import jax

# Layers that are written out in a row. More take longer to compile and run no faster (docs/benchmarks.md).
WRITTEN_OUT = 8


def are_dear() -> bool:
    """Whether JAX computes on a GPU. How a flow is computed follows from it, never what."""
    return jax.default_backend() == "gpu"
