"""Published figures, to be drawn beside one's own."""

from collections.abc import Mapping
from typing import Any

REPRODUCTION = "a reproduction of\nRezende & Mohamed"
# Figure -> K -> nats an image, on the static binarised MNIST of Larochelle & Murray, in a public reproduction of
# Rezende & Mohamed (2015): amortised planar flows, 784-400-400 networks, 40 latents, 500,000 updates.
AMORTIZED_PLANAR = {
    "free_energy": {0: 98.14, 10: 93.48, 20: 92.28, 40: 91.34, 80: 90.86},
    "nll": {0: 92.58, 10: 88.95, 20: 88.09, 40: 87.45, 80: 87.09},
}

# What was trained; how it was optimised may differ.
SETTING: dict[str, Any] = {
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


def is_setting(flags: Mapping[str, Any], name: str, test_shape: tuple[int, ...]) -> bool:
    """Whether figures of a run with these ``flags`` may stand beside the published ones."""
    same = all(flags[flag] == value for flag, value in SETTING.items())
    return same and name == "binarized_mnist" and test_shape == (10_000, 28, 28)
