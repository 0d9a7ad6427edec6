"""A toy run: least squares over a few examples, or without data; a tenth of a second.

python -m tests.toy --workdir=DIR
"""

import functools
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from planar_vae_jax.data.streamed import Streamed
from planar_vae_jax.runs.config import flag, parse_run
from planar_vae_jax.runs.console import run_main
from planar_vae_jax.runs.devices import DeviceFlags, choose_devices
from planar_vae_jax.runs.fit import Fitted, fit
from planar_vae_jax.runs.folder import open_run

EXAMPLES, BATCH, STEPS = 23, 5, 4  # examples; by default those of a step, and steps of an epoch: 23 // 5


@dataclass(frozen=True)
class Config(DeviceFlags):
    """Flags of a toy run."""

    epochs: int = flag(3, "passes over the examples", at_least=1, resumable=True)
    seed: int = flag(0, "everything random follows from it", at_least=0, named=True)
    patience: int = flag(0, "epochs without a better distance", at_least=0, resumable=True)
    rate: float = flag(0.1, "of gradient descent with momentum", above=0.0)
    classes: tuple[int, ...] | None = flag(None, "nothing")
    samples: int = flag(4, "of the evaluation", at_least=1, evaluation=True)
    bomb: int = flag(-1, "the step whose loss is NaN", resumable=True)
    batch: int = flag(BATCH, "examples a step", at_least=1, at_most=EXAMPLES)
    data: str = flag("examples", "examples, or none", choices=("examples", "none"))
    pause: float = flag(0.0, "seconds that each report takes", at_least=0.0, resumable=True)
    other: bool = flag(False, "other examples", resumable=True)
    other_valid: bool = flag(False, "other validation examples", resumable=True)
    chunk: int = flag(0, "bytes of a chunk of the examples; 0: they are whole", at_least=0, resumable=True)


def examples(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(EXAMPLES, 3)).astype(np.float32)
    return {"x": x, "y": x.sum(1)}


@functools.cache  # one object for each bomb: what is compiled for it is compiled once
def make_loss(bomb: int):
    return functools.partial(loss, bomb=bomb)


@functools.cache
def make_optimizer(rate: float) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=0.9)


def loss(params, batch, key, step, *, bomb):
    """Squared error with noise on the parameters, so that keys matter."""
    noise = 0.01 * jax.random.normal(key, params["w"].shape)
    x = jax.random.normal(jax.random.fold_in(key, 1), (BATCH, 3)) if batch is None else batch["x"]
    y = jnp.sum(x, axis=1) if batch is None else batch["y"]
    value = jnp.mean(jnp.square(x @ (params["w"] + noise) + params["b"] - y))
    return jnp.where(step == bomb, jnp.nan, value), {"loss": value, "noise": jnp.sum(noise)}


def report(params) -> dict[str, float | None]:
    return {"distance": float(jnp.sum(jnp.square(params["w"] - 1.0))), "nothing": None}


def streamed(data: dict[str, np.ndarray], chunk_bytes: int) -> Streamed:
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), data)
    return Streamed(lambda rows: jax.tree.map(lambda leaf: leaf[rows], data), like, EXAMPLES, chunk_bytes)


def arguments(config: Config) -> dict[str, Any]:
    """The arguments of ``fit`` after the run."""
    data = None if config.data == "none" else examples(int(config.other))
    data = streamed(data, config.chunk) if data and config.chunk else data
    return {
        "loss": make_loss(config.bomb),
        "optimizer": make_optimizer(config.rate),
        **begin(config),
        "steps": EXAMPLES // config.batch * config.epochs if data else 4 * config.epochs - 2,
        "steps_per_epoch": EXAMPLES // config.batch if data else STEPS,
        "data": data,
        "batch_size": config.batch if data else None,
        "report": lambda params: (time.sleep(config.pause), report(params))[1],
        "score": "distance",
        "patience": config.patience,
        "show": ("loss", "distance"),
        "unit": "epoch" if data else "step",
    }


def begin(config: Config) -> dict[str, Any]:
    return {"params": {"w": jnp.zeros(3), "b": jnp.zeros(())}, "key": jax.random.key(config.seed)}


def train(config: Config, run) -> Fitted:
    """Trains; returns what ``fit`` does."""
    return fit(run, **arguments(config))


def identity(config: Config) -> dict | None:
    """What identifies its examples."""
    if config.data == "none":
        return None
    sums = {"crc32": int(config.other), "crc32_valid": int(config.other_valid)}
    return {"name": "examples", "source": "here", **sums}


def main(argv: list[str]) -> None:
    config = parse_run(Config, argv, __doc__, "toy")
    places = {name: getattr(config, name) for name in ("devices", "coordinator", "num_processes", "process_id")}
    with open_run(config, "toy", identity(config), choose_devices(config.batch, **places)) as run:
        if run.finished:
            return
        fitted = train(config, run)
        final = {name: np.asarray(value).tolist() for name, value in fitted.params.items()}
        stopped = {"patience": config.patience, "stopped_early": fitted.stopped_early, "best_epoch": fitted.epoch}
        epochs = {"epochs": len(fitted.lines), **(stopped if config.patience else {})}
        run.finish({**epochs, "samples": config.samples, **final, "seconds": run.seconds()})


if __name__ == "__main__":
    run_main(main)
