"""Toy seeds on four host devices; started by tests/runs/test_devices.py as a process.

    python -m tests.device_seeds FOLDER

trains four seeds over two devices, with an interruption, and each alone, and compares them.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    sys.path.insert(0, os.path.dirname(__file__))

    import jax
    import numpy as np
    from seeds import assert_seed_is_as_alone, timeless, train, train_alone

    from planar_vae_jax.runs.devices import Devices
    from planar_vae_jax.train import mesh

    folder, seeds = Path(sys.argv[1]), (0, 1, 2, 3)
    used = tuple(jax.devices()[:2])
    devices = Devices(used, mesh.data_mesh(used))
    together = train(folder / "together", seeds=seeds, devices=devices)
    for number, seed in enumerate(seeds):
        assert_seed_is_as_alone(together, number, train_alone(folder / str(seed), seed=seed))
    train(folder / "resumed", "--epochs=1", seeds=seeds, devices=devices)
    resumed = train(folder / "resumed", seeds=seeds, devices=devices)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, together.state)
    assert timeless(resumed.lines) == timeless(together.lines)
    print("all the same", len(together.params["w"]))
