"""The pages that a VAE's run draws, each given to a function that saves it under a name."""

from collections.abc import Callable
from typing import Any

import numpy as np

from planar_vae_jax import plotting
from planar_vae_jax.analysis import evaluation
from planar_vae_jax.analysis.evaluation import Figures, Images
from planar_vae_jax.data import Dataset, examples
from planar_vae_jax.data.streamed import Streamed
from planar_vae_jax.report_latent import draw_latent_space
from planar_vae_jax.vae.model import VAE

NO_KL = "\nno KL term was trained, so the prior is not where the codes are"
SaveFigure = Callable[[str, Any], object]  # (file name, matplotlib Figure), as ``RunFolder.save_figure``


def describe(
    name: str,
    binarization: str,
    vae: VAE,
    epochs: int,
    objective: str,
    classes: tuple[int, ...] | None,
    binary: bool = False,
) -> str:
    """What tells this run's figures from another's; ``binary``: the images were that before."""
    parts = [
        f"{name} classes {','.join(map(str, classes))}" if classes else name,
        _pixels(vae, binarization, objective, binary),
        *(["gated convolutions"] if vae.encoder == "conv" else ["two hidden layers"] if vae.layers == 2 else []),
        *(["full covariance"] if vae.posterior == "full" else []),
        f"K = {vae.flow_length}{' amortised' * vae.amortized}{f' {vae.h}' * (vae.h != 'tanh')}",
        *({"reconstruction": ["squared error, no KL"], "iwae": ["importance-weighted"]}.get(objective, [])),
        f"{epochs} epoch{'s' * (epochs > 1)}",
    ]
    return ", ".join(parts)


def binarized(binarization: str, binary: bool) -> str:
    """How images became binary; ``binary``: they were that before, and a draw changes nothing."""
    return "binary images" if binary else f"{binarization} binarisation"


def _pixels(vae: VAE, binarization: str, objective: str, binary: bool) -> str:
    if binarization != "none":
        return binarized(binarization, binary)
    levels = "grey levels" if vae.channels == 1 else "colours"
    cross_entropy = " (cross-entropy, no likelihood)" if objective != "reconstruction" else ""
    likelihoods = {"bernoulli": cross_entropy, "logistic": " by a discretised logistic", "gaussian": " by a density"}
    return levels + likelihoods[vae.likelihood]


def draw_pages(
    save: SaveFigure, vae: VAE, params: Any, data: Dataset, test: Images | Streamed, setting: str, objective: str
) -> None:
    """Figures 3 and 4 of the paper, samples from the prior, and the pages on the latent space."""
    chosen, captions = examples(data)
    rows = {
        "original": data.x_test[chosen] / 255.0,
        "reconstruction": np.asarray(evaluation.reconstruct(vae, params, test.take(chosen).pixels)),
    }
    title = f"Test images and their reconstructions\n({setting})"
    save("reconstructions.png", plotting.image_rows(rows, title=title, columns=captions))
    samples = evaluation.sample_prior(vae, params, evaluation.fixed_key(), 100)
    title = f"Pixel means decoded from the prior\n({setting})"
    if objective == "reconstruction":
        title += NO_KL
    save("samples.png", plotting.image_grid(np.asarray(samples), columns=10, title=title))
    draw_latent_space(save, vae, params, data, test, setting, objective)


def draw_losses(
    save: SaveFigure,
    labels: np.ndarray | None,
    figures: Figures,
    lines: list[dict[str, Any]],
    split: str,
    setting: str,
    objective: str,
) -> None:
    """Figures 5 and 6 of the paper (loss curves with the first iteration and without), and the test loss by class."""
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
    figure = plotting.loss_curves(np.arange(len(lines) + 1), curves, title=f"Loss ({setting})", ylabel=trained)
    save("loss.png", figure)
    if labels is not None:
        name = "squared_error" if objective == "reconstruction" else "free_energy"
        rows = evaluation.means_by_class(figures, labels)
        figure = plotting.class_losses(
            {key: row[name] for key, row in rows.items()},
            title=f"Test loss by class\n({setting})",
            label=label,
            errors={key: np.nan if row[f"{name}_se"] is None else row[f"{name}_se"] for key, row in rows.items()},
        )
        save("classes.png", figure)
