"""Seeds trained together on 8 host devices; started by test_devices.py in a process of its own.

    python -m tests.device_seeds FILE.npz FOLDER

trains 8 seeds of a tiny VAE in FOLDER/alone, one after the other on one device, and in FOLDER/together, all at once.
"""

import contextlib
import dataclasses
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

    from planar_vae_jax.runs.placement import Placement
    from planar_vae_jax.runs.together import Seed, fit_together

    from experiments import mnist
    from planar_vae_jax.data import load_images
    from planar_vae_jax.runs.config import UsageError, parse
    from planar_vae_jax.runs.devices import choose_devices_of_seeds
    from planar_vae_jax.runs.fit import fit
    from planar_vae_jax.runs.folder import open_run

    flags = (
        "--epochs=2 --checkpoint_every=2 --hidden=8 --latent=6 --batch_size=16 --flows=3 --amortized --validation=30"
    )
    config = parse(mnist.Config, [*flags.split(), f"--dataset={sys.argv[1]}"], "")
    data, identity = load_images(config.dataset, None, None, config.validation, print)
    config = mnist.with_defaults(config, mnist.check_data(config, data))

    def of_seed(way, seed):
        return dataclasses.replace(config, seed=seed, workdir=str(Path(sys.argv[2]) / way / f"seed={seed}"))

    devices = choose_devices_of_seeds(dataclasses.replace(config, devices="1"), 8)
    vae, training, *_ = mnist.prepare(
        config, data, Placement(data, config.binarization, devices, config.batch_size, None)
    )
    starts = [mnist.begin(vae, of_seed("alone", seed)) for seed in range(8)]
    for seed, start in enumerate(starts):
        with open_run(of_seed("alone", seed), "mnist", identity, devices) as run:
            fit(run, **start, **training)

    devices = choose_devices_of_seeds(config, 8)
    _, training, *_ = mnist.prepare(
        config, data, Placement(data, config.binarization, devices, config.batch_size, None)
    )
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(open_run(of_seed("together", s), "mnist", identity, devices)) for s in range(8)]
        fit_together([Seed(run, **start) for run, start in zip(runs, starts, strict=True)], **training)

    for asked, seeds in (("all", 6), ("4", 6), ("all", 5), ("all", 13), ("2", 8), ("9", 8)):
        try:
            found = str(choose_devices_of_seeds(dataclasses.replace(config, devices=asked), seeds))
        except UsageError as error:
            found = f"error: {error}"
        print(asked, seeds, found, flush=True)
