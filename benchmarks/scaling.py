"""How time, compile time and memory of the flow grow with layers K, dimension D and batch B.

    python -m benchmarks.scaling

takes about four minutes on two CPU cores, prints tables, and writes them with a picture into ``runs/bench-scaling``.
One of K, D, B is varied at a time, from ``--base``, for both methods: the time of value and gradient (the objective of
:mod:`benchmarks.flows`, one flow for all events), the seconds to trace and compile it (no cache), and the temporary
memory that ``compiled.memory_analysis()`` tells. An exponent is the slope of the log-log line through the upper half of
the range.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks.report import Ratios, Results, load, machine, print_machine, print_ratios, ratio
from benchmarks.timing import Contestant, compiled_anew, interleave, milliseconds
from planar_vae_jax import init_planar, planar_flow
from planar_vae_jax.runs.config import UsageError, flag, parse
from planar_vae_jax.runs.console import run_main

METHODS = ("scan", "gram")
AXES = {"flow_length": "K", "dim": "D", "batch_size": "B"}
QUANTITIES = {
    "median_ms": "value and gradient (ms)",
    "compile_seconds": "trace and compile (s)",
    "temporary_mb": "temporary memory (MB)",
}


class Sizes(NamedTuple):
    batch_size: int
    dim: int
    flow_length: int


LARGE = Sizes(1024, 784, 128)  # where memory is compared


@dataclass(frozen=True)
class Config:
    """Flags of ``benchmarks.scaling``."""

    layers: tuple[int, ...] = flag(tuple(2**n for n in range(11)), "values of K", at_least=1)
    dims: tuple[int, ...] = flag(tuple(2**n for n in range(1, 13)), "values of D", at_least=1)
    batches: tuple[int, ...] = flag(tuple(2**n for n in range(5, 15)), "values of B", at_least=1)
    base: tuple[int, ...] = flag((128, 64, 32), "B,D,K of those that are not varied", at_least=1)
    memory_at: tuple[int, ...] = flag(LARGE, "B,D,K at which memory is compared", at_least=1)
    seconds: float = flag(0.5, "timed seconds for each method at each point", above=0.0)
    rounds: int = flag(5, "turns that these seconds are spread over", at_least=1)
    compile_at: tuple[int, ...] = flag((1, 256), "two K at which compile time is compared", at_least=1)
    compiles: int = flag(5, "compilations of each of them, whose medians are compared", at_least=1)
    seed: int = flag(0, "of the parameters and events", at_least=0, at_most=2**32 - 1)
    workdir: str = flag("runs/bench-scaling", "folder for what the run writes")


def main(argv: list[str]) -> None:
    """Measures, prints, draws and writes; ``argv`` without the program's name."""
    config = parse(Config, argv, __doc__)
    base, memory_at = (sizes(name, getattr(config, name)) for name in ("base", "memory_at"))
    if len(config.compile_at) != 2:
        raise UsageError(f"--compile_at must be two whole numbers; got {','.join(map(str, config.compile_at))}")
    results = Results(config, "scaling")
    facts = machine()
    print_machine(facts)
    rows: list[dict[str, Any]] = []
    exponents: list[dict[str, Any]] = []
    with compiled_anew():
        build(base, None, config.seed)  # what is compiled first takes longer
        for axis, values in (("flow_length", config.layers), ("dim", config.dims), ("batch_size", config.batches)):
            points = [base._replace(**{axis: value}) for value in sorted(set(values))]
            new = measure(config, axis, points)
            fits = [{"axis": AXES[axis], "method": method, **fit(axis, new, method)} for method in METHODS]
            print_axis(axis, base, new, fits)
            rows += new
            exponents += fits
        memory = {method: temporary_mb(build(memory_at, method, config.seed).step) for method in METHODS}
        print(f"\ntemporary memory (MB) at (B, D, K) = {tuple(memory_at)}: {memory}")
        compile_seconds = compare_compilation(config, base)
    print(f"seconds to trace and compile, median of {config.compiles}: {compile_seconds}")
    ratios = compare(config, memory, compile_seconds)
    print_ratios(ratios)
    results.finish(
        {
            "what": "mean |zK|^2 / 2 - log_det with its gradient by u, w, b and z0, one flow for all events, float32",
            "machine": {**facts, "load_average_at_end": load()},
            "base": base._asdict(),
            "rows": rows,
            "exponents": exponents,
            "memory": {**memory_at._asdict(), "temporary_mb": memory},
            "compile_seconds": compile_seconds,
            "ratios": ratios,
        },
        "scaling.png",
        picture(rows, exponents, base, facts["device"]),
    )


def sizes(name: str, values: Sequence[int]) -> Sizes:
    """The sizes that a flag gives.

    Raises:
        UsageError: unless there are three.
    """
    if len(values) != 3:
        raise UsageError(f"--{name} must be B,D,K, three whole numbers; got {','.join(map(str, values))}")
    return Sizes(*values)


class Built(NamedTuple):
    """Value and gradient, compiled for a point."""

    step: Any  # (params, z0) -> (loss, gradients)
    arguments: tuple[Any, Any]
    seconds: float  # to trace and to compile

    def run(self) -> None:
        jax.block_until_ready(self.step(*self.arguments))


def build(point: Sizes, method: str | None, seed: int) -> Built:
    """Traces and compiles anew: the function is another one each time."""

    def objective(params: Any, z0: Any) -> Any:
        zK, log_det = planar_flow(params, z0, method=method)
        return jnp.mean(0.5 * jnp.sum(jnp.square(zK), -1) - log_det)

    params_key, z0_key = jax.random.split(jax.random.key(seed))
    params = init_planar(params_key, point.flow_length, point.dim)
    z0 = jax.random.normal(z0_key, (point.batch_size, point.dim))
    started = time.perf_counter()
    step = jax.jit(jax.value_and_grad(objective, argnums=(0, 1))).lower(params, z0).compile()
    return Built(step, (params, z0), time.perf_counter() - started)


def temporary_mb(step: Any) -> float | None:
    """Temporary memory of a compiled function in 10^6 bytes; None where the backend does not tell."""
    analysis = step.memory_analysis()
    size = getattr(analysis, "temp_size_in_bytes", None)
    return None if size is None else size / 1e6


def measure(config: Config, axis: str, points: list[Sizes]) -> list[dict[str, Any]]:
    """A row for each point and method; the points of an axis are timed in turns."""
    builds = {(point, method): build(point, method, config.seed) for point in points for method in METHODS}
    entries = {f"{method} {point}": Contestant(one.run) for (point, method), one in builds.items()}
    times = interleave(entries, seconds=config.seconds, rounds=config.rounds)
    return [
        {
            "axis": AXES[axis],
            "method": method,
            **point._asdict(),
            **milliseconds(times[f"{method} {point}"]),
            "compile_seconds": one.seconds,
            "temporary_mb": temporary_mb(one.step),
        }
        for (point, method), one in builds.items()
    ]


def fit(axis: str, rows: list[dict[str, Any]], method: str) -> dict[str, float | None]:
    """Exponent of each quantity along an axis, see :func:`exponent`."""
    own = [row for row in rows if row["method"] == method]
    return {name: exponent([row[axis] for row in own], [row[name] for row in own]) for name in QUANTITIES}


def exponent(sizes: Sequence[float], values: Sequence[float | None]) -> float | None:
    """Slope of log value against log size by least squares, over the upper half of the range of log size.

    None if fewer than two values are left; those that are missing or 0 are not counted.
    """
    middle = np.sqrt(float(min(sizes)) * float(max(sizes)))
    upper = [(size, value) for size, value in zip(sizes, values, strict=True) if size >= middle and value]
    if len(upper) < 2:
        return None
    x, y = np.log(np.array(upper, np.float64)).T
    return float(np.polynomial.polynomial.polyfit(x, y, 1)[1])


def compare_compilation(config: Config, base: Sizes) -> dict[str, list[float]]:
    """Median seconds to trace and compile at both K, by method, in turns."""
    names: dict[str, str | None] = {"default": None, **{method: method for method in METHODS}}
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(config.compiles):
        for name, method in names.items():
            for index, flow_length in enumerate(config.compile_at):
                point = base._replace(flow_length=flow_length)
                seconds.setdefault((name, index), []).append(build(point, method, config.seed).seconds)
    return {name: [float(np.median(seconds[name, index])) for index in (0, 1)] for name in names}


# --- What is said about it.


def compare(config: Config, memory: dict[str, float | None], compile_seconds: dict[str, list[float]]) -> Ratios:
    """Memory of one method over the other's, and compile time at many layers over few."""
    few, many = config.compile_at
    return {
        f"temporary memory at (B, D, K) = {tuple(config.memory_at)}: gram / scan": ratio(
            memory["gram"], memory["scan"]
        ),
        **{
            f"compile time, {name} method: K={many} / K={few}": ratio(after, before)
            for name, (before, after) in compile_seconds.items()
        },
    }


def print_axis(axis: str, base: Sizes, rows: list[dict[str, Any]], fits: list[dict[str, Any]]) -> None:
    """The table of one axis and its exponents."""
    fixed = ", ".join(f"{AXES[name]} = {value}" for name, value in base._asdict().items() if name != axis)
    print(f"\n{fixed}")
    print(f"{AXES[axis]:>6} {'method':>7} {'ms':>10} {'quartiles':>21} {'compile, s':>10} {'memory, MB':>10}")
    for row in rows:
        quartiles = f"{row['lower_quartile_ms']:.3f} - {row['upper_quartile_ms']:.3f}"
        memory = "-" if row["temporary_mb"] is None else f"{row['temporary_mb']:.2f}"
        print(
            f"{row[axis]:>6} {row['method']:>7} {row['median_ms']:>10.3f} {quartiles:>21} "
            f"{row['compile_seconds']:>10.2f} {memory:>10}"
        )
    for one in fits:
        exponents = ", ".join(f"{label} {show(one[name])}" for name, label in QUANTITIES.items())
        print(f"exponents in {AXES[axis]}, {one['method']}: {exponents}", flush=True)


def show(exponent: float | None) -> str:
    return "-" if exponent is None else f"{exponent:z.2f}"


def picture(rows: list[dict[str, Any]], exponents: list[dict[str, Any]], base: Sizes, device: str) -> Figure:
    """A row of panels for each quantity, a column for each axis."""
    figure = Figure(figsize=(12, 9), layout="constrained", dpi=120)
    figure.suptitle(f"K planar layers, D dimensions, B events, one flow for all, float32 ({device})", fontsize=11)
    grid = figure.subplots(len(QUANTITIES), len(AXES), sharex="col", sharey="row", squeeze=False)
    fits = {(one["axis"], one["method"]): one for one in exponents}
    for line, (quantity, label) in zip(grid, QUANTITIES.items(), strict=True):
        for axes, (axis, letter) in zip(line, AXES.items(), strict=True):
            for method, color in zip(METHODS, ("C1", "black"), strict=True):
                own = [row for row in rows if row["axis"] == letter and row["method"] == method]
                if any(row[quantity] is None for row in own):
                    continue
                x, y = [row[axis] for row in own], [row[quantity] for row in own]
                # Compile time follows no power law.
                power = "" if quantity == "compile_seconds" else f": {letter}^{show(fits[letter, method][quantity])}"
                axes.plot(x, y, color=color, marker="o", markersize=4, linewidth=1.5, label=method + power)
                axes.set_xscale("log")
                axes.set_xticks(x[::2], [str(value) for value in x[::2]], fontsize=8)
                axes.set_xticks([], minor=True)
            if quantity == "compile_seconds":
                axes.set_ylim(0.0, 1.1 * max(row[quantity] for row in rows))
            else:
                axes.set_yscale("log")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=9)
        line[0].set_ylabel(label)
    for axes, (axis, letter) in zip(grid[-1], AXES.items(), strict=True):
        fixed = ", ".join(f"{AXES[name]} = {value}" for name, value in base._asdict().items() if name != axis)
        axes.set_xlabel(f"{letter} ({fixed})")
    return figure


if __name__ == "__main__":
    run_main(main)
