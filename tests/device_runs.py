"""Toy runs on several host devices; started by tests/runs/test_devices.py as a process.

    python -m tests.device_runs 4 "--workdir=a --devices=1" "--workdir=b --devices=2" ...

The first argument is how many devices the process has, each further one the flags of a run; a mistake is printed.
"""

import os
import sys

if __name__ == "__main__":
    count = f"--xla_force_host_platform_device_count={sys.argv[1]}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"
    sys.path.insert(0, os.path.dirname(__file__))

    import toy

    from planar_vae_jax.runs.config import UsageError

    for flags in sys.argv[2:]:
        try:
            toy.main(flags.split())
        except UsageError as error:
            print(f"error: {error}", flush=True)
