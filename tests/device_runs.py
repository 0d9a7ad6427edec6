"""Runs of ``experiments.mnist`` on host devices; started by test_devices.py in a process of its own.

    python -m tests.device_runs 8 "--workdir=a --devices=1" "--workdir=b --devices=2" ...

The first argument is how many devices there are, each further one the flags of a run; a mistake is printed.
"""

import os
import sys

if __name__ == "__main__":
    count = f"--xla_force_host_platform_device_count={sys.argv[1]}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"

    from experiments import mnist
    from planar_vae_jax.runs.config import UsageError

    for flags in sys.argv[2:]:
        try:
            mnist.main(flags.split(), pictures=False)
        except UsageError as error:
            print(f"error: {error}", flush=True)
