"""What K planar layers buy: models of several lengths, each trained with several seeds, with error bars.

    python -m experiments.flow_length --lengths=0,5 --seeds=4

runs ``experiments.mnist`` (whose flags it takes) for each length and seed in ``WORKDIR/flows=K-seed=S/``, and writes
table.md, table.csv, summary.json and flow_length.png: mean and standard deviation over seeds, and the difference to the
first length, paired by seed, with its 95 % interval. Four seeds of two lengths take about 15 minutes on two CPU cores.
The seeds of a length are trained one after the other or all together, whichever is measured to be faster.
``--each_class`` trains on each class alone ("each category" of Xu et al. 2023) and draws a page of reconstructions.

A sweep that was stopped goes on when the same command is run again, also with more lengths or seeds: runs that are
finished are not repeated.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from experiments import mnist
from planar_vae_jax import comparison, evaluation, plotting, published
from planar_vae_jax.data import Dataset, is_binary
from planar_vae_jax.flagged_data import choose_images, load_images
from planar_vae_jax.load import load_run
from planar_vae_jax.pages import binarized
from planar_vae_jax.placement import Placement
from planar_vae_jax.runs.choice import ASKED, Choices, Timing, time_seeds
from planar_vae_jax.runs.config import UsageError, as_json, check, flag, parse_run, shown
from planar_vae_jax.runs.console import print_table, run_main, warn
from planar_vae_jax.runs.devices import Devices, choose_devices, choose_devices_of_seeds
from planar_vae_jax.runs.files import read_json
from planar_vae_jax.runs.folder import RunFolder, is_finished, open_run
from planar_vae_jax.runs.together import Seed, fit_together

FIGURES = mnist.SHOWN
TOGETHER = "together.json"  # how the seeds of each length were trained
THREEFRY = "threefry2x32"  # under vmap the other generators draw for all seeds by the key of the first
PANELS = {
    "free_energy": "free energy (nats per image)",
    "nll": "NLL (nats per image)",
    "squared_error": "squared error per image",
}
EXAMPLES = 10  # of each class, on the page of reconstructions


@dataclass(frozen=True)
class Config(mnist.Config):
    """Flags of ``experiments.flow_length``: its own, and those of each run."""

    lengths: tuple[int, ...] = flag(
        (0, 5, 10, 20),
        "K of each model, as in 0,5; differences are to the first",
        at_least=0,
        at_most=10_000,
        resumable=True,
    )
    seeds: int = flag(4, "of each model: --seed, --seed + 1, ...", at_least=1, at_most=10_000, resumable=True)
    each_class: bool = flag(False, "train on each class alone (those of --classes, if given)")
    together: str = flag(
        "auto",
        "train the seeds of a length at once; auto: where that is measured to be faster",
        choices=ASKED,
        resumable=True,
        default_before="no",
    )
    flows: int = flag(None, "of experiments.mnist alone; here: --lengths")


class Run(NamedTuple):
    """A run of the sweep."""

    flows: int
    seed: int
    label: int | None  # the class that it is of alone
    config: mnist.Config
    data: Dataset
    identity: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{'' if self.label is None else f'class={self.label}-'}flows={self.flows}-seed={self.seed}"


def main(argv: list[str]) -> None:
    """Trains what is not trained yet, compares, draws and writes; ``argv`` without the program's name."""
    config = parse_run(Config, argv, __doc__, "flow_length")
    check_flags(config)
    notes: list[str] = []
    validation = 0 if config.each_class else config.validation
    whole = load_images(config.dataset, config.data_dir, config.classes, validation, notes.append)
    runs = plan(config, *whole)

    with open_run(config, "flow_length", whole[1]) as sweep:
        if sweep.finished:
            return
        for note in notes if sweep.new else ():
            warn(note)
        summaries = train(sweep, runs, config.together)
        rows = comparison.compare(by_length(config, runs, summaries), FIGURES)
        numbers = range(config.seed, config.seed + config.seeds)
        sweep.save_text("table.csv", comparison.comma_separated(rows, FIGURES, numbers))
        first = next(iter(summaries.values()))
        setting = describe(config, first, is_binary(whole[0]))
        sweep.save_text("table.md", f"# {setting}\n\n{comparison.markdown(rows, FIGURES)}")
        draw_lengths(sweep, config, rows, setting, whole[0].name)
        if config.each_class:
            draw_page(sweep, config, runs, setting)
        sweep.finish(
            {
                **{name: first[name] for name in ("dataset", "source", "binarization")},
                **{field.name: getattr(config, field.name) for field in dataclasses.fields(Config) if tells(field)},
                "rows": rows,
                "trained_together": read_json(sweep.workdir / TOGETHER) or {},
                "seconds": sum(summary["seconds"] for summary in summaries.values()),
            }
        )
        show(rows)


def tells(field: dataclasses.Field[Any]) -> bool:
    """Whether the summary tells a flag: what the sweep is of, and how long its runs are."""
    return field.name in ("lengths", "seeds", "each_class", "epochs", *mnist.FLAGS) and field.name != "flows"


def check_flags(config: Config) -> None:
    """Checks the sweep's own flags."""
    if config.flows is not None:
        raise UsageError(f"--flows is given by --lengths here; got --flows={config.flows}")
    if config.eval_only:
        single = "python -m experiments.mnist --workdir=WORKDIR/flows=K-seed=S --eval_only"
        raise UsageError(f"--eval_only is of a single run: {single}")
    if config.coordinator is not None:
        raise UsageError(f"--coordinator is of a single run, a sweep is one process; got {config.coordinator!r}")
    if config.together == "yes" and config.prng != THREEFRY:
        raise UsageError(f"--together=yes needs --prng={THREEFRY}; got --prng={config.prng}")
    if not config.lengths or len(set(config.lengths)) < len(config.lengths):
        given = ",".join(map(str, config.lengths))
        raise UsageError(f"--lengths must be at least one number, and none twice; got {given!r}")


def plan(config: Config, data: Dataset, identity: dict[str, Any]) -> list[Run]:
    """All runs of the sweep, each with its flags checked before the first begins."""
    images: dict[int | None, tuple[Dataset, dict[str, Any]]] = {None: (data, identity)}
    if config.each_class:
        if data.y_train is None or data.y_test is None:
            raise UsageError(f"--each_class needs labels of training and test images; {data.name} has none")
        labels = [int(label) for label in np.unique(data.y_test)]
        images = {c: choose_images(data, (c,), config.validation) for c in labels}
    runs = []
    for label, of_label in images.items():
        for flows in config.lengths:
            for seed in range(config.seed, config.seed + config.seeds):
                one = config_of_run(config, flows, seed, label)
                one = mnist.with_defaults(one, mnist.check_data(one, of_label[0]))
                runs.append(Run(flows, seed, label, one, *of_label))
    return runs


def config_of_run(config: Config, flows: int, seed: int, label: int | None) -> mnist.Config:
    """The flags of one run, but for its folder."""
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(mnist.Config)}
    given |= {"flows": flows, "seed": seed, "amortized": config.amortized and flows > 0}
    given |= {"resume": "auto", "overwrite": False, "classes": config.classes if label is None else (label,)}
    one = mnist.Config(**given)
    check(one)
    mnist.check_flags(one)
    return one


def train(sweep: RunFolder, runs: Sequence[Run], asked: str) -> dict[str, dict[str, Any]]:
    """The summary of each run by its name, after those not finished have been trained, together as ``asked``."""
    runs = [run._replace(config=replace(run.config, workdir=str(sweep.workdir / run.name))) for run in runs]
    finished = {run.name: is_finished(run.config, "mnist", run.identity) for run in runs}  # each before any begins
    done = sum(finished.values())
    sweep.go_on(0.0, f"with {done} of {len(runs)} runs done")
    choices = Choices(sweep.workdir / TOGETHER, asked)
    summaries = {}
    for _, of_length in itertools.groupby(runs, key=lambda run: (run.label, run.flows)):
        group = list(of_length)
        devices = train_together([run for run in group if not finished[run.name]], choices)
        for run in group:
            if finished[run.name]:
                summaries[run.name] = read_json(sweep.workdir / run.name / "summary.json") or {}
            else:
                print(f"\nrun {done + 1} of {len(runs)}: {run.name}", flush=True)
                summaries[run.name] = mnist.train(run.config, run.data, run.identity, devices=devices)
                done += 1
    return summaries


def train_together(runs: Sequence[Run], choices: Choices) -> Devices | None:
    """Trains the seeds of a length together, if that is chosen; the devices that they are on, for their figures."""
    if len(runs) < 2:
        return None
    config, data = runs[0].config, runs[0].data
    alone, together = choose_devices(config, config.batch_size), choose_devices_of_seeds(config, len(runs))
    placed = Placement(data, config.binarization, together, config.batch_size, config.device_memory)

    @functools.cache
    def prepared() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        vae, training, *_ = mnist.prepare(config, data, placed)
        return training, [mnist.begin(vae, run.config) for run in runs]

    def measure() -> Timing:
        return time_seeds(*prepared(), alone, together)

    obstacle = "the training images are sent in chunks, of one seed's order" if placed.streams else None
    if config.prng != THREEFRY:
        obstacle = f"with --prng={config.prng} seeds together draw other numbers"
    if not choices.together(f"flows={config.flows}", alone, together, measure, obstacle):
        return None
    print(f"\n{len(runs)} runs together, from {runs[0].name} on; shown while learning: means over them", flush=True)
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(open_run(run.config, "mnist", run.identity, together)) for run in runs]
        training, starts = prepared()
        fit_together([Seed(run, **start) for run, start in zip(folders, starts, strict=True)], **training)
    return together


def by_length(
    config: Config, runs: Sequence[Run], summaries: Mapping[str, dict[str, Any]]
) -> dict[int, list[dict[str, Any]]]:
    """K -> the figures of each seed, over all images and by class; models of single classes make one of all."""
    found: dict[int, list[dict[str, Any]]] = {}
    for flows in config.lengths:
        for seed in range(config.seed, config.seed + config.seeds):
            mine = {run.label: summaries[run.name] for run in runs if (run.flows, run.seed) == (flows, seed)}
            classes = {label: row for summary in mine.values() for label, row in summary["per_class"].items()}
            whole = comparison.pooled(classes, FIGURES) if config.each_class else mine[None]["test"]
            found.setdefault(flows, []).append({"all": whole, **classes})
    return found


def describe(config: Config, summary: Mapping[str, Any], binary: bool) -> str:
    """What tells this sweep's figures from another's."""
    binarization = summary["binarization"]
    parts = [
        f"{summary['dataset']}{f' classes {shown(as_json(config.classes))}' if config.classes else ''}",
        *(["a model for each class"] if config.each_class else []),
        "grey levels" if binarization == "none" else binarized(binarization, binary),
        "each image its own flow" if config.amortized else "one flow for all images",
        *([f"objective {config.objective}"] if config.objective != "elbo" else []),
        f"{config.epochs} epoch{'s' * (config.epochs > 1)}",
        f"{config.seeds} seed{'s' * (config.seeds > 1)}",
    ]
    return ", ".join(parts)


def draw_lengths(
    sweep: RunFolder, config: Config, rows: Sequence[Mapping[str, Any]], setting: str, dataset: str
) -> None:
    """Free energy and NLL (or the squared error, where that is what was trained) against K."""
    names = ("squared_error",) if config.objective == "reconstruction" else ("free_energy", "nll")
    panels = {PANELS[name]: [row[name] for row in rows] for name in names}
    theirs = None
    if dataset == "binarized_mnist" and config.amortized and not (config.classes or config.each_class):
        theirs = {published.REPRODUCTION: {PANELS[name]: by_k for name, by_k in published.AMORTIZED_PLANAR.items()}}
    figure = plotting.against_length(config.lengths, panels, title=f"What K buys\n({setting})", published=theirs)
    sweep.save_figure("flow_length.png", figure)


def draw_page(sweep: RunFolder, config: Config, runs: Sequence[Run], setting: str) -> None:
    """Test images of each class above their reconstructions by the models of the first and of the last length."""
    chosen: dict[str, np.ndarray] = {}
    for run in runs:
        if run.seed != config.seed or run.flows not in (config.lengths[0], config.lengths[-1]):
            continue
        images, index = run.data.x_test[:EXAMPLES], run.data.test_index[:EXAMPLES]
        model = load_run(sweep.workdir / run.name, "best" if config.patience else "latest")
        pixels = evaluation.fixed_images(images, index, "test", model.binarization).pixels
        pictures = np.asarray(evaluation.reconstruct(model.vae, model.params, pixels))
        chosen.setdefault(f"{run.label}: original", images / 255.0)
        chosen[f"{run.label}: K = {run.flows}"] = pictures
    fewest = min(map(len, chosen.values()))
    rows = {name: pictures[:fewest] for name, pictures in chosen.items()}
    title = f"Test images and their reconstructions by the model of their class, seed {config.seed}\n({setting})"
    sweep.save_figure("each_class.png", plotting.image_rows(rows, title=title))


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the figures over all images."""
    several = len(rows[0][FIGURES[0]]["by_seed"]) > 1
    print(f"\n{'mean ± standard deviation over seeds' if several else comparison.ONE_SEED}")
    spreads = {f"K = {row['flows']}": {name: row[name]["mean"] for name in FIGURES} for row in rows}
    for row in rows:
        spreads[f"K = {row['flows']}"] |= {f"{name}_se": row[name]["std"] for name in FIGURES}
    print_table(spreads, FIGURES)
    if len(rows) > 1:
        print(f"\ndifference to K = {rows[0]['flows']}, paired by seed{', ± half of its 95 % interval' * several}")
        print_table({f"K = {row['flows']}": comparison.halves(row["minus_first"]) for row in rows[1:]}, FIGURES)


if __name__ == "__main__":
    run_main(main)
