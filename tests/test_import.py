"""The package's public names, and what importing it imports."""

import subprocess
import sys

import pytest

import planar_vae_jax
from planar_vae_jax import flows

HEAVY = ["flax", "optax", "orbax", "matplotlib", "absl", "scipy", "jaxtyping", "tensorflow_datasets"]


@pytest.mark.parametrize("package", ["planar_vae_jax", "planar_vae_jax.flows"])
def test_importing_the_package_imports_nothing_but_jax_and_the_flows(package):
    program = f"import jax, sys; before = set(sys.modules); import {package}; print(*(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported = {name.split(".")[0] for name in run.stdout.split()}
    assert "planar_vae_jax" in imported
    assert not imported & set(HEAVY)


@pytest.mark.parametrize("module", [planar_vae_jax, flows], ids=lambda module: module.__name__)
def test_each_public_name_is_there_and_explained(module):
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert f"``{name}``" in module.__doc__


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'planar_vae_jax' has no attribute 'planar_fow'"):
        planar_vae_jax.planar_fow  # noqa: B018
