"""Shapes and dtypes in the annotations of public functions are those of what they take and return."""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from annotations import checked
from vae_models import drawn

from planar_vae_jax.vae import VAE, Bernoulli, binarization, objectives
from planar_vae_jax.vae.likelihoods import Gaussian, LocationScale, bounded_log_scale

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 4)
GREY, COLOUR = jnp.ones((4, 2, 3)), jnp.ones((4, 2, 3, 3))
LEVELS = jnp.full((4, 2, 3), 100, jnp.uint8)
Z = jnp.zeros((4, 1))
MODEL = drawn((2, 3), hidden=5, latent=1, flow_length=1)
COLOURED = drawn((2, 3, 3), hidden=5, latent=1, flow_length=1)
FLAT = GREY.reshape(4, 6)


def _importance_nll(*arguments):
    return checked(objectives.importance_nll)(*arguments, samples=2)


CASES = {  # name: function, valid arguments, arguments of a wrong shape or dtype
    "free_energy": (objectives.free_energy, [(MODEL, GREY, KEY), (COLOURED, COLOUR, KEYS)], (MODEL, FLAT, KEY)),
    "sampled_terms": (objectives.sampled_terms, [(MODEL, GREY, KEY, 3)], (MODEL, FLAT, KEY, 3)),
    "importance_nll": (_importance_nll, [(MODEL, GREY, KEY), (COLOURED, COLOUR, KEYS)], (MODEL, LEVELS, KEY)),
    "terms": (
        objectives.terms,
        [(MODEL, GREY, Z), (MODEL, GREY, jnp.zeros((5, 4, 1)))],
        (MODEL, LEVELS, Z),
    ),
    "log_joint": (
        objectives.log_joint,
        [(MODEL, GREY, Z), (MODEL, GREY[0], jnp.zeros((7, 1))), (MODEL, GREY, jnp.zeros((5, 4, 1)))],
        (MODEL, GREY, jnp.zeros((4, 1), jnp.int32)),
    ),
    "encode": (VAE.encode, [(MODEL, GREY), (COLOURED, COLOUR[0])], (MODEL, LEVELS)),
    "decode": (VAE.decode, [(MODEL, Z), (MODEL, Z[0])], (MODEL, jnp.float32(0.0))),
    "Bernoulli.log_prob": (Bernoulli().log_prob, [(FLAT, FLAT), (FLAT, FLAT[None])], (FLAT, FLAT[:, :5])),
    "Bernoulli.mean": (Bernoulli().mean, [(GREY,)], (LEVELS,)),
    "Gaussian.log_prob": (
        Gaussian().log_prob,
        [(FLAT, LocationScale(FLAT, FLAT[0]))],
        (LEVELS, LocationScale(FLAT, FLAT[0])),
    ),
    "bounded_log_scale": (bounded_log_scale, [(GREY, 0.1)], (LEVELS, 0.1)),
    "noise": (objectives.noise, [(KEY, Z), (KEYS, Z), (jax.random.PRNGKey(0), Z)], (KEY, jnp.float32(0.0))),
    "fold_in_each": (objectives.fold_in_each, [(KEYS, 3)], (KEY, 3)),
    "typed_key": (objectives.typed_key, [(KEY,), (KEYS,), (jax.random.PRNGKey(0),)], (3,)),
    "binarize": (
        binarization.binarize,
        [(KEY, LEVELS, "dynamic"), (KEY, LEVELS, "none"), (jax.random.PRNGKey(0), LEVELS[0], "dynamic")],
        (KEY, GREY, "dynamic"),
    ),
    "binarize_each": (binarization.binarize_each, [(KEYS, LEVELS, "dynamic")], (KEYS[:3], LEVELS, "dynamic")),
    "bernoulli_pixels": (binarization.bernoulli_pixels, [(KEY, LEVELS)], (KEYS, LEVELS)),
}


@pytest.mark.parametrize("name", CASES)
def test_valid_arguments_are_taken_and_others_refused(name):
    function, valid, wrong = CASES[name]
    for arguments in valid:
        checked(function)(*arguments)
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(function)(*wrong)


def test_a_loss_takes_images_of_uint8():
    loss = checked(objectives.vae_loss("elbo", "dynamic"))
    loss(MODEL, LEVELS, KEY, jnp.int32(0))
    with pytest.raises(jaxtyping.TypeCheckError):
        loss(MODEL, GREY, KEY, jnp.int32(0))
