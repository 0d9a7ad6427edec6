"""What README and docs show runs as it stands."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from running import stopped_after

from experiments import mnist
from planar_vae_jax.runs._signals import Stopped

ROOT = Path(__file__).parents[1]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


README = blocks("README.md")
pytestmark = pytest.mark.usefixtures("any_promotion")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A place with the run of README's first command, but on a few images and with tiny sizes."""
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    np.savez("images.npz", x_train=images, x_test=images[:5])
    return tmp_path


@pytest.mark.parametrize("block", README, ids=[str(number) for number in range(len(README))])
def test_every_program_of_the_readme_runs(folder, block):
    if "load_run(" in block:
        tiny = ["--epochs=1", "--hidden=8", "--latent=2", "--batch_size=16", "--nll_samples=2", "--dataset=images.npz"]
        with stopped_after(1), pytest.raises(Stopped):  # at its end, before its figures
            mnist.main(["--flows=5", *tiny, "--workdir=runs/mnist-flows=5-seed=0"])
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    for name, shape in {"samples": (64, 28, 28), "pictures": (8, 28, 28), "nats": (8,), "zK": (1000, 2)}.items():
        assert np.shape(names.get(name, np.zeros(shape))) == shape
    if "info" in names:  # what was trained has learned
        losses = np.asarray(names["info"].loss)
        assert losses[-1].mean() < losses[0].mean()


def test_the_readme_shows_a_vae_a_density_the_map_and_a_trained_model():
    assert len(README) == 4
    vae, density = (
        [line for line in block.splitlines() if line.strip() and not line.startswith(("import", "from"))]
        for block in README[:2]
    )
    assert len(vae) <= 20
    assert len(density) <= 15


def test_the_experiment_of_ones_own_runs_and_goes_on(folder):
    (program,) = blocks("docs/experiment.md")
    names = {"__name__": "beta_vae", "__doc__": "A beta-VAE."}
    exec(compile(program, "beta_vae.py", "exec"), names)
    for epochs in (1, 2):
        names["main"](["--dataset=images.npz", f"--epochs={epochs}", "--workdir=run"])
    assert len((folder / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (folder / "run" / "samples.png").exists()


def test_a_plain_installation_brings_the_core_alone():
    """And of what that needs, no pyarrow."""
    waiting = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {Requirement(one).name for one in waiting} == {"jax", "jaxlib", "numpy", "flax", "optax"}
    needed = set()
    while waiting:
        one = Requirement(waiting.pop())
        if one.name not in needed and (one.marker is None or one.marker.evaluate({"extra": ""})):
            needed.add(one.name)
            waiting += importlib.metadata.requires(one.name) or []
    assert "pyarrow" not in needed


def test_importing_the_package_stays_light():
    heavy = ("flax", "optax", "orbax", "matplotlib", "absl", "tensorflow_datasets", "tqdm")
    program = f"import sys, planar_vae_jax; print([name for name in {heavy!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"
