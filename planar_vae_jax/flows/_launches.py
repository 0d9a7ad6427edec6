"""On a GPU the host launches every kernel, which takes longer than most kernels of a flow do."""

import jax


def are_dear() -> bool:
    """Whether JAX computes on a GPU. How a flow is computed follows from it, never what."""
    return jax.default_backend() == "gpu"
