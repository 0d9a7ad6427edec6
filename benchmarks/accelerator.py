"""Flows and training steps on the device that JAX uses, beside the limits of that device.

    python -m benchmarks.accelerator --data_dir=DIR

prints tables and updates ``summary.json`` in ``runs/bench-accelerator`` after each of them. After ``--minutes`` it
begins no further measurement and prints what is missing.

- flows: value and gradient of K planar layers, one flow for all events and one for each event;
- steps: a training step of the VAE on synthetic images, for each K and each random number generator, with the kernels,
  operations and bytes that the compiler counts (``compiled.cost_analysis()``) and the operations of the matrix products
  (counted by hand), also as shares of the device's peaks if these are known;
- seeds: the same step of several runs at once, by ``jax.vmap``;
- quality: with ``--data_dir``, the seconds of training until the test free energy is at most ``--target`` nats.

It needs neither PyTorch nor TFDS. Compilation is not part of the times.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device import Limits, costs, limits, share
from benchmarks.flows import CASES, Case, parse_cases
from benchmarks.our_training import OurTraining, Task, synthetic_images
from benchmarks.problems import draw_problem
from benchmarks.products import operations
from benchmarks.race import race
from benchmarks.report import Results, load, machine, print_machine
from benchmarks.time_to_quality import evaluator, read_data, row, show
from benchmarks.timing import Contestant, compiled_anew, interleave, milliseconds
from planar_vae_jax import Planar, planar_flow
from planar_vae_jax.data import Dataset
from planar_vae_jax.runs.config import flag, parse
from planar_vae_jax.runs.console import run_main
from planar_vae_jax.train import loop as training
from planar_vae_jax.train.optimizers import OPTIMIZERS

GENERATORS = ("threefry2x32", "rbg", "unsafe_rbg")
SEEDS_FLOWS = 5  # K of several runs at once, and of quality
COLUMNS = {  # entry of a row -> head of its column, and the factor to the unit of the column
    "median_ms": ("ms", 1.0),
    "ms_a_seed": ("ms a seed", 1.0),
    "steps_a_second": ("a second", 1.0),
    "operations": ("GFLOP", 1e-9),
    "share_of_operations": ("% of peak", 1e2),
    "products": ("products", 1e-9),
    "share_of_products": ("% of peak", 1e2),
    "bytes": ("MB", 1e-6),
    "share_of_bytes": ("% of peak", 1e2),
    "kernels": ("kernels", 1.0),
    "seconds": ("seconds", 1.0),
    "epochs": ("epochs", 1.0),
    "last_free_energy": ("nats", 1.0),
    "ms_a_step": ("ms a step", 1.0),
    "compile_seconds": ("compile, s", 1.0),
}
Row = dict[str, Any]
Measurements = dict[str, Callable[[], Row]]  # what -> its row


@dataclass(frozen=True)
class Config:
    """Flags of ``benchmarks.accelerator``."""

    cases: str = flag(CASES, "sizes of the flows: batch, dimension and layers as BxDxK, joined by commas")
    parameters: str = flag(
        "both",
        "shared: one flow for all events; amortized: one for each event",
        choices=("both", "shared", "amortized"),
    )
    flows: tuple[int, ...] = flag((0, 5, 80), "K of the training steps", at_least=0)
    prng: str = flag(
        "both", "random number generator of the steps; both: threefry2x32 and rbg", choices=("both", *GENERATORS)
    )
    optimizer: str = flag("schedule_free", "optimiser of all training steps", choices=OPTIMIZERS)
    seeds: tuple[int, ...] = flag((1, 4, 16), f"numbers of runs trained at once, with K = {SEEDS_FLOWS}", at_least=1)
    steps: int = flag(100, "training steps per call", at_least=1)
    seconds: float = flag(1.0, "timed seconds for each measurement", above=0.0)
    rounds: int = flag(5, "turns over which these seconds are spread", at_least=1)
    batch_size: int = flag(128, "images per step", at_least=1)
    latent: int = flag(40, "size of z", at_least=1)
    hidden: int = flag(400, "width of the hidden layers", at_least=1)
    dataset: str = flag("mnist", "data set of the quality measurement, as in experiments.mnist")
    data_dir: str | None = flag(None, "folder with the data set's files; without it quality is not measured")
    target: float = flag(100.0, "test free energy to reach, nats")
    max_epochs: int = flag(15, "epochs after which the quality measurement ends", at_least=1)
    minutes: float = flag(7.0, "minutes after which no further measurement begins", above=0.0)
    workdir: str = flag("runs/bench-accelerator", "folder for the results")


def main(argv: list[str]) -> None:
    """Measures, prints and writes; ``argv`` without the program's name."""
    config = parse(Config, argv, __doc__)
    end = time.perf_counter() + 60.0 * config.minutes
    cases = parse_cases(config.cases, config.parameters)
    data = None if config.data_dir is None else read_data(config.dataset, config.data_dir)
    results = Results(config, "accelerator")
    facts = machine()
    print_machine(facts)
    peaks = limits(facts["device"])
    print(f"peaks a second: {peaks._asdict() if peaks else 'not known'}", flush=True)
    summary: Row = {"machine": facts, "limits": peaks._asdict() if peaks else None}
    left_out: list[str] = []
    for section, measurements in sections(config, cases, data, peaks).items():
        print(f"\n{section}")
        rows = []
        for name, measure in measurements.items():
            if time.perf_counter() > end:
                left_out.append(f"{section}: {name}")
                continue
            with compiled_anew():
                rows.append({"name": name, **measure()})
            print_row(rows[-1], heads=len(rows) == 1)
        summary |= {section: rows, "left_out": left_out, "load_average_at_end": load()}
        results.write(summary)
    if left_out:
        print(f"\nleft out after --minutes={config.minutes:g}: {'; '.join(left_out)}")
    print(f"\nsummary.json is in {results.workdir}", flush=True)


def sections(config: Config, cases: list[Case], data: Dataset | None, peaks: Limits | None) -> dict[str, Measurements]:
    """All measurements, in their order."""
    generators = ("threefry2x32", "rbg") if config.prng == "both" else (config.prng,)
    pixels = synthetic_images(0, config.steps * config.batch_size)
    steps = [(flows, prng, make_task(config, pixels, flows, prng)) for flows in config.flows for prng in generators]
    seeds = make_task(config, pixels, SEEDS_FLOWS, generators[0])
    return {
        "quality": {} if data is None else {f"K={SEEDS_FLOWS}": functools.partial(quality, config, data)},
        "steps": {f"K={K}, {prng}": functools.partial(step, config, task, peaks) for K, prng, task in steps},
        "seeds": {f"{count} at once": functools.partial(several_seeds, config, seeds, count) for count in config.seeds},
        "flows": {str(case): functools.partial(flow, config, case, peaks) for case in cases},
    }


def make_task(config: Config, pixels: np.ndarray, flows: int, prng: str) -> Task:
    """A training of the VAE on these images."""
    return Task(pixels, config.batch_size, 0, flows, config.latent, config.hidden, prng)


def timed(config: Config, run: Callable[[], Any]) -> Row:
    """Milliseconds a call of what has run before."""
    return milliseconds(interleave({"": Contestant(run)}, seconds=config.seconds, rounds=config.rounds)[""])


def shares(found: dict[str, float | None], peaks: Limits | None, ms: float) -> Row:
    """What the compiler counts, and which share of the device's peaks that is."""
    operations, moved = found["operations"], found["bytes"]
    return {
        **found,
        "share_of_operations": share(operations, peaks and peaks.flops, ms),
        "share_of_bytes": share(moved, peaks and peaks.bytes, ms),
    }


# --- The measurements.


def flow(config: Config, case: Case, peaks: Limits | None) -> Row:
    """Value and gradient of K planar layers (:mod:`benchmarks.flows`)."""

    def objective(params: Planar, z0: jax.Array) -> jax.Array:
        zK, log_det = planar_flow(params, z0)
        return jnp.mean(0.5 * jnp.sum(jnp.square(zK), -1) - log_det)

    problem = draw_problem(np.random.default_rng(0), **case._asdict())
    *layers, z0 = (jnp.asarray(array, jnp.float32) for array in problem)
    params = Planar(*layers)
    started = time.perf_counter()
    compiled = jax.jit(jax.value_and_grad(objective, argnums=(0, 1))).lower(params, z0).compile()
    seconds = time.perf_counter() - started
    times = timed(config, lambda: jax.block_until_ready(compiled(params, z0)))
    return {**times, **shares(costs(compiled), peaks, times["median_ms"]), "compile_seconds": seconds}


def step(config: Config, task: Task, peaks: Limits | None) -> Row:
    """A training step, from calls of ``--steps`` of them."""
    ours = OurTraining(task, config.optimizer)
    started = time.perf_counter()
    ours.compile()
    seconds = time.perf_counter() - started
    times = a_step(timed(config, lambda: ours.train(task.epoch_steps)), task.epoch_steps)
    ms, products = times["median_ms"], operations(task)
    return {
        **times,
        "steps_a_second": 1e3 / ms,
        **shares(costs(one_step(ours)), peaks, ms),
        "products": products,
        "share_of_products": share(products, peaks and peaks.flops, ms),
        "compile_seconds": seconds,
    }


def one_step(ours: OurTraining) -> Any:
    """A single step, compiled: with these constant bounds the compiler removes the loop, which it would count too."""

    def step(state: Any, info: Any, data: Any, order: Any, key: Any) -> Any:
        return training.train_steps(ours.loss, ours.optimizer, state, info, data, order, key, 0, 1)

    return jax.jit(step).lower(ours.state, ours.info, ours.data, ours.order, ours.steps_key).compile()


def a_step(times: Row, steps: int) -> Row:
    """Milliseconds a call as milliseconds a step."""
    return {name: value / steps if name.endswith("_ms") else value for name, value in times.items()}


def several_seeds(config: Config, task: Task, count: int) -> Row:
    """A training step of several runs at once, which differ in their key alone."""
    ours = OurTraining(task, config.optimizer)
    size, batch_size, steps = len(ours.data), task.batch_size, task.epoch_steps
    keys = jax.random.split(ours.key, count)
    state = jax.vmap(lambda key: training.init_state(task.model(key), ours.optimizer))(keys)

    def epoch(state: Any, key: Any, data: Any, info: Any) -> Any:
        order_key, steps_key = training.epoch_keys(key, 0)
        order = training.epoch_order(order_key, size, batch_size)
        return training.train_steps(ours.loss, ours.optimizer, state, info, data, order, steps_key, 0, steps)

    step = jax.jit(jax.vmap(epoch, in_axes=(0, 0, None, None)))
    arguments = (state, keys, ours.data, ours.info)
    jax.block_until_ready(step(*arguments))
    times = a_step(timed(config, lambda: jax.block_until_ready(step(*arguments))), steps)
    return {**times, "ms_a_seed": times["median_ms"] / count}


def quality(config: Config, data: Dataset) -> Row:
    """Seconds of training to ``--target`` (:mod:`benchmarks.time_to_quality`)."""
    generator = "threefry2x32" if config.prng == "both" else config.prng
    task = make_task(config, data.x_train, SEEDS_FLOWS, generator)
    evaluate, ours = evaluator(data), OurTraining(task, config.optimizer)
    started = time.perf_counter()
    ours.compile()
    seconds = time.perf_counter() - started
    curve = race(
        {"ours": ours},
        evaluate,
        target=config.target,
        epoch_steps=task.epoch_steps,
        max_epochs=config.max_epochs,
        show=show,
    )["ours"]
    points = [point._asdict() for point in curve]
    return {**row("ours", curve, config.target, task.epoch_steps, seconds), "data": data.name, "curve": points}


# --- What is said about it.


def print_row(row: Row, heads: bool) -> None:
    """A line of a table; before the first, the heads of the columns that it has."""
    columns = {name: column for name, column in COLUMNS.items() if name in row}
    if heads:
        print(f"{'':<24}" + "".join(f"{head:>11}" for head, _ in columns.values()))
    texts = ["-" if row[name] is None else f"{row[name] * scale:.4g}" for name, (_, scale) in columns.items()]
    print(f"{row['name']:<24}" + "".join(f"{text:>11}" for text in texts), flush=True)


if __name__ == "__main__":
    run_main(main)
