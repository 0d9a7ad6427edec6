"""Toys of several seeds, trained as one program, and each of them alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import toy

from planar_vae_jax.runs.config import parse_run
from planar_vae_jax.runs.fit import fit
from planar_vae_jax.runs.folder import open_run

SEEDS = (0, 1, 2)


def start(config, seeds):
    """Parameters with a leading axis of seeds, and their keys ``[S]``."""
    starts = [toy.begin(dataclasses.replace(config, seed=seed)) for seed in seeds]
    return {
        "params": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(one["params"] for one in starts)),
        "key": jnp.stack([one["key"] for one in starts]),
    }


def train(workdir, *flags, seeds=SEEDS, devices=None, **changed):
    """What ``fit`` returns for seeds together; ``changed``: other arguments of ``fit``."""
    config = parse_run(toy.Config, [f"--workdir={workdir}", *flags], toy.__doc__)
    arguments = toy.arguments(config) | {"score": None, "patience": 0} | start(config, seeds) | changed
    with open_run(config, "toy", toy.identity(config), devices) as run:
        return fit(run, **arguments)


def train_alone(workdir, *flags, seed):
    """What ``fit`` returns for one seed."""
    config = parse_run(toy.Config, [f"--workdir={workdir}", f"--seed={seed}", *flags], toy.__doc__)
    with open_run(config, "toy", toy.identity(config)) as run:
        return fit(run, **toy.arguments(config) | {"score": None, "patience": 0})


def timeless(lines):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_seed_is_as_alone(together, number, alone):
    """Parameters, optimiser and lines of one of the seeds are those of the seed alone, to rounding."""
    close = {"rtol": 2e-5, "atol": 1e-6}
    ours = jax.tree.map(lambda leaf: np.asarray(leaf)[number], (together.params, together.state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), ours, (alone.params, alone.state))
    for line, expected in zip(*(timeless(fitted.lines) for fitted in (together, alone)), strict=True):
        assert list(line) == list(expected)
        line = {name: value[number] if isinstance(value, list) else value for name, value in line.items()}
        assert {name for name, value in line.items() if value is None} == {
            name for name, value in expected.items() if value is None
        }
        known = [name for name, value in line.items() if value is not None]
        np.testing.assert_allclose([line[name] for name in known], [expected[name] for name in known], **close)
