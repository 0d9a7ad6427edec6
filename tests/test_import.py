"""The package's public names, and what importing it imports."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import planar_vae_jax
from planar_vae_jax import flows

ROOT = Path(__file__).parents[1]
HEAVY = ["flax", "optax", "orbax", "matplotlib", "absl", "scipy", "jaxtyping", "tensorflow_datasets", "tqdm"]
HEAVY += ["numpyro", "flowjax", "equinox", "distrax", "blackjax"]


def test_importing_the_package_and_its_clients_imports_nothing_but_jax_and_the_flows():
    imports = "import planar_vae_jax, planar_vae_jax.clients"
    program = f"import jax, sys; before = set(sys.modules); {imports}; print(*(set(sys.modules) - before))"
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


def test_citation_and_changelog_are_of_the_version_that_the_package_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "planar_vae_jax.__version__"}
    (citation,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## \[(.*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation == newest[1] == planar_vae_jax.__version__
