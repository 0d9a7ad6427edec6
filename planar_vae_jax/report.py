"""What a run of a VAE reports at its end: the figures of ``summary.json``, the printed table and the pictures.

::

    results = report.collect_results(model, figures, test, labels, nll_samples=128)    # figures of all test images
    report.draw_run(save, model, data, test, results, lines, split="test", title=title, objective="elbo")
    run.finish(report.summary(results, lines, data, {...}))
    report.print_results(results)

A new figure of ``summary.json`` and of every table is an entry of :func:`collect_results`; a new picture is a call in
:func:`draw_run`. Below are the pictures that compare the models of a sweep.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from planar_vae_jax.analysis import evaluation, latent
from planar_vae_jax.analysis.evaluation import Figures, Images
from planar_vae_jax.analysis.true_posterior import posterior_grid
from planar_vae_jax.data import Dataset, examples
from planar_vae_jax.data.streamed import Streamed
from planar_vae_jax.flows.distribution import PlanarFlow
from planar_vae_jax.plotting.curves import class_losses, loss_curves
from planar_vae_jax.plotting.images import image_grid, image_rows
from planar_vae_jax.plotting.latent import aggregate_histograms, aggregate_plane
from planar_vae_jax.plotting.lengths import against_length
from planar_vae_jax.plotting.posteriors import posterior_rows
from planar_vae_jax.runs.console import print_table
from planar_vae_jax.statistics import with_error
from planar_vae_jax.vae.objectives import Model

NO_KL = "\nno KL term was trained, so the prior is not where the codes are"
SaveFigure = Callable[[str, Figure], object]  # (file name, figure), as ``RunFolder.save_figure``

_ROWS = 4  # images, or pairs of images, on a page of the latent space
_COORDINATES = 8  # coordinates of the code on a page
_PRIOR_PICTURES = 100


# --- Figures


class Results(NamedTuple):
    """Figures of a model on its test images."""

    figures: Figures  # the figures of each image
    overall: dict[str, float | None]  # mean and standard error of each figure over all images
    by_class: dict[str, dict[str, Any]]  # by label: the same, and the number of "images"; empty without labels
    course: dict[str, dict[str, Any]]  # NLL by the number of importance samples
    units: dict[str, Any]  # what each latent dimension carries (``latent.active_units``)

    @property
    def shown(self) -> tuple[str, ...]:
        """Names of the figures, in the order of tables."""
        return figure_names(self.overall)


def figure_names(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the figures in a row of ``summary.json``, without their standard errors."""
    return tuple(name for name in row if not name.endswith("_se"))


def collect_results(
    model: Model,
    figures: Figures,
    test: Images | Streamed,
    labels: np.ndarray | None,
    *,
    nll_samples: int,
    bits_of: int | None = None,
) -> Results:
    """Returns means, errors and active units of a model on its test images.

    Args:
        model: a VAE.
        figures: the figures of each image, as :func:`planar_vae_jax.analysis.evaluation.evaluate` returns them.
        test: the test images.
        labels: the class of each image, ``[N]``, or None.
        nll_samples: the number of importance samples in ``figures``.
        bits_of: pixels times channels of an image, to give the NLL in bits per dimension too; None if the nats are not
            those of uint8 images.
    """
    overall, by_class = evaluation.means(figures), evaluation.means_by_class(figures, labels)
    if bits_of is not None:
        overall = evaluation.with_bits_per_dim(overall, bits_of)
        by_class = {label: evaluation.with_bits_per_dim(row, bits_of) for label, row in by_class.items()}
    units = latent.active_units(latent.latent_units(model, test))
    return Results(figures, overall, by_class, evaluation.nll_by_samples(figures, nll_samples), units)


def summary(
    results: Results, lines: Sequence[Mapping[str, Any]], data: Dataset, flags: Mapping[str, Any], *, seconds: float
) -> dict[str, Any]:
    """Returns the content of ``summary.json``.

    Args:
        results: the results on the test images.
        lines: the lines of ``metrics.jsonl``, one per epoch.
        data: the data that the run was trained on.
        flags: the flags that identify the run, such as ``"flows"`` and ``"binarization"``.
        seconds: time that the run has taken.
    """
    return {
        "dataset": data.name,
        "source": data.source,
        "epochs": len(lines),
        **flags,
        "train_images": len(data.x_train),
        "validation_images": 0 if data.x_valid is None else len(data.x_valid),
        "test_images": len(data.x_test),
        "train": {
            "first_loss": lines[0].get("first_train_loss"),
            "final_loss": lines[-1].get("train_loss"),
            "final_loss_se": lines[-1].get("train_loss_se"),
        },
        "test": results.overall,
        **results.course,
        "per_class": results.by_class,
        "active_units": results.units,
        "seconds_per_epoch": float(np.median([line["seconds"] for line in lines if line])),
        "seconds": seconds,
    }


def print_results(results: Results) -> None:
    """Prints the table of figures over all images and by class, then the NLL by samples and the active units."""
    images = len(results.figures.free_energy)
    print_table({"all": {"images": images, **results.overall}, **results.by_class}, results.shown)
    nll, error = results.course["nll_by_samples"], results.course["nll_by_samples_se"]
    print(f"nll by {', '.join(nll)} samples: {', '.join(with_error(nll[s], error[s]) for s in nll)}")
    units = results.units
    print(f"active units: {units['count']} of {units['of']} (the mean of z_K varies by more than {units['threshold']})")


# --- Titles and notes


def describe(
    name: str,
    *,
    binarization: str,
    channels: int,
    flows: int,
    epochs: int,
    likelihood: str = "bernoulli",
    encoder: str = "mlp",
    layers: int = 1,
    posterior: str = "diagonal",
    amortized: bool = False,
    h: str = "tanh",
    objective: str = "elbo",
    classes: Sequence[int] | None = None,
    binary: bool = False,
) -> str:
    """Returns one line for titles: the data set, and the settings in which this run may differ from another.

    Args:
        name: the name of the data set.
        channels: the number of channels of an image, 1 for grey levels.
        binary: whether the images were binary before ``binarization``.
        binarization, flows, epochs, likelihood, encoder, layers, posterior, amortized, h, objective, classes: the
            values of these flags of ``experiments.mnist``.
    """
    parts = [
        f"{name} classes {','.join(map(str, classes))}" if classes else name,
        _pixels(binarization, channels, likelihood, objective, binary),
        *(["gated convolutions"] if encoder == "conv" else ["two hidden layers"] if layers == 2 else []),
        *({"diagonal": [], "full": ["full covariance"]}.get(posterior, [f"{posterior} posterior"])),
        f"K = {flows}{' amortised' if amortized else ''}{f' {h}' if h != 'tanh' else ''}",
        *({"reconstruction": ["squared error, no KL"], "iwae": ["importance-weighted"]}.get(objective, [])),
        f"{epochs} epoch{'' if epochs == 1 else 's'}",
    ]
    return ", ".join(parts)


def binarized(binarization: str, binary: bool) -> str:
    """Says in titles how images become binary; ``binary``: they are binary already, and a draw changes nothing."""
    return "binary images" if binary else f"{binarization} binarisation"


def binarization_note(binarization: str, binary: bool) -> str | None:
    """Returns a line for the start of a run that says how grey images are binarised; None if they are not."""
    if binary or binarization == "none":
        return None
    ways = {
        "dynamic": "grey pixels are drawn as 0 or 1 at every visit",
        "static": "grey pixels are drawn as 0 or 1, once",
        "threshold": "grey levels of at least 128 are 1, the others 0",
    }
    return f"{ways[binarization]} (--binarization={binarization})"


def _pixels(binarization: str, channels: int, likelihood: str, objective: str, binary: bool) -> str:
    if binarization != "none":
        return binarized(binarization, binary)
    levels = "grey levels" if channels == 1 else "colours"
    cross_entropy = " (cross-entropy, no likelihood)" if objective != "reconstruction" else ""
    likelihoods = {"bernoulli": cross_entropy, "logistic": " by a discretised logistic", "gaussian": " by a density"}
    return levels + likelihoods.get(likelihood, f" by {likelihood}")


# --- Pictures of a run


def draw_run(
    save: SaveFigure,
    model: Model,
    data: Dataset,
    test: Images | Streamed,
    results: Results,
    lines: Sequence[Mapping[str, Any]],
    *,
    split: str,
    title: str,
    objective: str,
) -> None:
    """Draws every picture of a run and gives each to ``save`` with the name of its file.

    Args:
        save: called with the name and the figure, such as ``RunFolder.save_figure``.
        model: a VAE.
        data: the data set; its test images are shown.
        test: the test images as they are evaluated.
        results: the results on the test images.
        lines: the lines of ``metrics.jsonl``, one per epoch.
        split: the split whose loss was computed after each epoch, ``"test"`` or ``"validation"``.
        title: the settings of the run, which every title shows (:func:`describe`).
        objective: one of ``OBJECTIVES``.
    """
    draw_images(save, model, data, test, title, objective)
    draw_latent_space(save, model, data, test, np.asarray(results.units["kl"]), title, objective)
    draw_losses(save, results, data.y_test, lines, split, title, objective)


def draw_images(
    save: SaveFigure, model: Model, data: Dataset, test: Images | Streamed, title: str, objective: str
) -> None:
    """Draws reconstructions of test images, and samples from the prior (figures 3 and 4 of Xu et al. 2023)."""
    chosen, captions = examples(data)
    rows = {
        "original": data.x_test[chosen] / 255.0,
        "reconstruction": np.asarray(evaluation.reconstruct(model, test.take(chosen).pixels)),
    }
    heading = f"Test images and their reconstructions\n({title})"
    save("reconstructions.png", image_rows(rows, title=heading, columns=captions))
    shape = data.x_test.shape[1:]
    samples = evaluation.sample_prior(model, shape, evaluation.fixed_key(), _PRIOR_PICTURES)
    heading = f"Pixel means decoded from the prior\n({title})"
    if objective == "reconstruction":
        heading += NO_KL
    save("samples.png", image_grid(np.asarray(samples), columns=10, title=heading))


def draw_losses(
    save: SaveFigure,
    results: Results,
    labels: np.ndarray | None,
    lines: Sequence[Mapping[str, Any]],
    split: str,
    title: str,
    objective: str,
) -> None:
    """Draws the loss with and without the first step, and the test loss by class (figures 5 and 6 of the paper)."""
    label = "squared error per image" if objective == "reconstruction" else "free energy (nats per image)"
    trained = "importance bound (nats per image)" if objective == "iwae" else label
    curves = {
        f"{name} {when}": np.array(
            [lines[0].get(f"first_{name}_loss"), *(line.get(f"{name}_loss") for line in lines)], np.float64
        )
        for name, when in (
            ("train", "(first step, then mean over each epoch)"),
            (split, "(before, then after each epoch)"),
        )
    }
    figure = loss_curves(np.arange(len(lines) + 1), curves, title=f"Loss ({title})", ylabel=trained)
    save("loss.png", figure)
    if labels is not None:
        name = "squared_error" if objective == "reconstruction" else "free_energy"
        rows = results.by_class
        figure = class_losses(
            {key: row[name] for key, row in rows.items()},
            title=f"Test loss by class\n({title})",
            label=label,
            errors={key: np.nan if row[f"{name}_se"] is None else row[f"{name}_se"] for key, row in rows.items()},
        )
        save("classes.png", figure)


# --- Pictures of the latent space


def draw_latent_space(
    save: SaveFigure,
    model: Model,
    data: Dataset,
    test: Images | Streamed,
    kl: np.ndarray,
    title: str,
    objective: str,
) -> None:
    """Draws the pages on the latent space that fit the model.

    ``posteriors.png`` needs two latent dimensions, a planar flow, and a KL term in the objective, without which q
    approximates no posterior.

    Args:
        save: called with the name and the figure, such as ``RunFolder.save_figure``.
        model: a VAE.
        data: the data set; its test images are shown.
        test: the test images as they are evaluated.
        kl: ``[L]``, the KL of each latent dimension over all test images, in nats (``latent.latent_units``).
        title: the settings of the run.
        objective: one of ``OBJECTIVES``.
    """
    chosen, names = examples(data)
    rows = np.unique(np.linspace(0, len(chosen) - 1, _ROWS).round().astype(int))
    posterior = evaluation.abstract_posterior(model, data.x_test.shape[1:])
    if len(kl) == 2 and isinstance(posterior, PlanarFlow) and objective != "reconstruction":
        named = [names[row] for row in rows] if names else []
        save("posteriors.png", _posteriors(model, test.take(chosen[rows]).pixels, named, title))
    if len(chosen) > 1:
        save("interpolations.png", _interpolations(model, posterior, test, chosen, title))
    largest = np.argsort(-kl, kind="stable")
    image = test.take(chosen[:1]).pixels[0]
    save("traversals.png", _traversals(model, posterior, image, largest[:_COORDINATES], kl, title))
    z = np.asarray(latent.aggregate_posterior(model, test))
    save("aggregate.png", _aggregate(z, data.y_test, largest, kl, title))


def _has_layers(posterior: Any) -> bool:
    """Returns whether z_0 and z_K differ."""
    return not isinstance(posterior, PlanarFlow) or posterior.params.b.shape[-1] > 0


def _posteriors(model: Model, pixels: Any, names: list[str], title: str) -> Figure:
    grids = [posterior_grid(model, image) for image in pixels]
    heading = "The true posterior p(z|x) of test images and what approximates it (KL to p(z|x) in nats)"
    if max(grids[0].layers):
        heading += "; at the right q_k(z|x) after k layers, on a larger square, each in a colour scale of its own"
    heading += f"\nwhite: p(z|x), around 50 and 95 % of its mass ({title})"
    return posterior_rows(np.asarray(pixels) / 255.0, grids, title=heading, names=names)


def _interpolations(model: Model, posterior: Any, test: Images | Streamed, chosen: np.ndarray, title: str) -> Figure:
    pairs = np.stack([chosen, np.roll(chosen, -1)], axis=1)[: len(chosen) if len(chosen) > 2 else 1]
    pairs = pairs[np.unique(np.linspace(0, len(pairs) - 1, _ROWS).round().astype(int))]
    heading = f"Pixel means on straight lines between test images, in z_0 and in z_K\n({title})"
    if not _has_layers(posterior):
        heading = f"Pixel means on straight lines between test images\n({title})"
    elif isinstance(posterior, PlanarFlow) and posterior.params.b.ndim > 1:
        heading += "\nin z_0 the flow's parameters change linearly too, from one image's to the other's"
    left, right = (test.take(pairs[:, side]).pixels for side in (0, 1))
    return draw_interpolations(model, left, right, heading)[0]


def draw_interpolations(model: Model, left: Any, right: Any, title: str) -> tuple[Figure, latent.Interpolations]:
    """Draws rows of pictures between two images: one row per pair without a flow, otherwise two rows.

    Args:
        model: a VAE.
        left: ``[P, H, W]`` uint8, the images at the left ends, as they are evaluated.
        right: ``[P, H, W]`` uint8, the images at the right ends.
        title: the title of the page.

    Returns:
        The page, and the pictures on it.
    """
    lines = latent.interpolate(model, left, right)
    layers, rows = _has_layers(evaluation.abstract_posterior(model, np.shape(left)[1:])), {}
    for number, (first, last) in enumerate(zip(np.asarray(left) / 255.0, np.asarray(right) / 255.0, strict=True)):
        for name, line in {"z_0": lines.base, "z_K": lines.code}.items():
            if name == "z_K" or layers:
                rows[f"{number + 1}: {name}" if len(left) > 1 else name] = np.stack(
                    [first, *np.asarray(line[number]), last]
                )
    captions = ["image", *(f"{t:g}" for t in np.linspace(0, 1, latent.STEPS)), "image"]
    return image_rows(rows, title=title, columns=captions), lines


def _traversals(
    model: Model, posterior: Any, pixels: Any, dimensions: np.ndarray, kl: np.ndarray, title: str
) -> Figure:
    values = jnp.asarray(latent.VALUES, posterior.mean.dtype)
    moved = np.asarray(latent.traverse(model, pixels, jnp.asarray(dimensions, jnp.int32), values))
    image = np.asarray(pixels)[None] / 255.0
    rows = {
        f"no. {dimension}, KL {kl[dimension]:.2g}": np.concatenate([image, pictures])
        for dimension, pictures in zip(dimensions, moved, strict=True)
    }
    heading = f"A test image's code z_K with one coordinate moved; coordinates of the largest KL (nats)\n({title})"
    return image_rows(rows, title=heading, columns=["image", *(f"{value:g}" for value in latent.VALUES)])


def _aggregate(z: np.ndarray, labels: np.ndarray | None, largest: np.ndarray, kl: np.ndarray, title: str) -> Figure:
    far = latent.distance_from_prior(z)
    histograms = "" if z.shape[1] == 2 else "coordinates of the largest and of the smallest KL (nats) to the prior\n"
    heading = (
        f"Codes z_K of {len(z)} test images, a sample each: the aggregate posterior beside the prior N(0, I)\n"
        f"{histograms}means {np.min(far.mean):.2f} to {np.max(far.mean):.2f}, variances {np.min(far.variance):.2f} to "
        f"{np.max(far.variance):.2f}: {far.nats:.2g} nats from the prior as independent normals\n({title})"
    )
    if z.shape[1] == 2:
        return aggregate_plane(z, labels, title=heading)
    half = _COORDINATES // 2
    shown = np.concatenate([largest[:half], largest[half:][-half:]])
    names = {f"no. {d}, KL {kl[d]:.2g}, mean {far.mean[d]:.2f}, var. {far.variance[d]:.2f}": d for d in shown}
    return aggregate_histograms({name: z[:, d] for name, d in names.items()}, title=heading)


# --- Pictures of a sweep over flow lengths

# Nats an image on the static binarised MNIST of Larochelle & Murray, in a public reproduction of Rezende & Mohamed
# (2015): amortised planar flows, 784-400-400 networks, 40 latents, 500,000 updates. Figure -> K -> nats.
PUBLISHED = {
    "free_energy": {0: 98.14, 10: 93.48, 20: 92.28, 40: 91.34, 80: 90.86},
    "nll": {0: 92.58, 10: 88.95, 20: 88.09, 40: 87.45, 80: 87.09},
}
_REPRODUCTION = "a reproduction of\nRezende & Mohamed"
# The settings of that model, as flags; its optimisation may differ.
_PUBLISHED_SETTING: dict[str, Any] = {
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
_PANELS = {
    "free_energy": "free energy (nats per image)",
    "nll": "NLL (nats per image)",
    "squared_error": "squared error per image",
}


def comparable_to_published(flags: Mapping[str, Any], name: str, test_shape: tuple[int, ...]) -> bool:
    """Returns whether figures of a run may stand beside the published ones.

    Args:
        flags: the flags of the run by name.
        name: the name of the data set.
        test_shape: the shape of all test images together.
    """
    same = all(flags[flag] == value for flag, value in _PUBLISHED_SETTING.items())
    return same and name == "binarized_mnist" and test_shape == (10_000, 28, 28)


def compared_lengths(rows: Sequence[Mapping[str, Any]], objective: str, title: str, published: bool) -> Figure:
    """Draws free energy and NLL against K, or the squared error if that is the objective.

    Args:
        rows: the rows that :func:`planar_vae_jax.statistics.compare` returns.
        objective: one of ``OBJECTIVES``.
        title: the settings of the sweep.
        published: whether published figures are drawn too.
    """
    names = ("squared_error",) if objective == "reconstruction" else ("free_energy", "nll")
    panels = {_PANELS[name]: [row[name] for row in rows] for name in names}
    beside = {_PANELS[name]: by_k for name, by_k in PUBLISHED.items()}
    return against_length(
        [row["flows"] for row in rows],
        panels,
        title=f"What K buys\n({title})",
        published={_REPRODUCTION: beside} if published else None,
    )


def each_class(models: Sequence[tuple[str, int, Dataset, Model, str]], title: str, *, count: int = 10) -> Figure:
    """Draws test images of each class above their reconstructions by the models of that class.

    Args:
        models: for each model its class, K, the images of the class, the model, and its binarisation.
        title: the title of the page.
        count: the greatest number of images per class.
    """
    chosen: dict[str, np.ndarray] = {}
    for label, flows, data, model, binarization in models:
        images, index = data.x_test[:count], data.test_index[:count]
        pixels = evaluation.fixed_images(images, index, "test", binarization).pixels
        chosen.setdefault(f"{label}: original", images / 255.0)
        chosen[f"{label}: K = {flows}"] = np.asarray(evaluation.reconstruct(model, pixels))
    fewest = min(map(len, chosen.values()))
    return image_rows({name: pictures[:fewest] for name, pictures in chosen.items()}, title=title)
