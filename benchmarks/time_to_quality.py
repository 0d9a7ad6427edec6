"""Seconds of training until a VAE reaches a test free energy: ours against PyTorch, with each optimiser.

    pip install -e '.[bench]'
    python -m benchmarks.time_to_quality --data_dir=DIR

takes about six minutes on two CPU cores with MNIST, prints a table, and writes the curves and a figure to
``runs/bench-time-to-quality``. All contestants train the model of ``experiments.mnist`` on the same images, from the
same weights. They take turns of half an epoch, and each one ends when the free energy of all test images is at most
``--target``:

- ours, with the default optimiser of ``experiments.mnist`` (schedule-free AdamW) and with Adam;
- PyTorch eager (layers as they are usually written) and compiled (``torch.compile``, the flow in as few operations as
  we could find), both with the fused Adam; compiled also with schedule-free AdamW from the package ``schedulefree``.

An optimiser has the same learning rate, warm-up and betas here and in PyTorch. One function of ours evaluates all
contestants with the same random draws, at the averaged parameters for schedule-free optimisers. The time of evaluation
is not counted. Compilation starts without a cache, and its time is reported separately.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from benchmarks.our_training import OurTraining, Task
from benchmarks.race import Point, Training, race, reached
from benchmarks.report import Ratios, Results, load, machine, print_machine, print_ratios, ratio
from benchmarks.timing import compiled_anew
from benchmarks.torch_models import Unavailable, import_module
from benchmarks.torch_training import TorchTraining
from planar_vae_jax.analysis import evaluation
from planar_vae_jax.data import ArgumentError, DataError, Dataset, load_dataset
from planar_vae_jax.runs.config import UsageError, flag, parse
from planar_vae_jax.runs.console import run_main, warn
from planar_vae_jax.train.optimizers import LEARNING_RATES

OURS = "ours"
BUILDERS: dict[str, Callable[[Task], Training]] = {
    OURS: lambda task: OurTraining(task, "schedule_free"),
    "ours, Adam": lambda task: OurTraining(task, "adam"),
    "PyTorch eager, Adam": lambda task: TorchTraining(task, "eager", "adam"),
    "PyTorch compiled, Adam": lambda task: TorchTraining(task, "compiled", "adam"),
    "PyTorch compiled, schedulefree": lambda task: TorchTraining(task, "compiled", "schedule_free"),
}
COLORS = dict(zip(BUILDERS, ("black", "0.5", "C1", "C2", "C0"), strict=True))
NAMES = {name.lower().replace(", ", "-").replace(" ", "-"): name for name in BUILDERS}


@dataclass(frozen=True)
class Config:
    """Flags of ``benchmarks.time_to_quality``."""

    dataset: str = flag("mnist", "data set, as in experiments.mnist")
    data_dir: str | None = flag(None, "folder with IDX files or prepared data; default TFDS's own")
    flows: int = flag(5, "K, the number of planar layers", at_least=0)
    target: float = flag(100.0, "test free energy to reach, nats")
    max_epochs: int = flag(40, "epochs after which a contestant ends in any case", at_least=1)
    contestants: str = flag("all", f"all, or names joined by commas: {', '.join(NAMES)}")
    threads: int | None = flag(None, "threads of PyTorch; default: as many as PyTorch chooses", at_least=1)
    batch_size: int = flag(128, "images per step", at_least=1)
    latent: int = flag(40, "size of z", at_least=1)
    hidden: int = flag(400, "width of the hidden layers", at_least=1)
    seed: int = flag(0, "seed of weights and training", at_least=0, at_most=2**32 - 1)
    workdir: str = flag("runs/bench-time-to-quality", "folder for the results")


def main(argv: list[str]) -> None:
    """Measures, prints, draws and writes; ``argv`` without the program's name."""
    config = parse(Config, argv, __doc__)
    chosen = parse_contestants(config.contestants)
    data = read_data(config.dataset, config.data_dir)
    if len(data.x_train) < 2 * config.batch_size:
        raise UsageError(f"--batch_size must leave two steps of {len(data.x_train)} images; got {config.batch_size}")
    results = Results(config, "time_to_quality")
    facts = machine()
    print_machine(facts)
    task = Task(data.x_train, config.batch_size, config.seed, config.flows, config.latent, config.hidden)
    evaluate = evaluator(data)
    evaluate(task.model())  # compiled
    with compiled_anew():
        trainings, seconds, left_out = contestants(chosen, task, config.threads)
    curves = race(
        trainings,
        evaluate,
        target=config.target,
        epoch_steps=task.epoch_steps,
        max_epochs=config.max_epochs,
        show=show,
    )
    rows = [row(name, curve, config.target, task.epoch_steps, seconds[name]) for name, curve in curves.items()]
    print_rows(rows, left_out, config.target)
    ratios = compare(rows)
    print_ratios(ratios)
    results.finish(
        {
            "what": f"seconds of training until the test free energy is at most {config.target:g} nats",
            "machine": {**facts, "load_average_at_end": load()},
            "data": {"name": data.name, "source": data.source, "train": len(data.x_train), "test": len(data.x_test)},
            "learning_rates": LEARNING_RATES,
            "rows": rows,
            "curves": {name: [point._asdict() for point in curve] for name, curve in curves.items()},
            "left_out": left_out,
            "ratios": ratios,
        },
        "time_to_quality.png",
        picture(curves, config, data.name, facts["device"]),
    )


def parse_contestants(text: str) -> list[str]:
    """Names of ``BUILDERS``.

    Raises:
        UsageError: for an unknown name.
    """
    if text == "all":
        return list(BUILDERS)
    names = [name.strip().lower() for name in text.split(",")]
    for name in names:
        if name not in NAMES:
            raise UsageError(f"--contestants must be all, or of {', '.join(NAMES)}; got {name!r}")
    return [NAMES[name] for name in names]


def read_data(name: str, data_dir: str | None) -> Dataset:
    """The data set that the flags name.

    Raises:
        UsageError: if it cannot be had.
    """
    try:
        return load_dataset(name, data_dir, warn=warn)
    except ArgumentError as error:  # it names the argument, which is the flag
        raise UsageError(f"--{error}") from error
    except DataError as error:
        raise UsageError(str(error)) from error


def evaluator(data: Dataset) -> Callable[[Any], float]:
    """A function from a model to the mean free energy of all test images, each with its own key."""
    images = evaluation.fixed_images(data.x_test, data.test_index, "test", "dynamic")

    def evaluate(model: Any) -> float:
        found = evaluation.mean_loss(model, images, "elbo", "test")["test_loss"]
        return float("nan") if found is None else found

    return evaluate


def contestants(
    chosen: list[str], task: Task, threads: int | None
) -> tuple[dict[str, Training], dict[str, float], list[dict[str, str]]]:
    """Everybody, compiled; the seconds that took; and who is left out, and why."""
    trainings: dict[str, Training] = {}
    seconds: dict[str, float] = {}
    left_out: list[dict[str, str]] = []
    for name in chosen:
        try:
            if threads is not None and not name.startswith(OURS):
                import_module("torch").set_num_threads(threads)
            training = BUILDERS[name](task)
            started = time.perf_counter()
            training.compile()
        except Exception as error:  # no C++ compiler, say: go on without it
            if name.startswith(OURS):
                raise
            why = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
            left_out.append({"name": name, "why": " ".join(why.split())[:200]})
            continue
        trainings[name], seconds[name] = training, time.perf_counter() - started
        print(f"{name}: compiled in {seconds[name]:.1f} s", flush=True)
    return trainings, seconds, left_out


# --- What is said about it.


def show(name: str, point: Point) -> None:
    print(f"{name:<31} {point.epochs:>5.1f} epochs {point.seconds:>7.1f} s {point.free_energy:>8.2f} nats", flush=True)


def row(name: str, curve: list[Point], target: float, epoch_steps: int, compile_seconds: float) -> dict[str, Any]:
    """What a curve comes to; None where the target was not reached."""
    point, last = reached(curve, target), curve[-1]
    return {
        "name": name,
        "seconds": None if point is None else point.seconds,
        "epochs": None if point is None else point.epochs,
        "last_free_energy": last.free_energy,
        "seconds_an_epoch": ratio(last.seconds, last.epochs),
        "ms_a_step": ratio(1e3 * last.seconds, last.epochs * epoch_steps),
        "compile_seconds": compile_seconds,
    }


def compare(rows: list[dict[str, Any]]) -> Ratios:
    """Seconds of everybody over ours, and of PyTorch over ours with the same Adam."""
    seconds = {row["name"]: row["seconds"] for row in rows}
    pairs = [(name, OURS) for name in seconds if name != OURS]
    pairs += [(name, "ours, Adam") for name in seconds if name.startswith("PyTorch") and name.endswith("Adam")]
    return {f"seconds: {name} / {base}": ratio(seconds[name], seconds.get(base)) for name, base in pairs}


def print_rows(rows: list[dict[str, Any]], left_out: list[dict[str, str]], target: float) -> None:
    """The table."""
    heads = f"{'seconds':>8} {'epochs':>7} {'s an epoch':>11} {'ms a step':>10} {'compile, s':>10}"
    print(f"\n{f'to {target:g} nats':<31} {heads}")
    for one in rows:
        numbers = [(one["seconds"], 8, 1), (one["epochs"], 7, 1), (one["seconds_an_epoch"], 11, 2)]
        numbers += [(one["ms_a_step"], 10, 2), (one["compile_seconds"], 10, 1)]
        texts = [
            "-".rjust(width) if value is None else f"{value:{width}.{digits}f}" for value, width, digits in numbers
        ]
        print(f"{one['name']:<31} {' '.join(texts)}")
    for absent in left_out:
        print(f"{absent['name']} left out: {absent['why']}")


def picture(curves: dict[str, list[Point]], config: Config, data: str, device: str) -> Figure:
    """Free energy against seconds, a curve each."""
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=120)
    figure.suptitle(f"VAE with K = {config.flows} planar layers, {data}, test images ({device})", fontsize=11)
    axes = figure.subplots()
    for name, curve in curves.items():
        _, seconds, free_energies = zip(*curve[1:], strict=True)
        axes.plot(seconds, free_energies, color=COLORS[name], marker="o", markersize=3, linewidth=1.5, label=name)
    axes.axhline(config.target, color="0.7", linestyle="--", linewidth=1, zorder=0)
    axes.set(xscale="log", xlabel="seconds of training", ylabel="free energy (nats)")
    values = [point.free_energy for curve in curves.values() for point in curve[1:]]
    low, high = min([*values, config.target]), max(values)
    axes.set_ylim(low - 1.0, max(min(high, low + 30.0), config.target) + 1.0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return figure


if __name__ == "__main__":
    run_main(main)
