"""Uses the model of a run of ``experiments.mnist``, or of another experiment (``--build``):

    python -m experiments.use --workdir=DIR --reconstruct=FILE.npz    images of a file and their reconstructions
    python -m experiments.use --workdir=DIR --samples=64              pictures decoded from the prior
    python -m experiments.use --workdir=DIR --interpolate=0,3         pictures between two test images
    python -m experiments.use --workdir=DIR --latents=FILE.npz        codes of the images of a file
    python -m experiments.use --workdir=DIR --scores=FILE.npz         free energy and NLL of each image of a file
    python -m experiments.use --workdir=DIR --gap=100                 the parts of the gap from free energy to NLL
    python -m experiments.use --workdir=DIR --export=FOLDER           the model as files that need JAX alone

Each writes its files (PNG, NPZ, CSV, JSON) into ``WORKDIR/use/``, or into ``--output``; ``--export`` into its folder.
``FILE.npz`` holds images ``[N, H, W]`` (or ``[N, H, W, 3]``) of the size that the run was trained on, uint8 or floats
in 0..1, as ``x_test`` or as its only array; PNG files are accepted too, as in ``--reconstruct='digits/*.png'``.
``--resize`` scales images of another size, and ``--invert`` is for what is drawn black on white. ``--scores`` binarises
images as the run binarises its test images, so the run's test images get the figures that the run gave them; an image's
quantile is the part of the run's test images that have a lower free energy. An existing file is kept: the next one is
called ``scores-2.csv``. ``--gap=100`` takes some minutes on two cores.
"""

import csv
import importlib
import itertools
import math
import re
import runpy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from planar_vae_jax import PlanarFlow, load_run, plotting
from planar_vae_jax.analysis import evaluation
from planar_vae_jax.analysis.inference_gap import Settings, gap_of_images, summarise
from planar_vae_jax.data import DataError, Dataset, Pictures, load_images, read_images
from planar_vae_jax.export import check_export, export_run
from planar_vae_jax.load import NEARLY_BLACK, Build, Run
from planar_vae_jax.plotting.images import image_grid, image_rows
from planar_vae_jax.report import NO_KL, draw_interpolations
from planar_vae_jax.runs import as_run_error, replacing, write_json
from planar_vae_jax.runs.checkpoints import CheckpointError
from planar_vae_jax.runs.config import UsageError, check_local, flag, parse, read_config
from planar_vae_jax.runs.console import Progress, print_table, run_main, say, warn
from planar_vae_jax.statistics import means_and_errors
from planar_vae_jax.vae.likelihoods import measured

OF_FILES = ("reconstruct", "latents", "scores")
TASKS = (*OF_FILES, "samples", "interpolate", "gap", "export")
PICTURED = 20  # reconstructions on the page; the file has all
COLUMNS = ("free_energy", "gap", "amortisation", "approximation")
CHUNK = 25  # images between two lines of progress


@dataclass(frozen=True)
class Config:
    """Flags of ``experiments.use``."""

    workdir: str = flag(None, "the folder of a run")
    checkpoint: str = flag(
        None,
        "latest, or best (lowest validation loss); default: latest, or best for a run with --patience",
        choices=("latest", "best"),
    )
    build: str | None = flag(
        None, "FILE.py:FUNCTION or MODULE:FUNCTION, build(flags, image_shape) -> model, for another experiment"
    )
    output: str | None = flag(None, "folder for the results; default: WORKDIR/use")
    reconstruct: str | None = flag(None, "FILE.npz, a picture, or a pattern as in 'digits/*.png'")
    samples: int | None = flag(None, "how many pictures to decode from the prior", at_least=1, at_most=100_000)
    interpolate: tuple[int, ...] | None = flag(None, "the numbers of two test images, as in 0,3", at_least=0)
    latents: str | None = flag(None, "FILE.npz, a picture, or a pattern")
    scores: str | None = flag(None, "FILE.npz, a picture, or a pattern")
    resize: bool = flag(False, "scale images of --reconstruct, --latents and --scores to the size of the run's")
    invert: bool = flag(False, "exchange black and white in images of --reconstruct, --latents and --scores")
    gap: int | None = flag(None, "how many test images to optimise q for", at_least=1)
    gap_steps: int = flag(Settings().steps, "steps of Adam for each image's q", at_least=1)
    export: str | None = flag(None, "a folder for the exported functions; it must not hold a README.txt")
    nll_samples: int | None = flag(
        None,
        "importance samples per image; default: those of the run for --scores and --export, 5000 for --gap",
        at_least=1,
        at_most=100_000,
    )
    dataset: str | None = flag(None, "the run's data set for --interpolate, --scores and --gap, if it has moved")
    data_dir: str | None = flag(None, "the folder of that data set, if it has moved")
    seed: int = flag(0, "seed of what --samples and --latents draw", at_least=0, at_most=2**32 - 1)


def main(argv: list[str]) -> None:
    """Runs the task that the flags name; ``argv`` does not contain the program's name."""
    config = parse(Config, argv, __doc__)
    task, folder = the_task(config), output_folder(config)
    try:
        with as_run_error(ImportError):
            plotting.check_figures()
            if task == "export":
                check_export()
            run = load_run(config.workdir, config.checkpoint or "latest", builder(config.build))
            if config.checkpoint is None and run.config.get("patience"):  # as the figures of its summary
                run = load_run(config.workdir, "best", builder(config.build))
    except CheckpointError:
        raise
    except ValueError as error:
        raise UsageError(f"--workdir: {error}") from error
    key = jax.random.key(config.seed)
    if task in OF_FILES:
        pictures = images_of_file(run, task, config)
        if task == "reconstruct":
            reconstruct(run, pictures.pixels, made(folder))
        elif task == "latents":
            write_latents(run, key, pictures.pixels, made(folder))
        else:
            energies = reference_energies(run, config)
            score(run, pictures, energies, config.nll_samples or run.config.get("nll_samples", 128), made(folder))
    elif task == "samples":
        sample(run, key, config.samples or 0, made(folder))
    elif task == "export":
        export(run, folder, config.nll_samples)
    else:
        data = images_of_run(run, config)
        if task == "interpolate":
            interpolate(run, data, two_of(config.interpolate or (), data), made(folder))
        else:
            check_gap(run, config.gap or 0, data)
            settings = Settings(steps=config.gap_steps)
            settings = settings._replace(nll_samples=config.nll_samples or settings.nll_samples)
            find_gap(run, data, config.gap or 0, settings, made(folder))
    say(f"written into {folder}")


# --- The flags


def the_task(config: Config) -> str:
    """Returns the task that the flags name; raises UsageError unless they name exactly one."""
    if not config.workdir:
        raise UsageError(f"--workdir must be the folder of a run; got {config.workdir!r}")
    named = [task for task in TASKS if getattr(config, task) is not None]
    if len(named) != 1:
        wanted = ", ".join(f"--{task}" for task in TASKS)
        came = ", ".join(f"--{task}" for task in named) or "none"
        raise UsageError(f"one of {wanted} must say what to do; got {came}")
    for name in ("resize", "invert"):
        if getattr(config, name) and named[0] not in OF_FILES:
            wanted = ", ".join(f"--{task}" for task in OF_FILES)
            raise UsageError(f"--{name} is for the images of a file, with one of {wanted}; got --{named[0]}")
    return named[0]


def output_folder(config: Config) -> Path:
    """Returns the folder for the results."""
    if config.export is not None:
        if config.output is not None:
            raise UsageError(f"--output is not for --export=FOLDER, which names the folder; got {config.output!r}")
        check_local("export", config.export)
        return Path(config.export).expanduser()
    if config.output is not None:
        check_local("output", config.output)
    return Path(config.output or Path(config.workdir) / "use").expanduser()


def builder(place: str | None) -> Build | None:
    """Returns the function that ``--build`` names; None without ``--build``."""
    if place is None:
        return None
    module, _, name = place.rpartition(":")
    try:
        if module.endswith(".py"):
            return cast(Build, runpy.run_path(module)[name])
        return cast(Build, getattr(importlib.import_module(module), name))
    except (ImportError, OSError, KeyError, AttributeError, ValueError) as error:
        raise UsageError(f"--build must be FILE.py:FUNCTION or MODULE:FUNCTION; got {place!r} ({error!r})") from error


def made(folder: Path) -> Path:
    """Makes the folder and returns it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UsageError(f"--output must be a folder; got {folder}, which is a file") from error
    return folder


def images_of_file(run: Run, task: str, config: Config) -> Pictures:
    """Reads the images that the task's flag names, of the run's size."""
    warnings.filterwarnings("ignore", message=re.escape(NEARLY_BLACK))  # read_images warns of that itself
    place = getattr(config, task)
    try:
        return read_images(place, run.image_shape, warn, resize=config.resize, invert=config.invert)
    except DataError as error:
        raise UsageError(f"--{task}: {error}") from error


def images_of_run(run: Run, config: Config) -> Dataset:
    """Loads the data set that the run was trained on; raises UsageError if other images are found."""
    flags = run.config
    name, data_dir = config.dataset or flags.get("dataset"), config.data_dir or flags.get("data_dir")
    if name is None:
        raise UsageError("--dataset must name the run's data set, as the run has no such flag")
    classes = flags.get("classes")
    notes: list[str] = []  # the run has shown them already, if these are its images
    data, identity = load_images(name, data_dir, tuple(classes) if classes else None, 0, notes.append)
    stored = (read_config(config.workdir) or {}).get("data") or {}
    if stored.get("crc32") not in (None, identity["crc32"]):
        for note in notes:
            warn(note)
        raise UsageError(
            f"--dataset and --data_dir must give the run's own images, {stored.get('source')}; got others from "
            f"{data.source}"
        )
    return data


def two_of(numbers: tuple[int, ...], data: Dataset) -> np.ndarray:
    """Returns the indices of two test images; raises UsageError if there are no such images."""
    size = len(data.x_test)
    if len(numbers) != 2 or max(numbers) >= size:
        came = ",".join(map(str, numbers))
        raise UsageError(f"--interpolate must be two numbers of test images, 0 to {size - 1}; got {came}")
    return np.array(numbers)


def check_gap(run: Run, count: int, data: Dataset) -> None:
    """Checks that the gap can be computed; raises UsageError if not."""
    if count > len(data.x_test):
        raise UsageError(f"--gap must be at most the {len(data.x_test)} test images of {data.name}; got {count}")
    posterior = evaluation.abstract_posterior(run.model, run.image_shape)
    if not isinstance(posterior, PlanarFlow):
        raise UsageError(f"--gap needs a model whose posterior is a PlanarFlow; got {type(posterior).__name__}")
    if run.config.get("objective") == "reconstruction":
        raise UsageError("--gap needs a run that minimised a free energy; got one of --objective=reconstruction")


# --- The tasks


def save_figure(path: Path, figure: Any) -> None:
    """Writes a figure as PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def save_arrays(path: Path, **arrays: Any) -> None:
    """Writes arrays as an npz file, whole or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def save_rows(path: Path, columns: Mapping[str, Any]) -> None:
    """Writes a csv file with a line for each image, whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(np.asarray(values).tolist() for values in columns.values()), strict=True))


def unused(folder: Path, name: str, *endings: str) -> str:
    """Returns the first of ``name``, ``name-2``, ``name-3``, ... that no file with one of the endings has."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(one for one in names if not any((folder / f"{one}{ending}").exists() for ending in endings))


def nats_of(run: Run) -> str:
    """Returns what the nats of a run measure, in words."""
    return measured(run.model.likelihood, run.binarization)


def sample(run: Run, key: jax.Array, count: int, folder: Path) -> None:
    """Writes pixel means decoded from draws of the prior."""
    drawn = np.asarray(run.sample(key, count))
    name = unused(folder, "samples", ".npz", ".png")
    save_arrays(folder / f"{name}.npz", samples=drawn)
    columns = max(1, math.isqrt(min(count, 400)))
    title = f"Pixel means decoded from the prior{NO_KL * (run.config.get('objective') == 'reconstruction')}"
    page = image_grid(drawn[:400], columns=columns, title=title)
    save_figure(folder / f"{name}.png", page)


def reconstruct(run: Run, images: np.ndarray, folder: Path) -> None:
    """Writes reconstructions, and a page that shows them below the images."""
    decoded = np.asarray(run.reconstruct(images))
    name = unused(folder, "reconstructions", ".npz", ".png")
    save_arrays(folder / f"{name}.npz", images=images, reconstructions=decoded)
    rows = {"original": images[:PICTURED] / 255.0, "reconstruction": decoded[:PICTURED]}
    of = f" (the first {PICTURED} of {len(images)})" if len(images) > PICTURED else ""
    save_figure(folder / f"{name}.png", image_rows(rows, title=f"Images and reconstructions{of}"))


def interpolate(run: Run, data: Dataset, chosen: np.ndarray, folder: Path) -> None:
    """Writes the pictures on straight lines between two test images, in z_0 and in z_K."""
    test = evaluation.fixed_images(data.x_test[chosen], data.test_index[chosen], "test", run.binarization)
    title = f"Pixel means on straight lines between test images {chosen[0]} and {chosen[1]} of {data.name}"
    page, lines = draw_interpolations(run.model, test.pixels[:1], test.pixels[1:], title)
    name = unused(folder, "interpolation", ".npz", ".png")
    save_arrays(folder / f"{name}.npz", images=test.pixels, z_0=lines.base[0], z_K=lines.code[0])
    save_figure(folder / f"{name}.png", page)


def write_latents(run: Run, key: jax.Array, images: np.ndarray, folder: Path) -> None:
    """Writes ``means``, the mean of q_0 of each image sent through the layers, and ``codes``, a sample of q(z|x)."""
    name = unused(folder, "latents", ".npz")
    save_arrays(folder / f"{name}.npz", means=run.latents(images), codes=run.latents(images, key))


def reference_energies(run: Run, config: Config) -> np.ndarray | None:
    """Returns the free energies of the run's test images, ascending; None, with a warning, if they are not found."""
    try:
        data = images_of_run(run, config)
    except (DataError, UsageError) as error:
        if config.dataset or config.data_dir:
            raise
        warn(f"no quantiles, as the run's own test images are not to be had: {error}")
        return None
    return np.sort(run.free_energy(data.x_test, evaluation.split_key("test")))


def score(run: Run, pictures: Pictures, energies: np.ndarray | None, samples: int, folder: Path) -> None:
    """Writes free energy and NLL of each image, with the random numbers of the test image at the same index.

    Args:
        energies: the free energies of the run's test images, ascending, among which an image has its quantile.
    """
    found = run.scores(pictures.pixels, samples)
    figures: dict[str, Any] = {name: np.asarray(values) for name, values in found._asdict().items()}
    if energies is not None:
        figures["quantile"] = np.searchsorted(energies, figures["free_energy"]) / len(energies)
    name = unused(folder, "scores", ".csv", ".json")
    index = np.arange(len(pictures.files))
    save_rows(folder / f"{name}.csv", {"index": index, "file": pictures.files, **figures})
    summary = {"images": len(index), **means_and_errors(figures)}
    files = list(dict.fromkeys(pictures.files))
    setting = {"nll_samples": samples, "binarization": run.binarization}
    among = None if energies is None else len(energies)
    write_json(folder / f"{name}.json", {"files": files, **summary, "test_images": among, **setting})
    say(f"nats are of {nats_of(run)}")
    print_table({"all": summary}, ("images", *figures))


def export(run: Run, folder: Path, samples: int | None) -> None:
    """Writes encoder, decoder, free energy and NLL as functions that need JAX alone."""
    try:
        paths = export_run(run, folder, samples)
    except ValueError as error:
        raise UsageError(f"--export: {error}") from error
    for path in paths.values():
        say(f"{path.name}: {path.stat().st_size / 1e6:.3g} MB")


def find_gap(run: Run, data: Dataset, count: int, settings: Settings, folder: Path) -> None:
    """Writes the parts of the gap between free energy and -log p(x), over test images spread evenly."""
    rows = np.linspace(0, len(data.x_test) - 1, count).astype(int)
    test = evaluation.fixed_images(data.x_test[rows], data.test_index[rows], "test", run.binarization)
    parts = []
    with Progress(count, "image") as progress:
        for start in range(0, count, CHUNK):
            batch = jax.tree.map(lambda leaf, start=start: leaf[start : start + CHUNK], test)
            found = gap_of_images(run.model, batch, settings)
            parts.append(jax.tree.map(np.asarray, found))
            progress.update(start + len(parts[-1].nll), {"gap": float(np.mean(parts[-1].encoder - parts[-1].nll))})
    each = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    summary = summarise(each)
    labels = {} if data.y_test is None else {"label": data.y_test[rows]}
    figures = {"amortisation": each.amortisation, "approximation": each.approximation}
    name = unused(folder, "gap", ".csv", ".json")
    save_rows(folder / f"{name}.csv", {"index": data.test_index[rows], **labels, **each._asdict(), **figures})
    setting = {"dataset": data.name, "binarization": run.binarization, "flows": run.config.get("flows")}
    write_json(folder / f"{name}.json", {**setting, **summary, "settings": settings._asdict()})
    layers = f"{run.config['flows']} layers each" if run.config.get("flows") else "own family"
    table = {"encoder": summary["encoder"], layers: summary["own_family"], "factorised": summary["factorised"]}
    nats = f"nats of {nats_of(run)}, {count} test images of {data.name}"
    say(f"{nats}; the approximation gap is to -log p(x):")
    print_table({**table, "-log p(x)": {"free_energy": summary["nll"], "free_energy_se": summary["nll_se"]}}, COLUMNS)


if __name__ == "__main__":
    run_main(main)
