"""Tiny images for runs of experiments.mnist: mostly of one size, so that runs share what is compiled."""

import json

import numpy as np

from experiments import mnist

SHAPE, TRAIN, TEST = (8, 4), 90, 30
TINY = ("--epochs=2", "--hidden=8", "--latent=2", "--batch_size=16", "--nll_samples=4", "--flows=2")


def bars(size, shape, seed=0):
    """``size`` images of three classes, noise with a bar of the class's column; labels."""
    labels = np.arange(size) % 3
    x = np.random.default_rng(seed).integers(0, 60, (size, *shape), np.uint8)
    for one, label in zip(x, labels, strict=True):
        one[:, label] = 255 if len(shape) == 2 else [255, 40 * label, 128][: shape[2]]
    return x, labels.astype(np.uint8)


def write_bars(path, shape=SHAPE):
    """Images that a tiny VAE can learn."""
    (x_train, y_train), (x_test, y_test) = bars(TRAIN, shape), bars(TEST, shape, seed=1)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


def write_noise(path, train=TRAIN, shape=SHAPE, **labels):
    """Images that hold nothing to learn; ``labels``: ``y_train``, ``y_test``."""
    generator, sizes = np.random.default_rng(0), {"x_train": train, "x_test": TEST}
    images = {name: generator.integers(0, 256, (size, *shape), np.uint8) for name, size in sizes.items()}
    np.savez(path, **images, **labels)
    return path


def run(images, workdir, *flags, pictures=False):
    """A tiny run; its summary."""
    tiny = [flag for flag in TINY if "--encoder=conv" not in flags or "hidden" not in flag]
    mnist.main([*tiny, f"--dataset={images}", f"--workdir={workdir}", *flags], pictures=pictures)
    return json.loads((workdir / "summary.json").read_text())
