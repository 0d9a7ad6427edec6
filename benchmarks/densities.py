"""Densities fitted to points by maximum likelihood: ours in both directions against FlowJAX's planar flow.

    pip install -e '.[bench]'
    python -m benchmarks.densities

takes about half an hour on two CPU cores. It trains K layers on points of each target, with Adam, a cosine decay and
the same batches for all, and prints the log-likelihood of held-out points, standardised by the training points. A seed
draws points or their split, the initial parameters and the batches. For each seed, the validation points choose the
learning rate and the checkpoint of each contestant. It then times a training step in each of ``--dims`` dimensions,
with contestants in turns, and writes everything and a figure to ``runs/bench-densities``.

Before anything is timed, the log-densities of FlowJAX's tanh layers are compared with ours for the same map.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from benchmarks.problems import TOLERANCE
from benchmarks.report import Ratios, Results, load, machine, print_machine, print_ratios, ratio
from benchmarks.timing import Contestant, interleave, milliseconds
from benchmarks.torch_models import Unavailable, import_module
from planar_vae_jax import PlanarDensity, init_planar
from planar_vae_jax.data import Points, assemble_points, split_points
from planar_vae_jax.flows.targets import POINT_TARGETS, draw_points, get_target
from planar_vae_jax.runs.config import UsageError, flag, parse
from planar_vae_jax.runs.console import run_main
from planar_vae_jax.statistics import mean_and_error, with_error
from planar_vae_jax.train import loop

CANCER = "breast_cancer"  # scikit-learn's 569 x 30 measurements; a seed is a split of 60, 20 and 20 %
TARGETS = (*POINT_TARGETS, CANCER)
POINTS = 10_000  # points drawn from a target, in each split
LINES = 100  # times that a training looks at the validation points
STEPS_A_CALL = 20  # steps in a timed call
SLOPE = 0.1  # of FlowJAX's leaky ReLU below 0


@dataclass(frozen=True)
class Config:
    """Flags of ``benchmarks.densities``."""

    targets: str = flag(f"two_moons,eight_gaussians,{CANCER}", f"none, or of {', '.join(TARGETS)}, joined by commas")
    contestants: str = flag("all", "all, or names joined by commas")
    flows: int = flag(32, "K, the number of layers", at_least=1)
    steps: int = flag(4000, f"training steps; {CANCER}: three quarters of it", at_least=1)
    batch_size: int = flag(512, "points per step, at most a quarter of the training points", at_least=1)
    learning_rates: str = flag("0.005,0.02,0.05", "of which the validation points choose one, joined by commas")
    seeds: int = flag(3, "trainings of each contestant on each target", at_least=1)
    dims: tuple[int, ...] = flag((2, 10, 30), "dimensions in which a step is timed", at_least=1)
    seconds: float = flag(4.0, "timed seconds for each contestant in each dimension", above=0.0)
    rounds: int = flag(10, "turns over which these seconds are spread", at_least=1)
    workdir: str = flag("runs/bench-densities", "folder for the results")


class Model(NamedTuple):
    """A density that can be trained."""

    params: Any  # a pytree of arrays
    log_prob: Callable[[Any, jax.Array], jax.Array]  # (params, x [N, D]) -> [N]
    static: Any = None  # FlowJAX's distribution without its arrays


# --- The contestants: (key, K, D) -> Model


def ours(key: jax.Array, flow_length: int, dim: int, *, inverted: bool) -> Model:
    """``PlanarDensity`` in one direction, with a learned affine map."""
    density = PlanarDensity(init_planar(key, flow_length, dim), inverted=inverted)
    return Model(density, lambda density, x: density.log_prob(x))


def ours_without_affine_map(key: jax.Array, flow_length: int, dim: int) -> Model:
    """The density direction with the base fixed to N(0, I) and nothing but the layers, as FlowJAX has it."""

    def log_prob(params: Any, x: jax.Array) -> jax.Array:
        return PlanarDensity(params, inverted=True).log_prob(x)

    return Model(init_planar(key, flow_length, dim), log_prob)


def flowjax(
    key: jax.Array, flow_length: int, dim: int, *, affine: bool = False, negative_slope: float | None = None
) -> Model:
    """``flowjax.flows.planar_flow`` with its defaults, which carries data to noise, and the base N(0, I).

    ``affine``: with a learned affine map on the side of the data, as ours has it.
    """
    eqx, paramax, flows = (import_module(name) for name in ("equinox", "paramax", "flowjax.flows"))
    distributions = import_module("flowjax.distributions")
    base = distributions.StandardNormal((dim,))  # Normal's mean and scale would be learned
    density = flows.planar_flow(key, base_dist=base, flow_layers=flow_length, negative_slope=negative_slope)
    if affine:
        map_ = import_module("flowjax.bijections").Affine(jnp.zeros(dim), jnp.ones(dim))
        density = distributions.Transformed(density, map_)

    def is_fixed(leaf: Any) -> bool:
        return isinstance(leaf, paramax.NonTrainable)

    params, static = eqx.partition(density, eqx.is_inexact_array, is_leaf=is_fixed)

    def log_prob(params: Any, x: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):  # as in our flows; no difference on a CPU
            return paramax.unwrap(eqx.combine(params, static)).log_prob(x)

    return Model(params, log_prob, static)


OURS, PEER = "ours, density", "FlowJAX, tanh"
CONTESTANTS: dict[str, Callable[[jax.Array, int, int], Model]] = {
    OURS: functools.partial(ours, inverted=True),
    "ours, sampling": functools.partial(ours, inverted=False),
    "ours, density, N(0, I)": ours_without_affine_map,
    PEER: flowjax,
    "FlowJAX, tanh, affine": functools.partial(flowjax, affine=True),
    "FlowJAX, leaky ReLU": functools.partial(flowjax, negative_slope=SLOPE),
}
NAMES = {name.lower().replace(", ", "-").replace(" ", "-").replace("n(0-i)", "normal"): name for name in CONTESTANTS}


def check_map(flow_length: int, dim: int) -> float:
    """Returns the largest difference of log-densities of FlowJAX's tanh layers and ours, for the same map.

    Raises:
        Unavailable: FlowJAX is not installed, or the difference is larger than ``TOLERANCE``.
    """
    theirs = flowjax(jax.random.key(0), flow_length, dim)
    noise = jax.tree.map(lambda leaf: 0.5 * jax.random.normal(jax.random.key(1), leaf.shape), theirs.params)
    eqx, client = import_module("equinox"), import_module("planar_vae_jax.clients.flowjax")
    params, _ = client.from_flowjax(eqx.combine(noise, theirs.static).bijection)
    x = jax.random.normal(jax.random.key(2), (64, dim))
    expected, found = jax.jit(lambda: (PlanarDensity(params, inverted=True).log_prob(x), theirs.log_prob(noise, x)))()
    error = float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected)))
    if not error <= TOLERANCE:
        raise Unavailable(f"its log-density differs from ours by {error:.1e} of the largest value")
    return error


# --- Flags


def main(argv: list[str]) -> None:
    """Trains, times, prints, draws and writes; ``argv`` without the program's name."""
    config = parse(Config, argv, __doc__)
    targets, chosen = parse_targets(config.targets), parse_contestants(config.contestants)
    rates = parse_rates(config.learning_rates)
    results = Results(config, "densities")
    facts = machine()
    print_machine(facts)
    left_out, errors = check_all(config, chosen)
    chosen = [name for name in chosen if name not in left_out]
    rows: list[dict[str, Any]] = []
    for target in targets:
        target_rows = fit_all(config, target, chosen, rates)
        print_target(config, target, target_rows)
        rows += target_rows
    times = [row for dim in config.dims for row in time_all(config, dim, chosen)]
    print_times(times)
    ratios = compare(times)
    print_ratios(ratios)
    for name, why in left_out.items():
        print(f"{name} left out: {why}")
    results.finish(
        {
            "what": "log-likelihood of held-out points in nats per standardised point; milliseconds a training step",
            "machine": {**facts, "load_average_at_end": load()},
            "rows": rows,
            "times": times,
            "ratios": ratios,
            "errors_of_the_same_map": errors,
            "left_out": [{"name": name, "why": why} for name, why in left_out.items()],
        },
        "densities.png",
        picture(rows, times, facts["device"]),
    )


def parse_targets(text: str) -> list[str]:
    """Returns the targets of ``--targets``.

    Raises:
        UsageError: if a name is unknown.
    """
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TARGETS:
            raise UsageError(f"--targets must be none or of {', '.join(TARGETS)}; got {name!r}")
    if CANCER in names:
        try:
            import_module("sklearn.datasets")
        except Unavailable as error:
            raise UsageError(f"--targets={CANCER} needs scikit-learn: {error}") from None
    return names


def parse_contestants(text: str) -> list[str]:
    """Returns the contestants of ``--contestants``.

    Raises:
        UsageError: if a name is unknown.
    """
    if text == "all":
        return list(CONTESTANTS)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in NAMES:
            raise UsageError(f"--contestants must be all or of {', '.join(NAMES)}; got {name!r}")
    return [NAMES[name] for name in names]


def parse_rates(text: str) -> list[float]:
    """Returns the learning rates of ``--learning_rates``.

    Raises:
        UsageError: if one is no positive number.
    """
    try:
        rates = [float(one) for one in text.split(",")]
    except ValueError:
        rates = [0.0]
    if not all(0.0 < rate < float("inf") for rate in rates):
        raise UsageError(f"--learning_rates must be positive numbers joined by commas; got {text!r}")
    return rates


def check_all(config: Config, chosen: list[str]) -> tuple[dict[str, str], dict[str, float]]:
    """Returns who is left out and why, and by dimension the error of :func:`check_map`."""
    theirs = [name for name in chosen if name.startswith("FlowJAX")]
    if not theirs:
        return {}, {}
    try:
        return {}, {f"D={dim}": check_map(config.flows, dim) for dim in config.dims}
    except Unavailable as error:
        return dict.fromkeys(theirs, " ".join(str(error).split())[:200]), {}


# --- Log-likelihood


def load_points(target: str, seed: int) -> tuple[Points, np.ndarray | None]:
    """Returns the points of a target, and the log-density behind the test points in nats ``[N]``, if it is known."""
    if target == CANCER:
        measured = np.asarray(import_module("sklearn.datasets").load_breast_cancer().data)
        order = np.random.RandomState(seed).permutation(len(measured))
        return split_points(target, "scikit-learn", measured[order]), None
    points = assemble_points(target, f"seed {seed}", *np.split(draw_points(target, 3 * POINTS, seed), 3))
    log_p = jax.jit(get_target(target).log_density)(jnp.asarray(points.test, jnp.float32))
    return points, np.asarray(log_p, np.float64) + points.log_volume


def fit_all(config: Config, target: str, chosen: list[str], rates: list[float]) -> list[dict[str, Any]]:
    """Trains all contestants on a target with each seed; returns a row for each contestant, and one for the truth."""
    by_name: dict[str, list[dict[str, Any]]] = {name: [] for name in [*chosen, "truth"]}
    for seed in range(config.seeds):
        points, truth = load_points(target, seed)
        splits = [points.standardised(split, np.float32) for split in (points.train, points.valid, points.test)]
        if truth is not None:
            by_name["truth"].append(_figures(truth))
        for name in chosen:
            by_name[name].append(fit_one(config, target, CONTESTANTS[name], splits, rates, seed))
    return [
        {"target": target, "dim": points.dim, "name": name, "seeds": figures}
        for name, figures in by_name.items()
        if figures
    ]


def fit_one(
    config: Config,
    target: str,
    build: Callable[[jax.Array, int, int], Model],
    splits: list[np.ndarray],
    rates: list[float],
    seed: int,
) -> dict[str, Any]:
    """Trains a contestant with each learning rate; returns the figures of the one that the validation points choose."""
    train, valid, test = splits
    steps = config.steps * 3 // 4 if target == CANCER else config.steps
    init_key, train_key = jax.random.split(jax.random.key(seed))
    model = build(init_key, config.flows, train.shape[1])
    go = functools.partial(fit, model.log_prob, min(config.batch_size, max(1, len(train) // 4)), steps)
    params, losses, lines = jax.jit(jax.vmap(go, in_axes=(0, None, None, None, None)))(
        jnp.asarray(rates), model.params, train, valid, train_key
    )
    best = int(np.nanargmin(losses))
    log_prob = jax.jit(model.log_prob)(jax.tree.map(lambda leaf: leaf[best], params), test)
    step = (int(lines[best]) + 1) * (steps // _lines(steps))
    return {**_figures(np.asarray(log_prob, np.float64)), "learning_rate": rates[best], "step": step}


def _figures(log_prob: np.ndarray) -> dict[str, Any]:
    mean, error = mean_and_error(log_prob)
    return {"log_likelihood": mean, "log_likelihood_se": error}


def _lines(steps: int) -> int:
    return min(LINES, steps)


def fit(
    log_prob: Callable[[Any, jax.Array], jax.Array],
    batch_size: int,
    steps: int,
    rate: jax.Array,
    params: Any,
    train: jax.Array,
    valid: jax.Array,
    key: jax.Array,
) -> tuple[Any, jax.Array, jax.Array]:
    """Trains by Adam with a cosine decay.

    Returns:
        ``(params, loss [], line [])``: the parameters of the best checkpoint, its validation loss in nats, and which of
        the checkpoints it is. Steps that are left over after ``LINES`` equal parts are omitted.
    """
    loss = loss_of(log_prob)
    decay = optax.cosine_decay_schedule(1.0, steps)
    optimizer = optax.adam(lambda step: rate * decay(step))
    part = steps // _lines(steps)
    state = loop.init_state(params, optimizer)
    info = loop.empty_info(loss, state, train[:batch_size], key, part)

    def line(carry: Any, number: jax.Array) -> tuple[Any, None]:
        state, best, least, where = carry
        order_key, steps_key = loop.epoch_keys(key, number)
        order = jax.random.randint(order_key, (part, batch_size), 0, len(train))
        state, _ = loop.train_steps(loss, optimizer, state, info, train, order, steps_key, 0, part)
        found = loss(state.params, valid, key, state.step)[0]
        better = found < least  # False for NaN
        best, least, where = jax.tree.map(
            lambda new, old: jnp.where(better, new, old), (state.params, found, number), (best, least, where)
        )
        return (state, best, least, where), None

    start = (state, params, jnp.array(jnp.inf), jnp.array(0))
    (_, best, least, where), _ = jax.lax.scan(line, start, jnp.arange(_lines(steps)))
    return best, least, where


def loss_of(log_prob: Callable[[Any, jax.Array], jax.Array]) -> loop.Loss:
    """Returns the negative mean log-density as a loss of :mod:`planar_vae_jax.train.loop`."""
    return lambda params, batch, key, step: (-jnp.mean(log_prob(params, batch)), {})


def print_target(config: Config, target: str, rows: list[dict[str, Any]]) -> None:
    """Prints the table of one target."""
    print(f"\n{target}, K = {config.flows}: log-likelihood of held-out points, nats per standardised point")
    print(f"{'':<24} {'mean':>9}  by seed (learning rate)", flush=True)
    for row in rows:
        values = [one["log_likelihood"] for one in row["seeds"]]
        of_seeds = "  ".join(
            with_error(one["log_likelihood"], one["log_likelihood_se"])
            + (f" ({one['learning_rate']:g})" if "learning_rate" in one else "")
            for one in row["seeds"]
        )
        print(f"{row['name']:<24} {np.mean(values):>9.4f}  {of_seeds}", flush=True)


# --- Time


def time_all(config: Config, dim: int, chosen: list[str]) -> list[dict[str, Any]]:
    """Times a training step of all contestants on normal points in ``dim`` dimensions; returns their rows."""
    entries = {name: Contestant(step_of(config, CONTESTANTS[name], dim)) for name in chosen}
    times = interleave(entries, seconds=config.seconds, rounds=config.rounds, most_seconds=5 * config.seconds)
    sizes = {"batch_size": config.batch_size, "dim": dim, "flow_length": config.flows}
    return [
        {"name": name, **sizes, **milliseconds([second / STEPS_A_CALL for second in seconds])}
        for name, seconds in times.items()
    ]


def step_of(config: Config, build: Callable[[jax.Array, int, int], Model], dim: int) -> Callable[[], Any]:
    """Returns ``STEPS_A_CALL`` training steps from the initial parameters, compiled."""
    key = jax.random.key(0)
    model = build(key, config.flows, dim)
    loss, optimizer = loss_of(model.log_prob), optax.adam(1e-3)
    points = jax.random.normal(key, (4 * config.batch_size, dim))
    order = jax.random.randint(key, (STEPS_A_CALL, config.batch_size), 0, len(points))
    state = loop.init_state(model.params, optimizer)
    info = loop.empty_info(loss, state, points[: config.batch_size], key, STEPS_A_CALL)
    steps = jax.jit(functools.partial(loop.train_steps, loss, optimizer))

    def run() -> Any:
        return jax.block_until_ready(steps(state, info, points, order, key, 0, STEPS_A_CALL))

    run()
    return run


def print_times(times: list[dict[str, Any]]) -> None:
    """Prints the times of a step."""
    for dim in dict.fromkeys(row["dim"] for row in times):
        rows = [row for row in times if row["dim"] == dim]
        print(f"\n(B, D, K) = ({rows[0]['batch_size']}, {dim}, {rows[0]['flow_length']}): a training step")
        print(f"{'':<24} {'ms':>8} {'quartiles':>17} {'calls':>6}")
        for row in sorted(rows, key=lambda row: row["median_ms"]):
            quartiles = f"{row['lower_quartile_ms']:.3f} - {row['upper_quartile_ms']:.3f}"
            print(f"{row['name']:<24} {row['median_ms']:>8.3f} {quartiles:>17} {row['calls']:>6}")


def compare(times: list[dict[str, Any]]) -> Ratios:
    """Returns the ratio of a step's median time to that of FlowJAX's tanh layers, by contestant and dimension."""
    medians = {(row["dim"], row["name"]): row["median_ms"] for row in times}
    return {
        f"D={dim}: {name} / {PEER}": ratio(median, medians.get((dim, PEER)))
        for (dim, name), median in medians.items()
        if name != PEER
    }


def picture(rows: list[dict[str, Any]], times: list[dict[str, Any]], device: str) -> Figure:
    """Draws the log-likelihood by seed on each target, and the time of a step against D."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    names = list(dict.fromkeys([*CONTESTANTS, *(row["name"] for row in rows)]))
    figure = Figure(figsize=(3.5 * (len(targets) + 1) + 1.5, 4), layout="constrained", dpi=120)
    figure.suptitle(f"Planar densities fitted to points ({device})", fontsize=11)
    panels = np.atleast_1d(figure.subplots(1, len(targets) + 1))
    for axes, target in zip(panels, targets, strict=False):
        for place, name in enumerate(names):
            found = [row for row in rows if (row["target"], row["name"]) == (target, name)]
            values = [one["log_likelihood"] for row in found for one in row["seeds"]]
            axes.plot(values, [place] * len(values), "o", color=f"C{place}", alpha=0.7)
        axes.set(title=target, xlabel="held-out log-likelihood (nats)", ylim=(len(names) - 0.5, -0.5))
        axes.set_yticks(range(len(names)), names if axes is panels[0] else [""] * len(names), fontsize=8)
        axes.grid(alpha=0.3)
    for place, name in enumerate(names):
        found = sorted((row for row in times if row["name"] == name), key=lambda row: row["dim"])
        label = {} if targets else {"label": name}
        panels[-1].plot(
            [row["dim"] for row in found], [row["median_ms"] for row in found], "o-", color=f"C{place}", **label
        )
    panels[-1].set(xscale="log", yscale="log", xlabel="D", ylabel="ms a step (median)", title="a training step")
    panels[-1].grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    run_main(main)
