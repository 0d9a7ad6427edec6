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
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments import mnist
from experiments.length_pages import describe, draw_lengths, draw_page, kl_text, show, told
from experiments.length_runs import THREEFRY, Config, Run, check_flags, plan
from planar_vae_jax import comparison
from planar_vae_jax.data import is_binary
from planar_vae_jax.flagged_data import load_images
from planar_vae_jax.placement import Placement
from planar_vae_jax.runs.choice import Choices, Timing, time_seeds
from planar_vae_jax.runs.config import parse_run
from planar_vae_jax.runs.console import run_main, warn
from planar_vae_jax.runs.devices import Devices, choose_devices, choose_devices_of_seeds
from planar_vae_jax.runs.files import read_json
from planar_vae_jax.runs.folder import RunFolder, is_finished, open_run
from planar_vae_jax.runs.together import Seed, fit_together

TOGETHER = "together.json"  # how the seeds of each length were trained


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
        first = next(iter(summaries.values()))
        figures = (*mnist.shown(config.likelihood), "active_units")
        found = by_length(config, runs, summaries)
        rows = comparison.compare(found, figures)
        for row, of_length in zip(rows, found.values(), strict=True):
            row["kl_by_dimension"] = [run["all"]["kl_by_dimension"] for run in of_length]
        numbers = range(config.seed, config.seed + config.seeds)
        sweep.save_text("table.csv", comparison.comma_separated(rows, figures, numbers))
        setting, nats = describe(config, first, is_binary(whole[0])), f"Nats are of {first['nats_of']}."
        table = comparison.markdown(rows, figures)
        sweep.save_text("table.md", f"# {setting}\n\n{nats}\n\n{table}\n{kl_text(rows)}")
        draw_lengths(sweep, config, rows, setting, whole[0])
        if config.each_class:
            draw_page(sweep, config, runs, setting)
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
    figures = mnist.shown(config.likelihood)
    found: dict[int, list[dict[str, Any]]] = {}
    for flows in config.lengths:
        for seed in range(config.seed, config.seed + config.seeds):
            mine = {run.label: summaries[run.name] for run in runs if (run.flows, run.seed) == (flows, seed)}
            classes = {label: row for summary in mine.values() for label, row in summary["per_class"].items()}
            whole = comparison.pooled(classes, figures) if config.each_class else mine[None]["test"]
            units = comparison.latent_units([summary["active_units"] for summary in mine.values()])
            found.setdefault(flows, []).append({"all": {**whole, **units}, **classes})
    return found


if __name__ == "__main__":
    run_main(main)
