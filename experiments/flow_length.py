"""What K planar layers buy: models of several lengths, each trained with several seeds, with error bars.

    python -m experiments.flow_length --lengths=0,5 --seeds=4

runs ``experiments.mnist`` (whose flags it takes) for each length and seed in ``WORKDIR/flows=K-seed=S/``, and writes
table.md, table.csv, summary.json and flow_length.png: mean and standard deviation over seeds, and the difference to the
first length, paired by seed, with its 95 % interval. Four seeds of two lengths take about 15 minutes on two CPU cores.
``--together=yes`` trains the seeds of a length as one program, which suits accelerators. ``--each_class`` trains on
each class alone ("each category" of Xu et al. 2023) and draws a page of reconstructions.

The same command resumes a sweep that was stopped; with more lengths or seeds it adds runs to those that are finished.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar
from urllib.parse import quote

import numpy as np

from experiments import mnist
from planar_vae_jax import load_run, report, statistics
from planar_vae_jax.data import Dataset, choose_images, is_binary, load_images
from planar_vae_jax.runs.config import UsageError, as_json, flag, parse_run, shown
from planar_vae_jax.runs.console import print_table, run_main, say, warn
from planar_vae_jax.runs.folder import RunFolder, open_run
from planar_vae_jax.runs.page import Link
from planar_vae_jax.runs.sweep import Together, check_one_process, check_together, combinations, folder_name, sweep

THREEFRY = "threefry2x32"  # under vmap the other generators use the first seed's key for all seeds
# Flags that a title expresses in words, or that the name of the data set implies.
IN_WORDS = ("flows", "epochs", "seed", "dataset", "data_dir", "classes", "objective", "binarization", "amortized")
FLAGS = tuple(mnist.Config.__annotations__)  # flags of experiments.mnist, without those that every run has

Images = tuple[Dataset, dict[str, Any]]  # a data set, and what identifies it
Summary = Mapping[str, Any]
Result = tuple[dict[str, Any], Summary]  # the values of the flags that vary, and the summary of that run


@dataclass(frozen=True)
class Config(mnist.Config):
    """Flags of ``experiments.flow_length``: those of the sweep, and those of ``experiments.mnist`` for each run."""

    usage = """\
from pathlib import Path

from planar_vae_jax import load_run

run = load_run(Path("WORKDIR") / "RUN")  # RUN: the folder of one of the runs"""
    lengths: tuple[int, ...] = flag(
        (0, 5, 10, 20),
        "K of each model, as in 0,5; the others are compared with the first",
        at_least=0,
        at_most=10_000,
        resumable=True,
    )
    seeds: int = flag(
        4, "number of seeds per length: --seed, --seed + 1, ...", at_least=1, at_most=10_000, resumable=True
    )
    each_class: bool = flag(False, "train a model on each class alone (those of --classes, if given)")
    together: str = flag("no", "yes: train the seeds of a length as one program", choices=("yes", "no"), resumable=True)
    drawn_again: ClassVar[bool] = False
    flows: int = flag(None, "a flag of experiments.mnist; here --lengths takes its place")


def main(argv: list[str], *, pictures: bool = True) -> None:
    """Trains the models that are not trained yet, compares all of them, and writes the comparison.

    Args:
        argv: the flags, without the program's name.
        pictures: whether each run draws its figures; those of the sweep are always drawn.
    """
    config = parse_run(Config, argv, __doc__, "flow_length")
    check_flags(config)
    notes: list[str] = []
    validation = 0 if config.each_class else config.validation
    whole = load_images(config.dataset, config.data_dir, config.classes, validation, notes.append)
    images = by_class(config, whole[0]) if config.each_class else {config.classes: whole}

    for classes, (data, _) in images.items():
        check_data(config, classes, data)

    with open_run(config, "flow_length", whole[1]) as folder:
        if folder.finished:
            return
        for note in notes if folder.new else ():
            warn(note)
        results = train(config, folder, images, pictures)

        first = results[0][1]
        figures = (*report.figure_names(first["test"]), "active_units")
        found = by_length(config, results, figures)
        rows = statistics.compare(found, figures)
        for row, of_length in zip(rows, found.values(), strict=True):
            row["kl_by_dimension"] = [one["all"]["kl_by_dimension"] for one in of_length]
        numbers = range(config.seed, config.seed + config.seeds)
        folder.save_text("table.csv", statistics.comma_separated(rows, figures, numbers))
        title, nats = describe(config, first, is_binary(whole[0])), f"Nats are of {first['nats_of']}."
        tables = [*statistics.tables(rows, figures), statistics.kl_table(rows)]
        over_all = min(len(rows), 2)  # the number of tables over all classes: means, and differences if there are any
        folder.save_text("table.md", f"# {title}\n\n{nats}\n\n{statistics.markdown(tables)}")
        published = report.comparable_to_published(vars(config), whole[0].name, whole[0].x_test.shape)
        folder.save_figure("flow_length.png", report.compared_lengths(rows, config.objective, title, published))
        if config.each_class:
            draw_each_class(config, folder, images, title)
        facts = {name: first[name] for name in ("dataset", "source", "binarization", "nats_of")}
        seconds = sum(summary["seconds"] for _, summary in results)
        folder.finish(
            {
                **facts,
                **settings(config, mnist.with_defaults(of_a_run(config), whole[0])),
                "rows": rows,
                "seconds": seconds,
            },
            {"rows": [*tables[:over_all], table_of_runs(results, figures), *tables[over_all:]]},
        )
        say(f"\n{nats}")
        show(rows, figures)


def check_flags(config: Config) -> None:
    """Checks the flags of the sweep; raises UsageError."""
    if config.flows is not None:
        raise UsageError(f"--flows is given by --lengths here; got --flows={config.flows}")
    if config.eval_only:
        single = "python -m experiments.mnist --workdir=WORKDIR/flows=K-seed=S --eval_only"
        raise UsageError(f"--eval_only is of a single run: {single}")
    check_one_process(config)
    if config.together == "yes" and config.prng != THREEFRY:
        raise UsageError(f"--together=yes needs --prng={THREEFRY}; got --prng={config.prng}")
    if not config.lengths or len(set(config.lengths)) < len(config.lengths):
        given = ",".join(map(str, config.lengths))
        raise UsageError(f"--lengths must be at least one number, and none twice; got {given!r}")


def by_class(config: Config, data: Dataset) -> dict[tuple[int, ...] | None, Images]:
    """Returns the images of each model by its value of ``--classes``; raises UsageError without labels."""
    if data.y_train is None or data.y_test is None:
        raise UsageError(f"--each_class needs labels of training and test images; {data.name} has none")
    labels = [int(label) for label in np.unique(data.y_test)]
    return {(label,): choose_images(data, (label,), config.validation) for label in labels}


def of_a_run(config: Config, workdir: str | None = None) -> mnist.Config:
    """Returns the flags of ``experiments.mnist`` for the first length."""
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(mnist.Config)}
    return mnist.Config(**given | {"flows": config.lengths[0], "workdir": workdir})


def varied(config: Config, classes: tuple[int, ...] | None) -> dict[str, Sequence[Any]]:
    """Returns the flags in which the runs differ, with their values."""
    over: dict[str, Sequence[Any]] = {"flows": config.lengths, "seed": range(config.seed, config.seed + config.seeds)}
    return {"classes": (classes,), **over} if config.each_class else over


def completed(one: mnist.Config, data: Dataset) -> mnist.Config:
    """Returns the checked flags of a run, with the defaults that depend on the data."""
    one = replace(one, amortized=one.amortized and one.flows > 0)  # K = 0 belongs to an amortised sweep too
    mnist.check_flags(one)
    return mnist.with_defaults(one, data)


def check_data(config: Config, classes: tuple[int, ...] | None, data: Dataset) -> None:
    """Checks the flags of every run against the images; raises UsageError before anything is written."""
    combinations(of_a_run(config, "."), varied(config, classes), lambda one: completed(one, data))
    if config.together == "yes":
        check_together(data.x_valid is not None, mnist.on_host(config, data))


def train(
    config: Config, folder: RunFolder, images: Mapping[tuple[int, ...] | None, Images], pictures: bool
) -> list[Result]:
    """Trains a model for every class, length and seed, and returns their summaries."""
    base = of_a_run(config, str(folder.workdir))
    devices = mnist.run_devices(base)
    for classes, (data, identity) in images.items():  # a folder that holds another run is refused before any run begins
        for _, one in combinations(base, varied(config, classes), functools.partial(completed, data=data)):
            RunFolder(one, "mnist", identity, devices)
    folder.go_on(0.0, None)
    results: list[Result] = []
    for classes, (data, identity) in images.items():
        complete = functools.partial(completed, data=data)

        def run(one: mnist.Config, of: Images = (data, identity)) -> Summary:
            return mnist.train(one, *of, pictures=pictures)

        def start(one: mnist.Config, data: Dataset = data) -> dict[str, Any]:
            return mnist.start(one, data, mnist.place(one, data), devices)

        together = None
        if config.together == "yes" and config.seeds > 1:
            together = Together("mnist", identity, devices, start)
        results += sweep(base, varied(config, classes), run, complete=complete, together=together)
    return results


def by_length(config: Config, results: Sequence[Result], figures: Sequence[str]) -> dict[int, list[dict[str, Any]]]:
    """Returns, by K, the figures of each seed over all images and by class; models of single classes are pooled."""
    found: dict[int, list[dict[str, Any]]] = {}
    for flows in config.lengths:
        for seed in range(config.seed, config.seed + config.seeds):
            mine = [summary for values, summary in results if (values["flows"], values["seed"]) == (flows, seed)]
            classes = {label: row for summary in mine for label, row in summary["per_class"].items()}
            names = [name for name in figures if name != "active_units"]
            whole = statistics.pooled(classes, names) if config.each_class else mine[0]["test"]
            units = statistics.latent_units([summary["active_units"] for summary in mine])
            found.setdefault(flows, []).append({"all": {**whole, **units}, **classes})
    return found


def table_of_runs(results: Sequence[Result], figures: Sequence[str]) -> statistics.Table:
    """Returns the figures of each run, with a link to its page."""
    names = [name for name in figures if name != "active_units"]
    rows = []
    for values, summary in results:
        folder = folder_name(values)
        test = (statistics.with_error(summary["test"][name], summary["test"].get(f"{name}_se")) for name in names)
        rows.append([Link(folder, f"{quote(folder)}/report.html"), *test])
    return statistics.Table(
        "Each run, ± standard error.", [["run", *(name.replace("_", " ") for name in names)], *rows]
    )


def draw_each_class(
    config: Config, folder: RunFolder, images: Mapping[tuple[int, ...] | None, Images], title: str
) -> None:
    """Draws test images and their reconstructions by the models of the first and the last length."""
    models = []
    for classes, (data, _) in images.items():
        for flows in (config.lengths[0], config.lengths[-1]):
            name = f"classes={shown(as_json(classes))}-flows={flows}-seed={config.seed}"
            run = load_run(folder.workdir / name, "best" if config.patience else "latest")
            models.append((shown(as_json(classes)), flows, data, run.model, run.binarization))
    heading = f"Test images and their reconstructions by the model of their class, seed {config.seed}\n({title})"
    folder.save_figure("each_class.png", report.each_class(models, heading))


def describe(config: Config, summary: Mapping[str, Any], binary: bool) -> str:
    """Returns one line for titles: the settings in which this sweep may differ from another."""
    given = {name: getattr(config, name) for name in FLAGS if name not in IN_WORDS}
    given = {name: value for name, value in given.items() if value != getattr(Config, name)}
    binarization = summary["binarization"]
    parts = [
        f"{summary['dataset']}{f' classes {shown(as_json(config.classes))}' if config.classes else ''}",
        *(["a model for each class"] if config.each_class else []),
        "grey levels" if binarization == "none" else report.binarized(binarization, binary),
        "each image its own flow" if config.amortized else "one flow for all images",
        *([f"objective {config.objective}"] if config.objective != "elbo" else []),
        f"{'at most ' * bool(config.patience)}{config.epochs} epoch{'s' * (config.epochs > 1)}",
        f"{config.seeds} seed{'s' * (config.seeds > 1)}",
        *(f"{name}={value}" for name, value in given.items()),
    ]
    return ", ".join(parts)


def settings(config: Config, one: mnist.Config) -> dict[str, Any]:
    """Returns for the summary the flags of the sweep, and those of a run with its defaults filled in."""
    own = {name: getattr(config, name) for name in ("lengths", "seeds", "each_class", "seed", "classes", "amortized")}
    left_out = (*own, "flows", "dataset", "data_dir")
    return own | {name: getattr(one, name) for name in FLAGS if name not in left_out}


def show(rows: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> None:
    """Prints the figures over all images."""
    several = len(rows[0][figures[0]]["by_seed"]) > 1
    say(f"\n{'mean ± standard deviation over seeds' if several else statistics.ONE_SEED}")
    spreads = {f"K = {row['flows']}": {name: row[name]["mean"] for name in figures} for row in rows}
    for row in rows:
        spreads[f"K = {row['flows']}"] |= {f"{name}_se": row[name]["std"] for name in figures}
    print_table(spreads, figures)
    if len(rows) > 1:
        say(f"\ndifference to K = {rows[0]['flows']}, paired by seed{', ± half of its 95 % interval' * several}")
        print_table({f"K = {row['flows']}": statistics.halves(row["minus_first"]) for row in rows[1:]}, figures)


if __name__ == "__main__":
    run_main(main)
