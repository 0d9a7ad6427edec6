"""What a sweep of flow lengths writes, draws and prints."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import mnist_flags
from experiments.length_runs import Config, Run
from planar_vae_jax import comparison, evaluation, plotting, published
from planar_vae_jax.data import Dataset
from planar_vae_jax.load import load_run
from planar_vae_jax.pages import binarized
from planar_vae_jax.runs.config import as_json, shown
from planar_vae_jax.runs.console import print_table
from planar_vae_jax.runs.folder import RunFolder

PANELS = {
    "free_energy": "free energy (nats per image)",
    "nll": "NLL (nats per image)",
    "squared_error": "squared error per image",
}
EXAMPLES = 10  # of each class, on the page of reconstructions
# Flags whose values words of a title tell, or the data set's name.
IN_WORDS = ("flows", "epochs", "seed", "dataset", "data_dir", "classes", "objective", "binarization", "amortized")
# What the published runs were; how they were optimised may differ.
PUBLISHED: dict[str, Any] = {
    "objective": "elbo",
    "likelihood": "bernoulli",
    "posterior": "diagonal",
    "amortized": True,
    "h": "tanh",
    "encoder": "mlp",
    "layers": 2,
    "hidden": 400,
    "latent": 40,
    "classes": None,
    "each_class": False,
}


FLAGS = tuple(mnist_flags.Config.__annotations__)  # of a run, without those of every run


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


def is_published_setting(config: Config, data: Dataset) -> bool:
    """Whether figures may stand beside the published ones: the same images, model and objective."""
    same = all(getattr(config, name) == value for name, value in PUBLISHED.items())
    return same and data.name == "binarized_mnist" and data.x_test.shape == (10_000, 28, 28)


def draw_lengths(
    sweep: RunFolder, config: Config, rows: Sequence[Mapping[str, Any]], setting: str, data: Dataset
) -> None:
    """Free energy and NLL (or the squared error, where that is what was trained) against K."""
    names = ("squared_error",) if config.objective == "reconstruction" else ("free_energy", "nll")
    panels = {PANELS[name]: [row[name] for row in rows] for name in names}
    theirs = {PANELS[name]: by_k for name, by_k in published.AMORTIZED_PLANAR.items()}
    beside = {published.REPRODUCTION: theirs} if is_published_setting(config, data) else None
    figure = plotting.against_length(config.lengths, panels, title=f"What K buys\n({setting})", published=beside)
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


def kl_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: what each latent dimension carries, for each length; empty for runs of older versions."""
    known = [row for row in rows if None not in row["kl_by_dimension"]]
    head = """KL of q(z_K|x) to the prior by latent dimension, largest first, as if normal and independent
(nats; mean over images and seeds; those below 0.01 are counted).

| K | KL by dimension |
|---|---|
"""
    return head * bool(known) + "".join(f"| {row['flows']} | {_spectrum(row['kl_by_dimension'])} |\n" for row in known)


def _spectrum(by_seed: Sequence[Sequence[float]]) -> str:
    kl = np.mean(by_seed, axis=0)
    carried = " ".join(f"{value:.2f}" for value in kl if value >= 0.01)
    rest = int(np.sum(kl < 0.01))
    return f"{carried}{f' and {rest} below' * (rest > 0)}".strip()


def show(rows: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> None:
    """Prints the figures over all images."""
    several = len(rows[0][figures[0]]["by_seed"]) > 1
    print(f"\n{'mean ± standard deviation over seeds' if several else comparison.ONE_SEED}")
    spreads = {f"K = {row['flows']}": {name: row[name]["mean"] for name in figures} for row in rows}
    for row in rows:
        spreads[f"K = {row['flows']}"] |= {f"{name}_se": row[name]["std"] for name in figures}
    print_table(spreads, figures)
    if len(rows) > 1:
        print(f"\ndifference to K = {rows[0]['flows']}, paired by seed{', ± half of its 95 % interval' * several}")
        print_table({f"K = {row['flows']}": comparison.halves(row["minus_first"]) for row in rows[1:]}, figures)


def told(config: Config, one: mnist_flags.Config) -> dict[str, Any]:
    """For the summary: the flags that say what the sweep is of and how its runs, as ``one``, are trained."""
    own = {name: getattr(config, name) for name in ("lengths", "seeds", "each_class", "seed", "classes", "amortized")}
    left_out = (*own, "flows", "dataset", "data_dir")
    return own | {name: getattr(one, name) for name in FLAGS if name not in left_out}
