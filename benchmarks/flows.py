"""Value, log-determinant and gradient of K planar layers: ours against FlowJAX, normflows, Pyro and PyTorch.

    pip install -e '.[bench]'
    python -m benchmarks.flows

takes about five minutes on two CPU cores, prints tables, and writes the times and a figure to ``runs/bench-flows``.
It times the mean over a batch of |zK|^2 / 2 - log_det, with its gradient with respect to all parameters and z0, in
float32. First it compares value and gradient of each contestant with ours in float64, for the same map. A contestant
that is not installed, cannot compute a case or disagrees is left out, and the table says why. PyTorch is timed with 1
and with 2 threads and the faster one is shown; JAX chooses its threads itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks import peers
from benchmarks.peers import PEERS, Peer
from benchmarks.problems import Problem, Result, Unavailable, draw_problem, require_agreement
from benchmarks.report import Ratios, Results, load, machine, print_machine, print_ratios, ratio
from benchmarks.timing import Contestant, interleave, milliseconds
from planar_vae_jax.runs.config import UsageError, flag, parse
from planar_vae_jax.runs.console import run_main

CASES = "1024x2x32,128x40x16,128x40x80,512x64x32,128x784x128"

OURS: dict[str, Callable[[Problem], Peer]] = {
    "ours": lambda problem: peers.ours(problem, None),
    "ours, scan": lambda problem: peers.ours(problem, "scan"),
    "ours, gram": lambda problem: peers.ours(problem, "gram"),
    "ours, vmap": peers.ours_under_vmap,
}
FLOOR = "floor"
PYTORCH = ("normflows", "Pyro", "PyTorch layer")  # the packages, and the layer as it is usually written
NAMES = {name.lower().replace(" ", "-"): name for name in PEERS}


@dataclass(frozen=True)
class Config:
    """Flags of ``benchmarks.flows``."""

    cases: str = flag(CASES, "batch, dimension and layers as BxDxK, joined by commas")
    parameters: str = flag(
        "both",
        "shared: one flow for all events; amortized: one for each event",
        choices=("both", "shared", "amortized"),
    )
    peers: str = flag("all", f"all, none, or names joined by commas: {', '.join(NAMES)}")
    threads: tuple[int, ...] = flag((1, 2), "numbers of threads of PyTorch, of which the fastest is shown", at_least=1)
    seconds: float = flag(1.0, "timed seconds for each contestant in each case", above=0.0)
    rounds: int = flag(7, "turns over which these seconds are spread", at_least=1)
    seed: int = flag(0, "seed of the parameters and events", at_least=0, at_most=2**32 - 1)
    workdir: str = flag("runs/bench-flows", "folder for the results")


class Case(NamedTuple):
    """Sizes of a case, and whether each event has its own parameters."""

    batch_size: int
    dim: int
    flow_length: int
    amortized: bool

    def __str__(self) -> str:
        kind = "amortized" if self.amortized else "shared"
        return f"({self.batch_size}, {self.dim}, {self.flow_length}) {kind}"


def main(argv: list[str]) -> None:
    """Measures, prints, draws and writes; ``argv`` without the program's name."""
    config = parse(Config, argv, __doc__)
    cases, chosen = parse_cases(config.cases, config.parameters), parse_peers(config.peers)
    results = Results(config, "flows")
    facts = machine()
    print_machine(facts)
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    for case in cases:
        case_rows, case_left_out = measure(config, case, chosen)
        rows += case_rows
        left_out += case_left_out
        print_case(case, case_rows, case_left_out)
    ratios = compare(rows)
    print_ratios(ratios)
    results.finish(
        {
            "what": "mean |zK|^2 / 2 - log_det with its gradient by u, w, b and z0, float32; milliseconds a call",
            "machine": {**facts, "load_average_at_end": load()},
            "rows": rows,
            "left_out": left_out,
            "ratios": ratios,
        },
        "flows.png",
        picture(rows, facts["device"]),
    )


def parse_cases(cases: str, parameters: str) -> list[Case]:
    """Returns the cases that ``--cases`` and ``--parameters`` name.

    Raises:
        UsageError: if an entry is not of the form BxDxK.
    """
    kinds = {"both": (False, True), "shared": (False,), "amortized": (True,)}[parameters]
    found = []
    for text in cases.split(","):
        sizes = text.strip().split("x")
        if len(sizes) != 3 or not all(size.isascii() and size.isdigit() and int(size) for size in sizes):
            raise UsageError(f"--cases must be BxDxK joined by commas, as in 128x40x16; got {text!r}")
        batch_size, dim, flow_length = map(int, sizes)
        found += [Case(batch_size, dim, flow_length, amortized) for amortized in kinds]
    return found


def parse_peers(text: str) -> list[str]:
    """Returns the names of ``PEERS`` that ``--peers`` chooses.

    Raises:
        UsageError: if a name is unknown.
    """
    if text == "none":
        return []
    if text == "all":
        return list(PEERS)
    names = [name.strip().lower() for name in text.split(",")]
    for name in names:
        if name not in NAMES:
            raise UsageError(f"--peers must be all, none or of {', '.join(NAMES)}; got {name!r}")
    return [NAMES[name] for name in names]


def measure(config: Config, case: Case, chosen: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Builds, checks and times the contestants of one case; returns their rows, and who was left out and why."""
    sizes = case._asdict()
    problem = draw_problem(np.random.default_rng(config.seed), **sizes)
    truth = peers.truth(problem)
    entries: dict[str, Contestant] = {}
    facts: dict[str, dict[str, Any]] = {}
    left_out: list[dict[str, str]] = []
    for name, build in {**OURS, **{name: PEERS[name] for name in chosen}, FLOOR: peers.floor}.items():
        try:
            peer, errors = checked(build, problem, truth)
        except Exception as error:
            # Another version of a package may have another interface: report it and continue without it.
            if name in OURS:
                raise
            why = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
            left_out.append({"case": str(case), "name": name, "why": " ".join(why.split())[:200]})
            continue
        for threads in (None,) if peer.torch is None else config.threads:
            key = f"{name}, threads={threads}"
            entries[key] = entry(peer, threads)
            facts[key] = {"case": str(case), **sizes, "name": name, "threads": threads, "errors": errors}
    times = interleave(entries, seconds=config.seconds, rounds=config.rounds, most_seconds=5 * config.seconds)
    rows = [{**facts[key], **milliseconds(seconds)} for key, seconds in times.items()]
    return best_threads(rows), left_out


def checked(build: Callable[[Problem], Peer], problem: Problem, truth: Result) -> tuple[Peer, dict[str, float] | None]:
    """Returns a contestant that has run once, and its errors (None if it computes no flow).

    Raises:
        Unavailable: if it cannot take part, or its result differs from ours.
    """
    peer = build(problem)
    if peer.torch is not None:
        peer.torch.set_num_threads(1)  # several threads may wait for each other for seconds on a busy machine
    output = peer.run()
    if peer.result is None:
        return peer, None
    return peer, require_agreement(peer.result(output)._asdict(), truth._asdict())


def best_threads(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the fastest row of each name, with the other rows in its ``other_threads``."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["median_ms"]):
        by_name.setdefault(row["name"], []).append(row)
    times = ("threads", "median_ms", "lower_quartile_ms", "upper_quartile_ms", "calls")
    return [
        {**best, "other_threads": [{name: other[name] for name in times} for other in others]}
        for best, *others in by_name.values()
    ]


def entry(peer: Peer, threads: int | None) -> Contestant:
    """Returns a contestant that sets the number of PyTorch threads before each turn."""
    if threads is None:
        return Contestant(peer.run)
    return Contestant(peer.run, lambda: peer.torch.set_num_threads(threads))


def print_case(case: Case, rows: list[dict[str, Any]], left_out: list[dict[str, str]]) -> None:
    """Prints the table of one case, fastest first."""
    print(f"\n(B, D, K) = {case}")
    print(f"{'':<16} {'ms a call':>10} {'quartiles':>19} {'calls':>6} {'x ours':>7} {'threads':>7} {'error':>8}")
    ours = next(row["median_ms"] for row in rows if row["name"] == "ours")
    for row in sorted(rows, key=lambda row: row["median_ms"]):
        quartiles = f"{row['lower_quartile_ms']:.3f} - {row['upper_quartile_ms']:.3f}"
        error = "-" if row["errors"] is None else f"{max(row['errors'].values()):.0e}"
        print(
            f"{row['name']:<16} {row['median_ms']:>10.3f} {quartiles:>19} {row['calls']:>6} "
            f"{row['median_ms'] / ours:>7.2f} {row['threads'] or '-':>7} {error:>8}"
        )
    for absent in left_out:
        print(f"{absent['name']:<16} left out: {absent['why']}")


def compare(rows: list[dict[str, Any]]) -> Ratios:
    """Returns ratios of medians to ours: our other methods, the floor, and the fastest peers."""
    medians = {(row["case"], row["name"]): row["median_ms"] for row in rows}
    groups = {
        **{name: (name,) for name in (*list(OURS)[1:], FLOOR, "FlowJAX")},
        f"best of {', '.join(PYTORCH)}": PYTORCH,
        "PyTorch tuned": ("PyTorch tuned",),
    }
    ratios: Ratios = {}
    for case in dict.fromkeys(row["case"] for row in rows):
        for label, names in groups.items():
            found = [medians[case, name] for name in names if (case, name) in medians]
            ratios[f"{case}: {label} / ours"] = ratio(min(found, default=None), medians.get((case, "ours")))
    return ratios


def picture(rows: list[dict[str, Any]], device: str) -> Figure:
    """Draws milliseconds per call against the size of a case, for shared and for amortised flows."""
    kinds = [amortized for amortized in (False, True) if any(row["amortized"] == amortized for row in rows)]
    styles: dict[str, dict[str, Any]] = {
        "ours": {"color": "black", "linewidth": 2.5},
        "ours, scan": {"color": "black", "linestyle": "--"},
        "ours, gram": {"color": "black", "linestyle": ":"},
        "ours, vmap": {"color": "black", "linestyle": "-."},
        FLOOR: {"color": "0.6"},
        **{name: {"color": f"C{index}"} for index, name in enumerate(PEERS)},
    }
    cases = {size(row): f"{row['batch_size']} x {row['dim']} x {row['flow_length']}" for row in rows}
    figure = Figure(figsize=(2.5 + 5.0 * len(kinds), 5), layout="constrained", dpi=120)
    figure.suptitle(f"Value, log-determinant and gradient of K planar layers, float32 ({device})", fontsize=11)
    panels = np.atleast_1d(figure.subplots(1, len(kinds), sharey=True))
    for axes, amortized in zip(panels, kinds, strict=True):
        for name, style in styles.items():
            own = sorted((row for row in rows if row["name"] == name and row["amortized"] == amortized), key=size)
            median = np.array([row["median_ms"] for row in own])
            below = median - [row["lower_quartile_ms"] for row in own]
            above = [row["upper_quartile_ms"] for row in own] - median
            x = [size(row) for row in own]
            if own or not amortized:  # an empty line still adds its name to the legend
                axes.errorbar(x, median, (below, above), label=name, marker="o", markersize=4, capsize=2, **style)
        title = "one flow for each event (amortised)" if amortized else "one flow for all events (shared)"
        axes.set(xscale="log", yscale="log", title=title, xlabel="batch x dimension x layers")
        axes.set_xticks(list(cases), list(cases.values()), rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds a call (median, quartiles)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    return figure


def size(row: dict[str, Any]) -> int:
    """Returns B D K of a row, to which the work is proportional."""
    return row["batch_size"] * row["dim"] * row["flow_length"]


if __name__ == "__main__":
    run_main(main)
