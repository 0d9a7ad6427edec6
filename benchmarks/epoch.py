"""An MNIST epoch of the planar-flow VAE, against PyTorch and against its matrix products alone.

    pip install -e '.[bench]'
    python -m benchmarks.epoch

takes about five minutes on two CPU cores, prints a table, and writes the times and a picture into ``runs/bench-epoch``.
All contestants train the model of ``experiments.mnist`` (784 - 400 - ReLU - 40, K planar layers, and back; Adam; new
pixels drawn at each visit) on the same synthetic images, in turns, a slice of steps each:

- ours: an epoch of ``experiments.mnist``, by that experiment's own compiled functions;
- PyTorch eager (layers as they are usually written), tuned (as few operations as we found) and compiled (the same
  under ``torch.compile``, which needs a C++ compiler), each checked first against ours: the same free energy
  and gradient from the same weights, pixels and noise;
- products alone: the floor, the matrix products of a step, forward and backward of the four linear layers.

A slice of ``--steps`` steps is an epoch over so many batches; an epoch of 60,000 images has 468.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from experiments.flags import UsageError, flag, parse
from experiments.runs import Run, run_main
from matplotlib.figure import Figure

from benchmarks.peers import require_agreement
from benchmarks.report import Goal, goals_json, load, machine, print_goals, print_machine, ratio
from benchmarks.timing import Contestant, interleave, spread
from benchmarks.torch_models import Unavailable, import_module, synchronize, torch_device, vae
from experiments import mnist
from planar_vae_jax import objectives, training
from planar_vae_jax.binarization import binarize

PIXELS = 784
OURS, PRODUCTS = "ours", "products alone"
EAGER, TUNED, COMPILED = "PyTorch eager", "PyTorch tuned", "PyTorch compiled"
EAGER_GOALS = {0: 2.0, 5: 2.8, 80: 11.0}


@dataclass(frozen=True)
class Config:
    """Flags of ``benchmarks.epoch``."""

    flows: tuple[int, ...] = flag((0, 5, 80), "K, numbers of planar layers", at_least=0)
    compiled: tuple[int, ...] = flag(
        (0, 5, 80), "those of them for torch.compile, which takes up to a minute", at_least=0
    )
    peers: str = flag("torch", "torch or none", choices=("torch", "none"))
    threads: tuple[int, ...] = flag((1, 2), "threads of PyTorch to choose the best from", at_least=1)
    images: int = flag(60_000, "training images of an epoch", at_least=1)
    steps: int = flag(50, "steps of a slice; 0: a whole epoch", at_least=0)
    rounds: int = flag(7, "slices of each contestant", at_least=1)
    batch_size: int = flag(128, "images a step", at_least=1)
    latent: int = flag(40, "size of z", at_least=1)
    hidden: int = flag(400, "width of the hidden layers", at_least=1)
    seed: int = flag(0, "of images and weights", at_least=0, at_most=2**32 - 1)
    workdir: str = flag("runs/bench-epoch", "folder for what the run writes")


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
    run = Run(config, "bench-epoch")
    facts = machine()
    print_machine(facts)
    if steps < epoch_steps:
        print(
            f"slices of {steps} steps stand for an epoch of {epoch_steps}, whose seconds are extrapolated", flush=True
        )
    pixels = synthetic_images(config.seed, steps * config.batch_size)
    entries, left_out = contestants(config, pixels)
    times = interleave(
        {str(entry): entry.contestant for entry in entries},
        seconds=0.0,
        rounds=config.rounds,
        least_calls=config.rounds,
        warm_up=False,
    )
    rows = []
    for entry in entries:
        median, lower, upper, slices = spread(times[str(entry)], 1e3 / steps)
        rows.append(
            {
                "title": str(entry),
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
        )
    goals = compare(rows)
    print_rows(rows, left_out)
    print_goals(goals)
    run.save_figure("epoch.png", picture(rows, facts["device"]))
    run.finish(
        {
            "what": "a training step of the VAE, float32; milliseconds a step, median and quartiles over slices",
            "machine": {**facts, "load_average_at_end": load()},
            "steps_a_slice": steps,
            "steps_an_epoch": epoch_steps,
            "extrapolated": steps < epoch_steps,
            "rows": rows,
            "left_out": left_out,
            "goals": goals_json(goals),
        }
    )


def synthetic_images(seed: int, count: int) -> np.ndarray:
    """``[count, 784]`` uint8; a fifth of the pixels is inked, as in MNIST."""
    rng = np.random.default_rng(seed)
    ink = rng.random((count, PIXELS), np.float32) < 0.2
    return rng.integers(1, 256, (count, PIXELS), dtype=np.uint8) * ink


class Entry(NamedTuple):
    """Who takes part in the timing."""

    name: str
    flows: int | None
    threads: int | None
    first_slice_seconds: float  # building, checking, compiling and running it
    errors: dict[str, float] | None  # against ours, of the largest value of each leaf
    contestant: Contestant

    def __str__(self) -> str:
        flows = "" if self.flows is None else f", K={self.flows}"
        return self.name + flows + ("" if self.threads is None else f", threads={self.threads}")


def contestants(config: Config, pixels: np.ndarray) -> tuple[list[Entry], list[dict[str, str]]]:
    """Everybody, compiled and run once; and who is left out, and why."""
    entries = [built(PRODUCTS, None, functools.partial(products, config, pixels))]
    entries += [built(OURS, flows, functools.partial(ours, config, flows, pixels)) for flows in config.flows]
    try:
        if config.peers == "none":
            raise Unavailable("--peers=none")
        torch = import_module("torch")
        device = torch_device(torch)
    except Unavailable as error:
        return entries, [{"name": "PyTorch", "why": str(error)}]
    left_out: list[dict[str, str]] = []
    for flows in config.flows:
        for name in (EAGER, TUNED, COMPILED):
            if name == TUNED and flows == 0:  # there is nothing to tune
                continue
            try:
                if name == COMPILED and flows not in config.compiled:
                    raise Unavailable(f"--compiled does not name {flows}")
                torch.set_num_threads(max(config.threads))
                entry = built(name, flows, functools.partial(torch_slices, config, torch, device, name, flows, pixels))
            except Exception as error:  # no C++ compiler, say: go on without it
                why = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
                left_out.append({"name": f"{name}, K={flows}", "why": " ".join(why.split())[:200]})
                continue
            # Compiled code is compiled for a number of threads: for one number alone.
            for threads in config.threads if name != COMPILED else (max(config.threads),):
                prepare = functools.partial(torch.set_num_threads, threads)
                contestant = Contestant(entry.contestant.run, prepare)
                entries.append(entry._replace(threads=threads, contestant=contestant))
    return entries, left_out


def built(name: str, flows: int | None, build: Callable[[], tuple[Callable[[], Any], Any]]) -> Entry:
    """An entry whose first slice, with all compilation, is done; ``build`` returns it and its errors."""
    started = time.perf_counter()
    step, errors = build()
    step()
    entry = Entry(name, flows, None, time.perf_counter() - started, errors, Contestant(step))
    check = f", differs from ours by {max(errors.values()):.0e}" if errors else ""
    print(f"{entry}: ready after {entry.first_slice_seconds:.1f} s{check}", flush=True)
    return entry


# --- Ours and the floor.


def settings(config: Config, flows: int) -> mnist.Config:
    return mnist.Config(
        flows=flows,
        hidden=config.hidden,
        latent=config.latent,
        batch_size=config.batch_size,
        binarization="dynamic",
        workdir=config.workdir,
    )


def ours(config: Config, flows: int, pixels: np.ndarray) -> tuple[Callable[[], Any], None]:
    """Slices of our training: each is an epoch over ``pixels``, as ``experiments.mnist`` has it."""
    chosen = settings(config, flows)
    model, optimizer = mnist.make_model(chosen, PIXELS), mnist.make_optimizer(chosen)
    epoch = mnist.compile_epoch(chosen, model, optimizer, jnp.asarray(pixels))
    key = jax.random.key(config.seed)
    state = training.init_state(jax.jit(model.init)(key), optimizer)
    info, number = epoch.info(state), 0

    def step() -> None:
        nonlocal state, info, number
        state, info, _ = epoch.piece(epoch.start(key, number), state, info, 0, epoch.steps)
        jax.block_until_ready((state, epoch.means(info)))
        number += 1

    return step, None


def products(config: Config, pixels: np.ndarray) -> tuple[Callable[[], Any], None]:
    """The products of a step alone, on batches that are drawn beforehand: 4 forward, 4 by weights, 3 by inputs.

    The encoder's two heads are one layer here. Every result is an input of a later product or is handed on, so
    that no product can be left out.
    """
    latent, hidden = config.latent, config.hidden
    shapes = {
        "encode": (PIXELS, hidden),
        "heads": (hidden, 2 * latent),
        "decode": (latent, hidden),
        "logits": (hidden, PIXELS),
    }
    keys = jax.random.split(jax.random.key(config.seed), len(shapes))
    weights = {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    x = jax.jit(lambda pixels: binarize(jax.random.key(0), pixels, "dynamic"))(jnp.asarray(pixels))
    batches = x.reshape(-1, config.batch_size, PIXELS)

    @jax.jit
    def slice_of_steps(weights: Any, batches: Any) -> Any:
        def step(_: Any, x: Any) -> Any:
            features = x @ weights["encode"]
            heads = features @ weights["heads"]
            z = heads[:, :latent]
            hidden = z @ weights["decode"]
            logits = hidden @ weights["logits"]
            hidden_bar = logits @ weights["logits"].T
            z_bar = hidden_bar @ weights["decode"].T
            heads_bar = jnp.concatenate([z_bar, z_bar], 1)
            features_bar = heads_bar @ weights["heads"].T
            bars = {
                "encode": x.T @ features_bar,
                "heads": features.T @ heads_bar,
                "decode": z.T @ hidden_bar,
                "logits": hidden.T @ logits,
            }
            return bars, None

        return jax.lax.scan(step, weights, batches)[0]

    return lambda: jax.block_until_ready(slice_of_steps(weights, batches)), None


# --- PyTorch.


def torch_slices(
    config: Config, torch: Any, device: Any, name: str, flows: int, pixels: np.ndarray
) -> tuple[Callable[[], Any], dict[str, float]]:
    """Slices of the same training in PyTorch.

    Raises:
        Unavailable: if its free energy or gradient are not ours.
    """
    weights, (x, noise), truth = reference(config, flows)
    model = vae(torch, {name: torch.tensor(value, device=device) for name, value in weights.items()}, name == EAGER)
    free_energies = model(torch.tensor(x, device=device), torch.tensor(noise, device=device))
    free_energies.mean().backward()
    errors = require_agreement({"free_energy": free_energies.detach().cpu().numpy(), **model.gradients()}, truth)
    torch.manual_seed(config.seed)
    data = torch.tensor(pixels, device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings(config, flows).learning_rate, fused=True)

    def loss(batch: Any) -> Any:
        x = torch.bernoulli(batch.float() / 255.0)
        noise = torch.randn(len(batch), config.latent, device=device)
        return model(x, noise).mean()

    if name == COMPILED:
        loss = torch.compile(loss, dynamic=False)

    def step() -> None:
        order = torch.randperm(len(data), device=device)
        for indices in order.split(config.batch_size):
            optimizer.zero_grad()
            loss(data[indices]).backward()
            optimizer.step()
        synchronize(torch, device)

    return step, errors


def leaves(vae: Any) -> dict[str, np.ndarray]:
    """The arrays of one of our models, by name."""
    parts = {
        "encode": vae.encode.hidden,
        "mean": vae.encode.mean,
        "log_std": vae.encode.log_std,
        "decode": vae.decode.hidden,
        "logits": vae.decode.logits,
    }
    arrays = {f"{name}.{leaf}": getattr(part, leaf)[...] for name, part in parts.items() for leaf in ("kernel", "bias")}
    arrays |= {leaf: getattr(vae.encode, leaf)[...] for leaf in "uwb"}
    return {name: np.array(array) for name, array in arrays.items() if array.size}


def reference(config: Config, flows: int) -> tuple[dict[str, np.ndarray], tuple[Any, Any], dict[str, np.ndarray]]:
    """Our weights, eight ``(x [8, P], noise [8, L])``, and their free energies with the gradient of the mean."""
    model = mnist.make_model(settings(config, flows), PIXELS)
    params = jax.jit(model.init)(jax.random.key(config.seed))
    keys = jax.random.split(jax.random.key(1), 8)
    x = (synthetic_images(1, 8) > 0).astype(np.float32)
    noise = jax.vmap(lambda key: jax.random.normal(key, (config.latent,)))(keys)  # as sample_posterior draws it

    @jax.jit
    def gradient(params: Any) -> Any:
        def mean_free_energy(params: Any) -> Any:
            vae = model.bind(params)
            terms = jax.vmap(lambda x, key: objectives.free_energy(vae, x, key))(x, keys)
            return jnp.mean(terms.free_energy), terms.free_energy

        return jax.grad(mean_free_energy, has_aux=True)(params)

    bar, free_energies = gradient(params)
    truth = {"free_energy": np.asarray(free_energies), **leaves(model.bind(bar))}
    return leaves(model.bind(params)), (x, np.asarray(noise)), truth


# --- What is said about it.


def compare(rows: list[dict[str, Any]]) -> list[Goal]:
    """Ratios of medians, beside their goals where there are any."""
    medians: dict[tuple[str, int | None], float] = {}
    for row in rows:  # of PyTorch's numbers of threads the best
        key = row["name"], row["flows"]
        medians[key] = min(row["median_ms"], medians.get(key, row["median_ms"]))

    def over_ours(name: str, flows: int) -> float | None:
        return ratio(medians.get((name, flows)), medians.get((OURS, flows)))

    lengths = list(dict.fromkeys(row["flows"] for row in rows if row["flows"] is not None))
    zero, five, eighty = (medians.get((OURS, flows)) for flows in (0, 5, 80))
    return [
        Goal(f"ours, K=5 / {PRODUCTS}", False, 1.3, ratio(five, medians.get((PRODUCTS, None)))),
        Goal("ours, K=80 / ours, K=0", False, 1.2, ratio(eighty, zero)),
        *(
            Goal(f"K={flows}: {EAGER} / ours", True, EAGER_GOALS.get(flows), over_ours(EAGER, flows))
            for flows in lengths
        ),
        *(Goal(f"K={flows}: {TUNED} / ours", True, None, over_ours(TUNED, flows)) for flows in lengths if flows),
        *(Goal(f"K={flows}: {COMPILED} / ours", True, None, over_ours(COMPILED, flows)) for flows in lengths),
    ]


def print_rows(rows: list[dict[str, Any]], left_out: list[dict[str, str]]) -> None:
    """The table."""
    width = max(len(row["title"]) for row in rows)
    print(f"\n{'':<{width}} {'ms a step':>10} {'quartiles':>19} {'epoch, s':>9}")
    for row in rows:
        quartiles = f"{row['lower_quartile_ms']:.2f} - {row['upper_quartile_ms']:.2f}"
        print(f"{row['title']:<{width}} {row['median_ms']:>10.2f} {quartiles:>19} {row['epoch_seconds']:>9.2f}")
    for absent in left_out:
        print(f"{absent['name']} left out: {absent['why']}")


def picture(rows: list[dict[str, Any]], device: str) -> Figure:
    """Milliseconds a step, a bar for each contestant with its best number of threads, by K."""
    colors = {PRODUCTS: "0.6", OURS: "black", EAGER: "C1", TUNED: "C3", COMPILED: "C2"}
    best: dict[tuple[str, int | None], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["median_ms"]):
        best.setdefault((row["name"], row["flows"]), row)
    rows = sorted(best.values(), key=lambda row: (-1 if row["flows"] is None else row["flows"], row["median_ms"]))
    figure = Figure(figsize=(9, 0.3 * len(rows) + 1.5), layout="constrained", dpi=120)
    figure.suptitle(f"A training step of the VAE with K planar layers ({device})", fontsize=11)
    axes = figure.subplots()
    median = np.array([row["median_ms"] for row in rows])
    spreads = (median - [row["lower_quartile_ms"] for row in rows], [row["upper_quartile_ms"] for row in rows] - median)
    names = [row["title"] for row in rows]
    bars = axes.barh(names, median, xerr=spreads, capsize=2, color=[colors[row["name"]] for row in rows])
    axes.bar_label(bars, fmt="%.1f", padding=5, fontsize=8)
    axes.set_xlabel("milliseconds a step (median, quartiles)")
    axes.margins(x=0.08)
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    return figure


if __name__ == "__main__":
    run_main(main)
