"""Experiments without the pictures of each run, which take most of the time of a tiny run.

    python -m tests.undrawn EXPERIMENT FLAGS

is ``python -m experiments.EXPERIMENT FLAGS`` without them.
"""

import importlib
import sys

if __name__ == "__main__":
    from planar_vae_jax.runs.console import run_main

    experiment = importlib.import_module(f"experiments.{sys.argv.pop(1)}")
    run_main(lambda argv: experiment.main(argv, pictures=False))
