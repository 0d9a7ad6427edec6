"""An MNIST epoch of the planar-flow VAE, against PyTorch and against its matrix products alone.

    pip install -e '.[bench]'
    python -m benchmarks.epoch

takes about six minutes on two CPU cores, prints a table, and writes the times and a figure to ``runs/bench-epoch``.
All contestants train the model of ``experiments.mnist`` (784 - 400 - ReLU - 40, K planar layers, and back, with newly
binarised pixels in each step) on the same synthetic images. They take turns of ``--steps`` steps each:

- ours, by the compiled functions of that experiment, with each of its optimisers;
- PyTorch with Adam: eager (layers as they are usually written), tuned (as few operations as we could find) and compiled
  (tuned under ``torch.compile``, which needs a C++ compiler). Each one is first checked against ours: free energy and
  gradient must agree for the same weights, pixels and noise;
- products alone: the matrix products of a step, forward and backward of the four linear layers.

An epoch of 60,000 images has 468 steps, so its seconds are extrapolated from a turn.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.our_training import OurTraining, Task, synthetic_images
from benchmarks.products import products
from benchmarks.report import Ratios, Results, load, machine, print_machine, print_ratios, ratio
from benchmarks.timing import Contestant, interleave, spread
from benchmarks.torch_models import Unavailable, import_module
from benchmarks.torch_training import STYLES, TorchTraining
from planar_vae_jax.runs.config import UsageError, flag, parse
from planar_vae_jax.runs.console import run_main
from planar_vae_jax.train.optimizers import OPTIMIZERS

PRODUCTS = "products alone"
COLORS = {
    PRODUCTS: "0.6",
    "ours, schedule_free": "black",
    "ours, adam": "0.3",
    "PyTorch eager": "C1",
    "PyTorch tuned": "C3",
    "PyTorch compiled": "C2",
}


@dataclass(frozen=True)
class Config:
    """Flags of ``benchmarks.epoch``."""

    flows: tuple[int, ...] = flag((0, 5, 80), "K, numbers of planar layers", at_least=0)
    compiled: tuple[int, ...] = flag(
        (0, 5, 80), "the K for which PyTorch is also compiled, which takes up to a minute each", at_least=0
    )
    optimizer: str = flag("both", "our optimisers", choices=("both", *OPTIMIZERS))
    peers: str = flag("torch", "whether PyTorch takes part", choices=("torch", "none"))
    threads: tuple[int, ...] = flag((1, 2), "numbers of threads of PyTorch, of which the fastest is shown", at_least=1)
    images: int = flag(60_000, "training images of an epoch", at_least=1)
    steps: int = flag(50, "steps per turn; 0: a whole epoch", at_least=0)
    rounds: int = flag(7, "turns of each contestant", at_least=1)
    batch_size: int = flag(128, "images per step", at_least=1)
    latent: int = flag(40, "size of z", at_least=1)
    hidden: int = flag(400, "width of the hidden layers", at_least=1)
    seed: int = flag(0, "seed of images and weights", at_least=0, at_most=2**32 - 1)
    workdir: str = flag("runs/bench-epoch", "folder for the results")


def main(argv: list[str]) -> None:
    """Measures, prints, draws and writes; ``argv`` without the program's name."""
    config = parse(Config, argv, __doc__)
    epoch_steps = config.images // config.batch_size
    steps = config.steps or epoch_steps
    if not 1 <= steps <= epoch_steps:
        raise UsageError(
            f"--steps must be at most the {epoch_steps} batches of {config.batch_size} in --images={config.images}; "
            f"got {steps}"
        )
    results = Results(config, "epoch")
    facts = machine()
    print_machine(facts)
    if steps < epoch_steps:
        print(f"slices of {steps} steps stand for an epoch of {epoch_steps}, whose seconds are extrapolated")
    entries, left_out = contestants(config, synthetic_images(config.seed, steps * config.batch_size))
    times = interleave(
        {entry.title: entry.contestant for entry in entries},
        seconds=0.0,
        rounds=config.rounds,
        least_calls=config.rounds,
        warm_up=False,
    )
    rows = [row(entry, times[entry.title], steps, epoch_steps) for entry in entries]
    print_rows(rows, left_out)
    ratios = compare(rows)
    print_ratios(ratios)
    results.finish(
        {
            "what": "a training step of the VAE, float32; milliseconds a step, median and quartiles over slices",
            "machine": {**facts, "load_average_at_end": load()},
            "steps_a_slice": steps,
            "steps_an_epoch": epoch_steps,
            "extrapolated": steps < epoch_steps,
            "rows": rows,
            "left_out": left_out,
            "ratios": ratios,
        },
        "epoch.png",
        picture(rows, facts["device"]),
    )


class Entry(NamedTuple):
    """Who takes part in the timing."""

    name: str
    flows: int | None
    threads: int | None
    first_slice_seconds: float  # building, checking, compiling and running it
    errors: dict[str, float] | None  # against ours, of the largest value of each leaf
    contestant: Contestant  # a slice

    @property
    def title(self) -> str:
        flows = "" if self.flows is None else f", K={self.flows}"
        return self.name + flows + ("" if self.threads is None else f", threads={self.threads}")


def contestants(config: Config, pixels: np.ndarray) -> tuple[list[Entry], list[dict[str, str]]]:
    """Everybody, compiled and run once; and who is left out, and why."""
    optimizers = OPTIMIZERS if config.optimizer == "both" else (config.optimizer,)
    tasks = {flows: task(config, flows, pixels) for flows in config.flows}
    floor = task(config, 0, pixels)
    entries = [built(PRODUCTS, None, lambda: (products(floor), None))]
    for flows, one in tasks.items():
        for optimizer in optimizers:
            entries.append(built(f"ours, {optimizer}", flows, functools.partial(our_slice, one, optimizer)))
    try:
        if config.peers == "none":
            raise Unavailable("--peers=none")
        torch = import_module("torch")
    except Unavailable as error:
        return entries, [{"name": "PyTorch", "why": str(error)}]
    left_out: list[dict[str, str]] = []
    for flows, one in tasks.items():
        for style in STYLES:
            if style == "tuned" and flows == 0:  # there is nothing to tune
                continue
            try:
                entries += torch_entries(config, torch, one, style)
            except Exception as error:  # no C++ compiler, say: go on without it
                why = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
                left_out.append({"name": f"PyTorch {style}, K={flows}", "why": " ".join(why.split())[:200]})
    return entries, left_out


def task(config: Config, flows: int, pixels: np.ndarray) -> Task:
    """What is trained; its epoch is a slice."""
    return Task(pixels, config.batch_size, config.seed, flows, config.latent, config.hidden)


def built(name: str, flows: int | None, build: Callable[[], tuple[Callable[[], Any], Any]]) -> Entry:
    """An entry whose first slice, with all compilation, is done; ``build`` returns it and its errors."""
    started = time.perf_counter()
    run, errors = build()
    run()
    entry = Entry(name, flows, None, time.perf_counter() - started, errors, Contestant(run))
    check = f", differs from ours by {max(errors.values()):.0e}" if errors else ""
    print(f"{entry.title}: ready after {entry.first_slice_seconds:.1f} s{check}", flush=True)
    return entry


def our_slice(task: Task, optimizer: str) -> tuple[Callable[[], Any], None]:
    """An epoch over the images of a slice."""
    training = OurTraining(task, optimizer)
    return lambda: training.train(task.epoch_steps), None


def torch_slice(task: Task, style: str) -> tuple[Callable[[], Any], dict[str, float]]:
    """The same in PyTorch, with Adam."""
    training = TorchTraining(task, style, "adam")
    training.compile()
    return lambda: training.train(task.epoch_steps), training.errors


def torch_entries(config: Config, torch: Any, task: Task, style: str) -> list[Entry]:
    """An entry for each number of threads; compiled code is compiled for a number of threads: for one alone."""
    flows, most = task.flow_length, max(config.threads)
    if style == "compiled" and flows not in config.compiled:
        raise Unavailable(f"--compiled does not name {flows}")
    torch.set_num_threads(most)
    entry = built(f"PyTorch {style}", flows, functools.partial(torch_slice, task, style))
    return [
        entry._replace(
            threads=threads,
            contestant=Contestant(entry.contestant.run, functools.partial(torch.set_num_threads, threads)),
        )
        for threads in ((most,) if style == "compiled" else config.threads)
    ]


# --- What is said about it.


def row(entry: Entry, seconds: list[float], steps: int, epoch_steps: int) -> dict[str, Any]:
    """A row of the table: milliseconds a step, and what an epoch takes."""
    median, lower, upper, slices = spread(seconds, 1e3 / steps)
    return {
        "title": entry.title,
        "name": entry.name,
        "flows": entry.flows,
        "threads": entry.threads,
        "median_ms": median,
        "lower_quartile_ms": lower,
        "upper_quartile_ms": upper,
        "slices": slices,
        "epoch_seconds": median * epoch_steps / 1e3,
        "first_slice_seconds": entry.first_slice_seconds,
        "errors": entry.errors,
    }


def compare(rows: list[dict[str, Any]]) -> Ratios:
    """Ratios of medians: ours over the floor and over K = 0, PyTorch over ours; of threads the best number."""
    medians = {(row["name"], row["flows"]): row["median_ms"] for row in fastest(rows)}
    ours = [(name, flows) for name, flows in medians if name.startswith("ours")]
    peers = [(name, flows) for name, flows in medians if name.startswith("PyTorch")]
    floor = medians.get((PRODUCTS, None))
    return {
        **{f"K={flows}: {name} / {PRODUCTS}": ratio(medians[name, flows], floor) for name, flows in ours},
        **{
            f"{name}: K={flows} / K=0": ratio(medians[name, flows], medians.get((name, 0)))
            for name, flows in ours
            if flows
        },
        **{
            f"K={flows}: {peer} / {name}": ratio(medians[peer, flows], medians[name, flows])
            for peer, flows in peers
            for name, own in ours
            if own == flows
        },
    }


def fastest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows that differ in the number of threads the fastest, in the order of K and time."""
    best: dict[tuple[str, int | None], dict[str, Any]] = {}
    for one in sorted(rows, key=lambda row: row["median_ms"]):
        best.setdefault((one["name"], one["flows"]), one)
    return sorted(best.values(), key=lambda row: (-1 if row["flows"] is None else row["flows"], row["median_ms"]))


def print_rows(rows: list[dict[str, Any]], left_out: list[dict[str, str]]) -> None:
    """The table."""
    width = max(len(row["title"]) for row in rows)
    print(f"\n{'':<{width}} {'ms a step':>10} {'quartiles':>19} {'epoch, s':>9}")
    for one in rows:
        quartiles = f"{one['lower_quartile_ms']:.2f} - {one['upper_quartile_ms']:.2f}"
        print(f"{one['title']:<{width}} {one['median_ms']:>10.2f} {quartiles:>19} {one['epoch_seconds']:>9.2f}")
    for absent in left_out:
        print(f"{absent['name']} left out: {absent['why']}")


def picture(rows: list[dict[str, Any]], device: str) -> Figure:
    """Milliseconds a step, a bar for each contestant with its best number of threads, by K."""
    rows = fastest(rows)
    figure = Figure(figsize=(9, 0.3 * len(rows) + 1.5), layout="constrained", dpi=120)
    figure.suptitle(f"A training step of the VAE with K planar layers ({device})", fontsize=11)
    axes = figure.subplots()
    median = np.array([row["median_ms"] for row in rows])
    spreads = (median - [row["lower_quartile_ms"] for row in rows], [row["upper_quartile_ms"] for row in rows] - median)
    names = [row["title"] for row in rows]
    bars = axes.barh(names, median, xerr=spreads, capsize=2, color=[COLORS[row["name"]] for row in rows])
    axes.bar_label(bars, fmt="%.1f", padding=5, fontsize=8)
    axes.set_xlabel("milliseconds a step (median, quartiles)")
    axes.margins(x=0.08)
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    return figure


if __name__ == "__main__":
    run_main(main)
