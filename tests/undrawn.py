"""``python -m tests.undrawn EXPERIMENT FLAGS``: an experiment without pages, which take most of a tiny run's time."""

import importlib
import sys

if __name__ == "__main__":
    from experiments import mnist
    from planar_vae_jax.runs.console import run_main

    mnist.draw_pages = mnist.draw_losses = lambda *args: None
    experiment = importlib.import_module(f"experiments.{sys.argv.pop(1)}")
    run_main(experiment.main)
