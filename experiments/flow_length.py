"""What K planar layers buy: models of several lengths, each trained with several seeds, with error bars.

    python -m experiments.flow_length --lengths=0,5 --seeds=4

runs ``experiments.mnist`` (whose flags it takes) for each length and seed in ``WORKDIR/flows=K-seed=S/``, and writes
table.md, table.csv, summary.json and flow_length.png: mean and standard deviation over seeds, and the difference to the
first length, paired by seed, with its 95 % interval. Four seeds of two lengths take about 15 minutes on two CPU cores.
The seeds of a length are trained one after the other or all together, together where that is measured to be
more than 5 % faster.
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
from typing import Any, ClassVar, NamedTuple

import numpy as np

from experiments import mnist
from planar_vae_jax import load_run, report, statistics
from planar_vae_jax.data import Dataset, is_binary
from planar_vae_jax.report import binarized
from planar_vae_jax.runs.choice import ASKED, Choices, Timing, time_seeds
from planar_vae_jax.runs.config import UsageError, as_json, check, flag, parse_run, shown
from planar_vae_jax.runs.console import print_table, run_main, warn
from planar_vae_jax.runs.devices import Devices, choose_devices, choose_devices_of_seeds
from planar_vae_jax.runs.files import read_json
from planar_vae_jax.runs.flagged_data import choose_images, load_images
from planar_vae_jax.runs.folder import RunFolder, is_finished, open_run
from planar_vae_jax.runs.placement import Placement
from planar_vae_jax.runs.together import Seed, fit_together

TOGETHER = "together.json"  # how the seeds of each length were trained
THREEFRY = "threefry2x32"  # under vmap the other generators draw for all seeds by the key of the first
# Flags whose values words of a title tell, or the data set's name.
IN_WORDS = ("flows", "epochs", "seed", "dataset", "data_dir", "classes", "objective", "binarization", "amortized")
FLAGS = tuple(mnist.Config.__annotations__)  # of a run, without those of every run


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
        "train the seeds of a length at once; auto: where that is measured to be 5 % faster",
        choices=ASKED,
        resumable=True,
        default_before="no",
    )
    drawn_again: ClassVar[bool] = False
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


def main(argv: list[str], *, pictures: bool = True) -> None:
    """Trains what is not trained yet, compares, draws and writes; ``argv`` without the program's name.

    ``pictures``: whether each run draws its own; those of the sweep are drawn anyway.
    """
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
        summaries = train(sweep, runs, config.together, pictures)
        first = next(iter(summaries.values()))
        figures = (*shown_figures(config), "active_units")
        found = by_length(config, runs, summaries)
        rows = statistics.compare(found, figures)
        for row, of_length in zip(rows, found.values(), strict=True):
            row["kl_by_dimension"] = [run["all"]["kl_by_dimension"] for run in of_length]
        numbers = range(config.seed, config.seed + config.seeds)
        sweep.save_text("table.csv", statistics.comma_separated(rows, figures, numbers))
        setting, nats = describe(config, first, is_binary(whole[0])), f"Nats are of {first['nats_of']}."
        table = statistics.markdown(rows, figures)
        sweep.save_text("table.md", f"# {setting}\n\n{nats}\n\n{table}\n{statistics.kl_text(rows)}")
        theirs = report.comparable_to_published(vars(config), whole[0].name, whole[0].x_test.shape)
        sweep.save_figure("flow_length.png", report.against_length(rows, config.objective, setting, theirs))
        if config.each_class:
            ends = (config.lengths[0], config.lengths[-1])
            chosen = [run for run in runs if run.seed == config.seed and run.flows in ends]
            checkpoint = "best" if config.patience else "latest"
            opened = [load_run(sweep.workdir / run.name, checkpoint) for run in chosen]
            models = [
                (str(run.label), run.flows, run.data, one.model, one.binarization)
                for run, one in zip(chosen, opened, strict=True)
            ]
            title = (
                f"Test images and their reconstructions by the model of their class, seed {config.seed}\n({setting})"
            )
            sweep.save_figure("each_class.png", report.each_class(models, title))
        sweep.finish(
            {
                **{name: first[name] for name in ("dataset", "source", "binarization", "nats_of")},
                **told(config, runs[0].config),
                "rows": rows,
                "trained_together": read_json(sweep.workdir / TOGETHER) or {},
                "seconds": sum(summary["seconds"] for summary in summaries.values()),
            }
        )
        print(f"\n{nats}")
        show(rows, figures)


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


def train(sweep: RunFolder, runs: Sequence[Run], asked: str, pictures: bool) -> dict[str, dict[str, Any]]:
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
                summaries[run.name] = mnist.train(
                    run.config, run.data, run.identity, devices=devices, pictures=pictures
                )
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
        training, *_ = mnist.prepare(config, data, placed)
        return training, [mnist.begin(run.config, data) for run in runs]

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


def shown_figures(config: Config) -> tuple[str, ...]:
    """Names of the figures of the runs in tables."""
    return (*report.SHOWN, *(["bits_per_dim"] if config.likelihood == "logistic" else []))


def by_length(
    config: Config, runs: Sequence[Run], summaries: Mapping[str, dict[str, Any]]
) -> dict[int, list[dict[str, Any]]]:
    """K -> the figures of each seed, over all images and by class; models of single classes make one of all."""
    figures = shown_figures(config)
    found: dict[int, list[dict[str, Any]]] = {}
    for flows in config.lengths:
        for seed in range(config.seed, config.seed + config.seeds):
            mine = {run.label: summaries[run.name] for run in runs if (run.flows, run.seed) == (flows, seed)}
            classes = {label: row for summary in mine.values() for label, row in summary["per_class"].items()}
            whole = statistics.pooled(classes, figures) if config.each_class else mine[None]["test"]
            units = statistics.latent_units([summary["active_units"] for summary in mine.values()])
            found.setdefault(flows, []).append({"all": {**whole, **units}, **classes})
    return found


def describe(config: Config, summary: Mapping[str, Any], binary: bool) -> str:
    """What tells this sweep's figures from another's: flags that are not the default as they are, if not in words."""
    given = {name: getattr(config, name) for name in FLAGS if name not in IN_WORDS}
    given = {name: value for name, value in given.items() if value != getattr(Config, name)}
    binarization = summary["binarization"]
    parts = [
        f"{summary['dataset']}{f' classes {shown(as_json(config.classes))}' if config.classes else ''}",
        *(["a model for each class"] if config.each_class else []),
        "grey levels" if binarization == "none" else binarized(binarization, binary),
        "each image its own flow" if config.amortized else "one flow for all images",
        *([f"objective {config.objective}"] if config.objective != "elbo" else []),
        f"{'at most ' * bool(config.patience)}{config.epochs} epoch{'s' * (config.epochs > 1)}",
        f"{config.seeds} seed{'s' * (config.seeds > 1)}",
        *(f"{name}={value}" for name, value in given.items()),
    ]
    return ", ".join(parts)


def told(config: Config, one: mnist.Config) -> dict[str, Any]:
    """For the summary: the flags that say what the sweep is of and how its runs, as ``one``, are trained."""
    own = {name: getattr(config, name) for name in ("lengths", "seeds", "each_class", "seed", "classes", "amortized")}
    left_out = (*own, "flows", "dataset", "data_dir")
    return own | {name: getattr(one, name) for name in FLAGS if name not in left_out}


def show(rows: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> None:
    """Prints the figures over all images."""
    several = len(rows[0][figures[0]]["by_seed"]) > 1
    print(f"\n{'mean ± standard deviation over seeds' if several else statistics.ONE_SEED}")
    spreads = {f"K = {row['flows']}": {name: row[name]["mean"] for name in figures} for row in rows}
    for row in rows:
        spreads[f"K = {row['flows']}"] |= {f"{name}_se": row[name]["std"] for name in figures}
    print_table(spreads, figures)
    if len(rows) > 1:
        print(f"\ndifference to K = {rows[0]['flows']}, paired by seed{', ± half of its 95 % interval' * several}")
        print_table({f"K = {row['flows']}": statistics.halves(row["minus_first"]) for row in rows[1:]}, figures)


if __name__ == "__main__":
    run_main(main)
