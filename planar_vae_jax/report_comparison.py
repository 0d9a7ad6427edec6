"""The pages that a comparison of flow lengths draws."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from planar_vae_jax import plotting
from planar_vae_jax.analysis import evaluation, published
from planar_vae_jax.data import Dataset
from planar_vae_jax.load import load_run

PANELS = {
    "free_energy": "free energy (nats per image)",
    "nll": "NLL (nats per image)",
    "squared_error": "squared error per image",
}
EXAMPLES = 10  # of each class, on the page of reconstructions


def against_length(rows: Sequence[Mapping[str, Any]], objective: str, setting: str, theirs: bool) -> Figure:
    """Free energy and NLL (or the squared error, where that is what was trained) against K.

    Args:
        rows: of :func:`planar_vae_jax.analysis.comparison.compare`.
        objective: what was minimised.
        setting: for the title.
        theirs: whether the published figures are drawn beside.
    """
    names = ("squared_error",) if objective == "reconstruction" else ("free_energy", "nll")
    panels = {PANELS[name]: [row[name] for row in rows] for name in names}
    beside = {PANELS[name]: by_k for name, by_k in published.AMORTIZED_PLANAR.items()}
    return plotting.against_length(
        [row["flows"] for row in rows],
        panels,
        title=f"What K buys\n({setting})",
        published={published.REPRODUCTION: beside} if theirs else None,
    )


def each_class(models: Sequence[tuple[str, int, Dataset, Path]], checkpoint: str, title: str) -> Figure:
    """Test images of each class above their reconstructions by the models of their class.

    Args:
        models: class, K, the images of the class, and the run's folder.
        checkpoint: of the runs, ``"best"`` or ``"latest"``.
        title: of the page.
    """
    chosen: dict[str, np.ndarray] = {}
    for label, flows, data, folder in models:
        images, index = data.x_test[:EXAMPLES], data.test_index[:EXAMPLES]
        model = load_run(folder, checkpoint)
        pixels = evaluation.fixed_images(images, index, "test", model.binarization).pixels
        pictures = np.asarray(evaluation.reconstruct(model.vae, model.params, pixels))
        chosen.setdefault(f"{label}: original", images / 255.0)
        chosen[f"{label}: K = {flows}"] = pictures
    fewest = min(map(len, chosen.values()))
    return plotting.image_rows({name: pictures[:fewest] for name, pictures in chosen.items()}, title=title)
