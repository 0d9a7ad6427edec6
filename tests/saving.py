"""Trees that are saved and come back, for the tests of checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from planar_vae_jax.runs.checkpoints import Checkpoints, read_checkpoint

PARAMS = {
    "w": np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32),
    "b": [jnp.zeros(()), jnp.zeros((0, 2))],
}


def make(seed):
    """A tree with everything that a run has: an optimiser's state, whole numbers, a typed key, odd floats."""
    params = jax.tree.map(lambda leaf: leaf + seed, PARAMS)
    return {
        "params": params,
        "opt": optax.adam(0.1).init(params),
        "step": jnp.int32(seed),
        "key": jax.random.key(seed),
        "odd": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-40], jnp.float32),
        "half": jnp.arange(3, dtype=jnp.bfloat16),
    }


def bits(tree):
    return [
        np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf).tobytes()
        for leaf in jax.tree.leaves(tree)
    ]


class Folder:
    """Opens the folder anew each time, as a new process does."""

    def __init__(self, path):
        self.path, self.told = path, []

    def __call__(self, action, keep=3):
        checkpoints = Checkpoints(self.path, keep=keep, warn=self.told.append)
        try:
            return action(checkpoints)
        finally:
            checkpoints.close()

    def save(self, *steps, keep=3):
        def action(checkpoints):
            for step in steps:
                checkpoints.save(step, make(step), {"number": step})

        self(action, keep)

    def restore(self):
        return self(lambda checkpoints: checkpoints.restore(make(0)))

    def read(self, which):
        return read_checkpoint(self.path, which, warn=self.told.append)

    def steps(self):
        return sorted(int(path.name) for path in self.path.iterdir() if path.name.isdecimal())

    def contents(self):
        return {path: path.read_bytes() for path in self.path.rglob("*") if path.is_file()}

    def array_file(self, step):
        """The largest file of the step, with the larger arrays."""
        files = (path for path in (self.path / str(step) / "state").rglob("*") if path.is_file())
        return max(files, key=lambda path: path.stat().st_size)

    def meta_file(self, step):
        return self.path / str(step) / "meta" / "metadata"


def flip(file, at=0.5):
    raw = bytearray(file.read_bytes())
    raw[int(at * (len(raw) - 1))] ^= 16
    file.write_bytes(raw)
