"""Shapes and dtypes in the annotations of public functions are those of what they take and return."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from annotations import checked
from vae_models import drawn

from planar_vae_jax.analysis import evaluation, latent

MODEL = drawn((2, 3), hidden=5, latent=1, flow_length=1)
PIXELS = jnp.full((4, 2, 3), 255, jnp.uint8)
GREY = jnp.ones((4, 2, 3))
KEYS = jax.random.split(jax.random.key(0), 4)

CASES = {  # function, valid arguments, arguments of a wrong shape or dtype
    "pictures": (evaluation.pictures, (MODEL, jnp.zeros((4, 1))), (MODEL, jnp.zeros((4, 1), jnp.int32))),
    "reconstruct": (evaluation.reconstruct, (MODEL, PIXELS), (MODEL, GREY)),
    "draw_images": (evaluation.draw_images, (PIXELS, KEYS, "dynamic"), (PIXELS, KEYS[:3], "dynamic")),
    "interpolate": (latent.interpolate, (MODEL, PIXELS, PIXELS, 2), (MODEL, PIXELS, PIXELS[:3], 2)),
    "traverse": (latent.traverse, (MODEL, PIXELS[0], jnp.arange(1), jnp.zeros(3)), (MODEL, PIXELS[0], 0, jnp.zeros(3))),
    "distance_from_prior": (latent.distance_from_prior, (np.ones((4, 1)),), (np.ones(4),)),
}


@pytest.mark.parametrize("name", CASES)
def test_valid_arguments_are_taken_and_others_refused(name):
    function, valid, wrong = CASES[name]
    checked(function)(*valid)
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(function)(*wrong)
