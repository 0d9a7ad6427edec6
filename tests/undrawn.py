"""Runs of ``experiments.mnist`` without pages, which take most of a tiny run's time.

    python -m tests.undrawn EXPERIMENT FLAGS

is ``python -m experiments.EXPERIMENT FLAGS`` without them.
"""

import importlib
import sys


def undraw():
    """From now on, runs in this process draw none."""
    from experiments import mnist

    mnist.draw_pages = mnist.draw_losses = lambda *args: None


if __name__ == "__main__":
    from planar_vae_jax.runs.console import run_main

    undraw()
    experiment = importlib.import_module(f"experiments.{sys.argv.pop(1)}")
    run_main(experiment.main)
